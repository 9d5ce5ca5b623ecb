"""The server's routes: each checks its request, opens streams on a model, and answers as OpenAI's API does."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Scope

from overspill._core import Error
from overspill.engine.async_stream import AsyncStream
from overspill.engine.model import Model
from overspill.server.connections import ClientGoneError, Events, Guard, merged, unless_gone
from overspill.server.errors import ApiError, ApiResponse, api_error_of, from_validation
from overspill.server.metrics import Metrics
from overspill.server.models import Models
from overspill.server.replies import ChatReplies, TextReplies
from overspill.server.requests import ChatRequest, CompletionRequest, SamplingRequest

__all__ = ["Limits", "make_app"]

logger = logging.getLogger("overspill")

T = TypeVar("T")
_CLIENT_GONE = 499  # nginx's; nobody reads it


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes."""

    most_requests: int = 64
    """Requests for texts that run or wait at a time; more get the status 429."""
    timeout_s: float = 600.0
    """Seconds for one request, its waiting included."""
    body_bytes: int = 16 << 20
    """Bytes of a request's body; larger ones get the status 413."""


class _Service:
    """What the routes have in common."""

    def __init__(self, models: Models, limits: Limits, closing: asyncio.Event) -> None:
        self.models, self.limits, self.closing, self.metrics = models, limits, closing, Metrics()
        self._n_active = 0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Count a request while it runs; an :class:`ApiError` if there are too many."""
        if self._n_active >= self.limits.most_requests:
            raise ApiError(
                429,
                f"{self._n_active} requests run or wait already, and this server takes no more at a time",
                code="rate_limit_exceeded",
                retry_after_s=1,
            )
        self._n_active += 1
        self.metrics.active.set(self._n_active)
        try:
            yield
        finally:
            self._n_active -= 1
            self.metrics.active.set(self._n_active)

    async def answer(
        self,
        http: Request,
        request: SamplingRequest,
        open_streams: Callable[[Model, str], tuple[Any, Sequence[AsyncStream[Any]]]],
    ) -> Response:
        """Return the answer to a request, whole or streamed.

        ``open_streams`` returns the object that makes answers of tokens, and a stream for each choice.
        """
        async with AsyncExitStack() as opened:
            await opened.enter_async_context(self.admitted())
            deadline = asyncio.get_running_loop().time() + self.limits.timeout_s
            name = self.models.named(request.model).name

            async def start() -> tuple[Any, Sequence[AsyncStream[Any]]]:
                model = await opened.enter_async_context(self.models.using(name))
                replies, streams = open_streams(model, name)
                for stream in streams:
                    await opened.enter_async_context(stream)
                    opened.callback(self._count, name, stream)
                return replies, streams

            replies, streams = await self._limited(unless_gone(start(), http.receive, self.closing), deadline)
            if request.stream:
                events = self._chunks(replies, streams, request.includes_usage, deadline)
                return Events(events, opened.pop_all(), self.closing)
            whole = self._whole(replies, streams)
            return ApiResponse(await self._limited(unless_gone(whole, http.receive, self.closing), deadline))
        raise AssertionError("the block returns or raises")

    def _count(self, name: str, stream: AsyncStream[Any]) -> None:
        self.metrics.add(name, stream.stats)

    async def _limited(self, work: Awaitable[T], deadline: float) -> T:
        try:
            async with asyncio.timeout_at(deadline):
                return await work
        except TimeoutError:
            raise ApiError(504, f"the request took more than {self.limits.timeout_s:g} s", code="timeout") from None

    @staticmethod
    async def _whole(replies: Any, streams: Sequence[AsyncStream[Any]]) -> Mapping[str, Any]:
        async for choice, token in merged(streams):
            if token is not None:
                replies.add(choice, token)
        stats = [stream.stats for stream in streams]
        choices = [replies.choice(i, one) for i, one in enumerate(stats)]
        return replies.whole(choices, replies.usage(stats))  # type: ignore[no-any-return]

    async def _chunks(
        self, replies: Any, streams: Sequence[AsyncStream[Any]], includes_usage: bool, deadline: float
    ) -> AsyncIterator[Mapping[str, Any]]:
        for i in range(len(streams)):
            if (first := replies.beginning(i)) is not None:
                yield replies.chunk([first])
        tokens = merged(streams)
        while True:
            try:
                choice, token = await self._limited(anext(tokens), deadline)
            except StopAsyncIteration:
                break
            made = replies.add(choice, token) if token is not None else replies.end(choice, streams[choice].stats)
            if made is not None:
                yield replies.chunk([made])
        if includes_usage:
            yield replies.chunk([], replies.usage([stream.stats for stream in streams]))


def make_app(
    models: Models,
    *,
    limits: Limits,
    closing: asyncio.Event,
    api_keys: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> FastAPI:
    """Return the application, for uvicorn or another ASGI server.

    Parameters
    ----------
    models
        What requests can name.
    limits
        What is refused.
    closing
        Set when the server ends, which ends all streams.
    api_keys
        One of them has to be in a request's ``Authorization: Bearer``. None: everybody is answered.
    origins
        Origins whose pages may use the server from a browser. Default: none.
    """
    service = _Service(models, limits, closing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await models.close()

    app = FastAPI(
        title="Overspill", version=version("overspill"), lifespan=lifespan, docs_url=None, redoc_url=None,
        default_response_class=ApiResponse,
    )  # fmt: skip
    _add_errors(app)
    refusal = _refusal_without([key.encode() for key in api_keys])
    app.add_middleware(Guard, most_bytes=limits.body_bytes, refusal=refusal, on_status=service.metrics.count_answer)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=[*origins], allow_methods=["*"], allow_headers=["*"])
    _add_information(app, service)
    _add_texts(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    async def on_error(_: Request, error: Exception) -> Response:
        if isinstance(error, ClientGoneError):
            return Response(status_code=_CLIENT_GONE)
        found = from_validation(error) if isinstance(error, RequestValidationError) else api_error_of(error)
        if found.status == 500:
            logger.error("a request failed", exc_info=error)
        return found.response

    kinds = (ApiError, ClientGoneError, HTTPException, RequestValidationError, Error, ValueError, TypeError)
    for kind in kinds:
        app.add_exception_handler(kind, on_error)


def _refusal_without(keys: Sequence[bytes]) -> Callable[[Scope], Response | None]:
    """Return a function that refuses requests which have none of the keys."""
    open_paths = {"/health"}

    def refusal(scope: Scope) -> Response | None:
        if not keys or scope["path"] in open_paths:
            return None
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # All of them, so that the time tells nothing.
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in keys]
        if scheme.lower() == "bearer" and any(matches):
            return None
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key").response

    return refusal


def _add_information(app: FastAPI, service: _Service) -> None:
    models = service.models

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": models.created, "owned_by": "overspill"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in models.served]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return described(models.named(name).name)

    @app.get("/overspill/plan")
    async def plan(model: str = "") -> dict[str, Any]:
        return await models.plan(model)


def _add_texts(app: FastAPI, service: _Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: Request) -> Response:
        messages = [message.for_model() for message in request.messages]
        options = [request.options(i) for i in range(request.n_choices)]

        def open_streams(model: Model, name: str) -> tuple[ChatReplies, Sequence[AsyncStream[Any]]]:
            return ChatReplies(name, model, len(options)), [model.achat(messages, **one) for one in options]

        return await service.answer(http, request, open_streams)

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest, http: Request) -> Response:
        prompts = [prompt for prompt in request.prompts for _ in range(request.n_choices)]
        options = [request.options(i) for i in range(len(prompts))]

        def open_streams(model: Model, name: str) -> tuple[TextReplies, Sequence[AsyncStream[Any]]]:
            texts = [prompt if isinstance(prompt, str) else model.detokenize(prompt) for prompt in prompts]
            echoes = texts if request.echo else [""] * len(texts)
            streams = [model.astream(prompt, **one) for prompt, one in zip(prompts, options, strict=True)]
            return TextReplies(name, model, request.n_choices, echoes), streams

        return await service.answer(http, request, open_streams)
