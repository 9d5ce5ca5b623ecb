"""The client's side of a request: events that are sent as they come, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overspill.engine.async_stream import AsyncStream
from overspill.server.errors import ApiError, api_error_of
from overspill.server.replies import Event

__all__ = ["ClientGoneError", "Events", "Guard", "merged", "unless_gone"]

T = TypeVar("T")
logger = logging.getLogger("overspill")


class ClientGoneError(Exception):
    """The client has closed the connection."""


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: Coroutine[Any, Any, T], *ends: Coroutine[Any, Any, object]) -> tuple[T | None, int | None]:
    """Return what work returns, or the number of the first other that ended before it; then work is cancelled."""
    task, others = asyncio.ensure_future(work), [asyncio.ensure_future(one) for one in ends]
    try:
        await asyncio.wait([task, *others], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result(), None
        return None, next(i for i, other in enumerate(others) if other.done())
    finally:
        for one in (task, *others):
            one.cancel()
        await asyncio.gather(task, *others, return_exceptions=True)


def _ending() -> ApiError:
    return ApiError(503, "the server is shutting down")


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive, closing: asyncio.Event) -> T:
    """Return what work returns. Where the client goes away before, or the server ends, work is cancelled.

    Raises
    ------
    ClientGoneError
        The client has gone.
    ApiError
        The server ends.
    """
    result, ended = await _first(work, _until_gone(receive), closing.wait())
    match ended:
        case None:
            return result  # type: ignore[return-value]
        case 0:
            raise ClientGoneError
        case _:
            raise _ending()


async def merged(streams: Sequence[AsyncStream[T]]) -> AsyncIterator[tuple[int, T | None]]:
    """Yield the tokens of all streams as they come, with the number of the stream; None at the end of each."""
    if len(streams) == 1:
        async for only in streams[0]:
            yield 0, only
        yield 0, None
        return
    queue: asyncio.Queue[tuple[int, T | None, BaseException | None]] = asyncio.Queue(1)

    async def pull(i: int, stream: AsyncStream[T]) -> None:
        error = None
        try:
            async for token in stream:
                await queue.put((i, token, None))
        except Exception as caught:
            error = caught
        await queue.put((i, None, error))

    tasks = [asyncio.create_task(pull(i, stream)) for i, stream in enumerate(streams)]
    try:
        n_open = len(streams)
        while n_open:
            i, token, error = await queue.get()
            if error is not None:
                raise error
            n_open -= token is None
            yield i, token
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Events(Response):
    """An answer of server-sent events, and what is to be closed after it, whatever ends it."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Event],
        failed: Callable[[ApiError], Event],
        limited: Callable[[Coroutine[Any, Any, None]], Coroutine[Any, Any, None]],
        opened: AsyncExitStack,
        closing: asyncio.Event,
    ) -> None:
        """Take the objects to send, which OpenAI's ``[DONE]`` ends, what makes one of an error, and a limit of time."""
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events, self._failed, self._limited, self._opened, self._closing = (
            events,
            failed,
            limited,
            opened,
            closing,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the client's going away ends them."""
        ended = None
        try:
            async with self._opened:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                _, ended = await _first(self._limited(self._send_all(send)), _until_gone(receive), self._closing.wait())
                if ended == 1:  # before the streams are closed, which takes a step
                    await self._send_one(send, self._failed(_ending()))
        except Exception as error:
            await self._send_one(send, self._failed(api_error_of(error)))
        if ended != 0:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _send_all(self, send: Send) -> None:
        async for event in self._events:
            await self._send_one(send, event)

    @staticmethod
    async def _send_one(send: Send, event: Event) -> None:
        """Send an event; those that have a type are named by it."""
        named = f"event: {event['type']}\n" if "type" in event else ""
        data = json.dumps(event, allow_nan=False, separators=(",", ":"))
        await send(
            {"type": "http.response.body", "body": f"{named}data: {data}\n\n".encode("ascii"), "more_body": True}
        )


class Guard:
    """Refuses bodies that are too large before they are in memory, and tells of each answer's status."""

    def __init__(
        self,
        app: ASGIApp,
        most_bytes: int,
        refusal: Callable[[Scope], Response | None],
        on_status: Callable[[Scope, int], None],
    ) -> None:
        """Wrap an application; ``refusal`` returns the answer to a request that the application does not get."""
        self._app, self._most_bytes, self._refusal, self._on_status = app, most_bytes, refusal, on_status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what comes and goes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        n_bytes = 0
        has_begun = False

        async def counted() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._most_bytes:
                raise HTTPException(413, f"the request has more than {self._most_bytes:,} bytes")
            return message

        async def noted(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._on_status(scope, message["status"])
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, counted, noted)
        except Exception as error:
            logger.exception("a request failed")
            if not has_begun:
                await api_error_of(error).response(scope, counted, noted)
