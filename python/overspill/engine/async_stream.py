"""A stream for asyncio: its steps run in a thread, so that the event loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from overspill._core import Error, Origin
from overspill.base.values import Stats, StopReason, Token
from overspill.engine.stream import Stream

__all__ = ["AsyncStream"]

T = TypeVar("T")


class AsyncStream:
    """A reply as it is made: an asynchronous iterator of :class:`Token`, which never blocks the event loop.

    A thread of the stream's own opens the stream, takes its steps, and ends with it. Mistakes in the arguments
    therefore come out of the first step, or of ``async with``. Samplers and logits processors in Python run in that
    thread, with the context variables that held when ``astream`` was called.

    The stream ends when the loop or the ``async with`` block is left, with :meth:`aclose`, and when the task is
    cancelled, by a timeout too. A step that runs is cancelled. Only :meth:`aclose` and ``async with`` wait for that;
    the model is usable at once, and :attr:`stats` stays readable.
    """

    def __init__(self, start: Callable[[], Stream]) -> None:
        """Take a function that opens a stream; use :meth:`Model.astream`."""
        self._start = start
        self._origin = Origin()
        self._stream: Stream | None = None
        self._opening = threading.Lock()
        self._context = contextvars.copy_context()
        # Not the default executor: user code that waits for this stream may fill its threads. Until it is used, an
        # executor has no thread.
        self._steps = ThreadPoolExecutor(1, "overspill-stream")
        self._begun = self._ended = False
        self._closing: Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[Token]:
        """Yield the tokens; the stream is closed when the loop is left."""
        return _Loop(self)

    async def __anext__(self) -> Token:
        """Return the next token, or raise ``StopAsyncIteration`` at the end."""
        token = await self._run(self._step)
        if token is None:
            raise StopAsyncIteration
        return token

    async def __aenter__(self) -> AsyncStream:
        """Return the stream itself, open; it is closed when the block is left."""
        await self._run(self._open)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        await self.aclose()

    async def aclose(self) -> None:
        """End the stream, and wait until it has; a step that runs is cancelled. Idempotent."""
        self._end()
        if self._closing is not None:
            await _done(self._closing)  # which goes on where the caller is cancelled here

    @property
    def stats(self) -> Stats:
        """Counts and times of the stream so far."""
        if self._stream is not None:
            return self._stream.stats
        return Stats(0, 0, 0.0, 0.0, None, StopReason.CLOSED if self._ended else None)

    def __repr__(self) -> str:
        """Return the stats in brackets."""
        return f"<overspill.AsyncStream {self.stats}>"

    async def _run(self, work: Callable[[], T | None]) -> T | None:
        if self._ended:
            return None
        self._origin.check("the stream")
        self._begun = True
        try:
            step = self._steps.submit(self._context.run, work)
        except RuntimeError as error:
            self._end()
            raise Error(f"the stream gets no thread of its own: {error}") from None
        try:
            result = await _done(step)
        except BaseException:
            self._end()
            raise
        if result is None:
            self._end()
        return result

    def _open(self) -> Stream | None:
        with self._opening:
            if self._stream is None and not self._ended:
                self._stream = self._start()
            return self._stream

    def _step(self) -> Token | None:
        stream = self._open()
        return None if stream is None else next(stream, None)

    def _close(self) -> None:
        with self._opening:
            if self._stream is not None:
                self._stream.close()

    def _end(self) -> None:
        """Begin to close the stream, without waiting for the step that runs."""
        if self._ended:
            return
        self._ended = True
        if not self._begun or not self._origin.is_here:
            return
        closer = ThreadPoolExecutor(1, "overspill-close")
        # Without a thread for it, after the step; if the interpreter ends, models close their streams themselves.
        for one in (closer, self._steps):
            with contextlib.suppress(RuntimeError):
                self._closing = one.submit(self._close)
                break
        closer.shutdown(wait=False)
        self._steps.shutdown(wait=False)


async def _done(work: Future[T]) -> T:
    """Wait for the end of work in another thread; where the loop is closed before, nobody is told."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def tell(work: Future[T]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: None if ended.done() else ended.set_result(None))

    work.add_done_callback(tell)
    await ended
    return work.result()


class _Loop:
    """One ``async for`` over a stream, which closes it at once; a generator would wait for the event loop."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        return await self._stream.__anext__()

    def __del__(self) -> None:
        self._stream._end()
