"""The server's routes: each checks its request, opens streams on a model, and answers as OpenAI's API does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from overspill._core import Error
from overspill.engine.model import Model
from overspill.engine.reply import ChatStream
from overspill.server.access import refusing
from overspill.server.answers import Answer, CascadeAnswer, Options, Start
from overspill.server.connections import ClientGoneError, Events, Guard, merged, unless_gone
from overspill.server.errors import ApiError, ApiResponse, ErrorReply, api_error_of, from_validation
from overspill.server.metrics import Metrics
from overspill.server.models import Models
from overspill.server.page import add_page
from overspill.server.replies import ChatReplies, Event, Replies, TextReplies, TokenBytes
from overspill.server.requests import ChatRequest, CompletionRequest, SamplingRequest
from overspill.server.responses import ResponseReplies, ResponsesRequest

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


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks a model for."""

    texts: Sequence[tuple[Start, Options]]
    """For each text that is to be made."""
    replies: Callable[[str, TokenBytes, Model], Replies]
    """Returns what makes answers of tokens, for a model of that name."""
    ids_in: str = ""
    """The field with token ids, if there is one."""
    ends_with_call: bool = False
    """Whether the first call of a tool ends an answer."""


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request cannot be answered"},
    "5XX": {"model": ErrorReply, "description": "The server cannot answer it"},
}
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


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

    async def answer(self, http: Request, request: SamplingRequest, asked: Asked) -> Response:
        """Return the answer to a request, whole or streamed."""
        async with AsyncExitStack() as opened:
            await opened.enter_async_context(self.admitted())
            deadline = asyncio.get_running_loop().time() + self.limits.timeout_s
            start = unless_gone(self._start(request.model, asked, opened), http.receive, self.closing)
            replies, answers = await self._limited(start, deadline)
            if request.stream:
                limited = partial(self._limited, deadline=deadline)
                return Events(self._events(replies, answers), replies.failed, limited, opened.pop_all(), self.closing)
            whole = unless_gone(self._whole(replies, answers), http.receive, self.closing)
            return ApiResponse(await self._limited(whole, deadline))
        raise AssertionError("the block returns or raises")

    async def _start(self, name: str, asked: Asked, opened: AsyncExitStack) -> tuple[Replies, Sequence[Answer]]:
        """Open a stream for each of a request's texts; all is left with ``opened``, the streams before the models."""
        using = await opened.enter_async_context(AsyncExitStack())
        pair = self.models.pair(name)
        if pair and len(asked.texts) > 1:
            raise ValueError("n: a cascade gives one answer to one prompt")
        if pair and asked.ids_in:
            raise ValueError(f"{asked.ids_in}: token ids are one model's own, and a cascade has two models")
        first = pair["small"] if pair else self.models.named(name).name
        model = await using.enter_async_context(self.models.using(first))
        call = {"ends_with_call": asked.ends_with_call}
        if pair:
            ((start, options),) = asked.texts
            answers: list[Answer] = [CascadeAnswer(self.models, pair, using, model, start, options, **call)]
        else:
            answers = [Answer(first, model, start, options, **call) for start, options in asked.texts]
        for answer in answers:
            await opened.enter_async_context(answer)
            opened.callback(self._count, answer)
        return asked.replies(name or first, answers[0].token_bytes, model), answers

    def _count(self, answer: Answer) -> None:
        for model, stats in answer.stats_by_model.items():
            self.metrics.add(model, stats)

    async def _limited(self, work: Awaitable[T], deadline: float) -> T:
        try:
            async with asyncio.timeout_at(deadline):
                return await work
        except TimeoutError:
            raise ApiError(504, f"the request took more than {self.limits.timeout_s:g} s", code="timeout") from None

    @staticmethod
    async def _whole(replies: Replies, answers: Sequence[Answer]) -> Event:
        async for choice, token in merged(answers):
            if token is not None:
                replies.add(choice, token)
            else:
                replies.end(choice, answers[choice].outcome)
        return replies.whole([answer.outcome for answer in answers])

    @staticmethod
    async def _events(replies: Replies, answers: Sequence[Answer]) -> AsyncIterator[Event]:
        for event in replies.begin():
            yield event
        async for choice, token in merged(answers):
            made = replies.add(choice, token) if token is not None else replies.end(choice, answers[choice].outcome)
            for event in made:
                yield event
        for event in replies.finish([answer.outcome for answer in answers]):
            yield event


def make_app(
    models: Models,
    *,
    limits: Limits,
    closing: asyncio.Event,
    api_keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    is_local: bool = False,
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
        Origins whose pages may use the server from a browser. Default: its own page alone.
    is_local
        Whether it listens at loopback alone, and answers to no other name.
    """
    service = _Service(models, limits, closing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await models.close()

    app = FastAPI(
        title="Overspill", version=version("overspill"), lifespan=lifespan, docs_url=None, redoc_url=None,
        default_response_class=ApiResponse, responses=_ERRORS,
    )  # fmt: skip
    _add_errors(app)
    refusal = refusing(api_keys, origins, is_local=is_local)
    app.add_middleware(Guard, most_bytes=limits.body_bytes, refusal=refusal, on_status=service.metrics.count_answer)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=[*origins], allow_methods=["*"], allow_headers=["*"])
    _add_information(app, service)
    _add_texts(app, service)
    add_page(app)
    return app


def _add_errors(app: FastAPI) -> None:
    async def on_error(_: Request, error: Exception) -> Response:
        if isinstance(error, ClientGoneError):
            return Response(status_code=_CLIENT_GONE)
        found = from_validation(error) if isinstance(error, RequestValidationError) else api_error_of(error)
        if found.status == 500:
            logger.error("a request failed", exc_info=error)
        return found.response

    kinds = (
        ApiError,
        ClientGoneError,
        HTTPException,
        RequestValidationError,
        Error,
        ValueError,
        TypeError,
        RecursionError,
    )
    for kind in kinds:
        app.add_exception_handler(kind, on_error)


def _add_information(app: FastAPI, service: _Service) -> None:
    models = service.models

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": models.created, "owned_by": "overspill"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in (*models.served, *models.cascades)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return described(name if models.pair(name) else models.named(name).name)

    @app.get("/overspill/plan")
    async def plan(model: str = "") -> dict[str, Any]:
        return await models.plan(model)


def _add_texts(app: FastAPI, service: _Service) -> None:
    def conversation(request: ChatRequest) -> Sequence[tuple[Start, Options]]:
        messages = [message.for_model() for message in request.messages]

        def start(model: Model, options: Options) -> ChatStream:
            return model.chat(messages, **options)

        return [(start, request.options(i)) for i in range(request.n_choices)]

    @app.post("/v1/chat/completions", responses=_STREAMED)
    async def chat(request: ChatRequest, http: Request) -> Response:
        def replies(name: str, token_bytes: TokenBytes, _: Model) -> ChatReplies:
            return ChatReplies(name, token_bytes, request.n_choices, includes_usage=request.includes_usage)

        return await service.answer(
            http, request, Asked(conversation(request), replies, request.ids_in, request.takes_one_call)
        )

    @app.post("/v1/responses", responses=_STREAMED)
    async def respond(request: ResponsesRequest, http: Request) -> Response:
        def replies(name: str, token_bytes: TokenBytes, _: Model) -> ResponseReplies:
            return ResponseReplies(name, token_bytes, request)

        chat = request.for_chat()
        return await service.answer(http, request, Asked(conversation(chat), replies, chat.ids_in, chat.takes_one_call))

    @app.post("/v1/completions", responses=_STREAMED)
    async def complete(request: CompletionRequest, http: Request) -> Response:
        prompts = [prompt for prompt in request.prompts for _ in range(request.n_choices)]

        def starting(prompt: str | Sequence[int]) -> Start:
            return lambda model, options: model.stream(prompt, **options)

        def replies(name: str, token_bytes: TokenBytes, model: Model) -> TextReplies:
            texts = [prompt if isinstance(prompt, str) else model.detokenize(prompt) for prompt in prompts]
            echoes = texts if request.echo else [""] * len(texts)
            return TextReplies(name, token_bytes, request.n_choices, echoes, includes_usage=request.includes_usage)

        texts = [(starting(prompt), request.options(i)) for i, prompt in enumerate(prompts)]
        return await service.answer(http, request, Asked(texts, replies, request.ids_in))
