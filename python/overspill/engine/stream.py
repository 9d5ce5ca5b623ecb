"""A stream of tokens, and the figures that it gives of itself."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, TypeVar

from overspill import _core
from overspill.base.values import (
    Breakdown,
    CacheType,
    Stats,
    StopReason,
    Token,
)
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import layer_caches

__all__ = ["Closable", "ReadBytes", "Stream", "stats_of", "until_left"]


class ReadBytes:
    """Bytes of weights and KV cache that decoding reads."""

    def __init__(self, info: ModelInfo, type_k: CacheType, type_v: CacheType) -> None:
        self._weights = info.bytes_per_token
        self._caches = layer_caches(info)
        self._types = type_k, type_v

    def __call__(self, depth: int, n: int) -> int:
        """Return those of ``n`` tokens from a depth on."""
        middle = depth + n // 2
        return n * (self._weights + sum(cache.bytes_read(middle, *self._types) for cache in self._caches))


def stats_of(values: _core._Stats, read_bytes: ReadBytes | None) -> Stats:
    """Return the stats that the core counted; with the bytes read where one stream decoded alone."""
    prompt_tokens, tokens, prefill_s, decode_s, first_s, reason, cached, dropped, parts = values
    n_splits, n_reused, n_page_faults = parts[8:]
    n = max(0, tokens - 1)
    breakdown = Breakdown(
        n,
        *parts[:8],
        graph_splits=n_splits,
        graphs_reused=n_reused,
        major_page_faults=None if n_page_faults < 0 else n_page_faults,
        read_bytes=None if read_bytes is None else read_bytes(prompt_tokens - dropped, n),
    )
    stop_reason = None if reason is None else StopReason(reason)
    return Stats(prompt_tokens, tokens, prefill_s, decode_s, first_s, stop_reason, cached, dropped, breakdown)


class Stream:
    """A reply as it is made: iterate over it to get :class:`Token` after token.

    Each ``next()`` runs one step of the model, without the GIL. Leaving the loop, by
    ``break`` or by an exception, ends the stream; so does :meth:`close`, or leaving the
    ``with`` block. The model is usable afterwards, and :attr:`stats` stays readable.
    """

    def __init__(self, generation: _core.Generation, read_bytes: ReadBytes) -> None:
        """Wrap a native generation; :meth:`Model.stream` makes these."""
        self._generation = generation
        self._read_bytes = read_bytes

    def __iter__(self) -> Iterator[Token]:
        """Yield the tokens; the stream is closed when the loop is left."""
        try:
            # Not `yield from`: that would hand `close()` through without our reason.
            for token in self._generation:  # noqa: UP028
                yield token
        finally:
            self.close()

    def __next__(self) -> Token:
        """Return the next token, or raise ``StopIteration`` at the end."""
        return next(self._generation)

    def __enter__(self) -> Stream:
        """Return the stream itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._generation.close(StopReason.INTERRUPTED if interrupted else StopReason.CLOSED)

    def close(self) -> None:
        """End the stream; a step that runs in another thread is cancelled. Idempotent."""
        self._generation.close(StopReason.CLOSED)

    @property
    def stats(self) -> Stats:
        """What the stream did so far, and how fast."""
        return stats_of(self._generation.stats(), self._read_bytes)

    def __repr__(self) -> str:
        """Return the stats in brackets."""
        return f"<overspill.Stream {self.stats}>"


_Item = TypeVar("_Item", covariant=True)


class Closable(Protocol[_Item]):
    """What gives one thing after another, and can be ended."""

    def __next__(self) -> _Item:
        """Return the next one, or raise ``StopIteration``."""

    def close(self) -> None:
        """End it."""


def until_left(stream: Closable[_Item]) -> Iterator[_Item]:
    """Yield what comes; the stream is closed when the loop is left."""
    try:
        while True:
            try:
                item = next(stream)
            except StopIteration:
                return
            yield item
    finally:
        stream.close()
