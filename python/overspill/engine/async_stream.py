"""A stream for asyncio: its steps run in a thread, so that the event loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from overspill._core import Error, Origin
from overspill.base.text import short_repr
from overspill.base.values import Stats, StopReason
from overspill.engine.reply import ChatReply, ChatStream, ChatToken

__all__ = ["AsyncChatStream", "AsyncStream"]

T = TypeVar("T")
_Item = TypeVar("_Item", covariant=True)


class _Steps(Protocol[_Item]):
    """A stream as steps take it."""

    def __next__(self) -> _Item: ...

    def close(self) -> None: ...

    @property
    def stats(self) -> Stats: ...


class AsyncStream(Generic[_Item]):
    """A reply as it is made: an asynchronous iterator of :class:`Token`, which never blocks the event loop.

    A thread of the stream's own opens the stream, takes its steps, and ends with it. Mistakes in the arguments
    therefore come out of the first step, or of ``async with``. Samplers and logits processors in Python run in that
    thread, with the context variables that held when ``astream`` was called.

    The stream ends when the loop or the ``async with`` block is left, with :meth:`aclose`, and when the task is
    cancelled, by a timeout too. A step that runs is cancelled. Only :meth:`aclose` and ``async with`` wait for that;
    the model is usable at once, and :attr:`stats` stays readable.
    """

    def __init__(self, start: Callable[[], _Steps[_Item]]) -> None:
        """Take a function that opens a stream; use :meth:`Model.astream`."""
        self._start = start
        self._origin = Origin()
        self._stream: _Steps[_Item] | None = None
        self._opening = threading.Lock()
        self._context = contextvars.copy_context()
        # Not the default executor: user code that waits for this stream may fill its threads. Until it is used, an
        # executor has no thread.
        self._steps = ThreadPoolExecutor(1, "overspill-stream")
        self._begun = self._ended = False
        self._closing: Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[_Item]:
        """Yield the tokens; the stream is closed when the loop is left."""
        return _Loop(self)

    async def __anext__(self) -> _Item:
        """Return the next token, or raise ``StopAsyncIteration`` at the end."""
        token = await self._run(self._step)
        if token is None:
            raise StopAsyncIteration
        return token

    async def __aenter__(self) -> Self:
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
        return short_repr(self, str(self.stats))

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

    def _open(self) -> _Steps[_Item] | None:
        with self._opening:
            if self._stream is None and not self._ended:
                self._stream = self._start()
            return self._stream

    def _step(self) -> _Item | None:
        stream = self._open()
        try:
            return None if stream is None else stream.__next__()
        except StopIteration:
            return None

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


class AsyncChatStream(AsyncStream[ChatToken]):
    """A reply in a chat as it is made: an asynchronous iterator of :class:`ChatToken`; see :class:`AsyncStream`."""

    _stream: ChatStream | None

    def __init__(self, start: Callable[[], ChatStream]) -> None:
        """Take a function that opens a stream; use :meth:`Model.achat`."""
        super().__init__(start)

    @property
    def text(self) -> str:
        """The answer so far, without reasoning."""
        return "" if self._stream is None else self._stream.text

    @property
    def reasoning(self) -> str:
        """The model's reasoning so far."""
        return "" if self._stream is None else self._stream.reasoning

    async def finish(self) -> ChatReply:
        """Take the rest of the reply, and return the whole."""
        async with self:
            async for _token in self:
                pass
        if self._stream is None:
            raise Error("the stream was closed before it began")
        return self._stream._whole()


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


class _Loop(Generic[_Item]):
    """One ``async for`` over a stream, which closes it at once; a generator would wait for the event loop."""

    def __init__(self, stream: AsyncStream[_Item]) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[_Item]:
        return self

    async def __anext__(self) -> _Item:
        return await self._stream.__anext__()

    def __del__(self) -> None:
        self._stream._end()
