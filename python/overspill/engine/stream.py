"""A stream of tokens, and its stats."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, TypeVar

from overspill._core import Generation, GenerationStats
from overspill._core import StopReason as NativeStopReason
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
    """The bytes of weights and KV cache that a model reads as it decodes."""

    def __init__(self, info: ModelInfo, type_k: CacheType, type_v: CacheType) -> None:
        self._weights = info.bytes_per_token
        self._caches = layer_caches(info)
        self._types = type_k, type_v

    def __call__(self, depth: int, n: int) -> int:
        """Return the bytes that ``n`` tokens read, of which the first has ``depth`` tokens before it."""
        middle = depth + n // 2
        return n * (self._weights + sum(cache.bytes_read(middle, *self._types) for cache in self._caches))


def stats_of(native: GenerationStats, read_bytes: ReadBytes | None) -> Stats:
    """Return the core's figures as :class:`Stats`, with the bytes read if ``read_bytes`` is given."""
    n = max(0, native.n_tokens - 1)
    depth = native.n_prompt_tokens - native.n_dropped_tokens
    parts, reason = native.breakdown, native.stop_reason
    return Stats(
        prompt_tokens=native.n_prompt_tokens,
        tokens=native.n_tokens,
        prefill_s=native.prefill_s,
        decode_s=native.decode_s,
        time_to_first_token_s=native.time_to_first_token_s,
        stop_reason=None if reason is None else StopReason[reason.name.upper()],
        cached_tokens=native.n_cached_tokens,
        dropped_tokens=native.n_dropped_tokens,
        breakdown=Breakdown(
            tokens=n,
            wait_s=parts.wait_s,
            decode_s=parts.decode_s,
            sync_s=parts.sync_s,
            logits_s=parts.logits_s,
            sample_s=parts.sample_s,
            python_s=parts.python_s,
            text_s=parts.text_s,
            caller_s=parts.caller_s,
            graph_splits=parts.n_graph_splits,
            graphs_reused=parts.n_graphs_reused,
            major_page_faults=None if parts.n_major_page_faults < 0 else parts.n_major_page_faults,
            read_bytes=None if read_bytes is None else read_bytes(depth, n),
        ),
    )


class Stream:
    """A reply as it is made: an iterator of :class:`Token`.

    Each ``next()`` runs one step of the model, without the GIL. Leaving the loop, by
    ``break`` or by an exception, ends the stream; so does :meth:`close`, or leaving the
    ``with`` block. The model is usable afterwards, and :attr:`stats` stays readable.
    """

    def __init__(self, generation: Generation, read_bytes: ReadBytes) -> None:
        """Wrap a native generation; use :meth:`Model.stream`."""
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
        self._generation.close(NativeStopReason.interrupted if interrupted else NativeStopReason.closed)

    def close(self) -> None:
        """End the stream; a step that runs in another thread is cancelled. Idempotent."""
        self._generation.close(NativeStopReason.closed)

    @property
    def stats(self) -> Stats:
        """Counts and times of the stream so far."""
        return stats_of(self._generation.stats(), self._read_bytes)

    def __repr__(self) -> str:
        """Return the stats in brackets."""
        return f"<overspill.Stream {self.stats}>"


_Item = TypeVar("_Item", covariant=True)


class Closable(Protocol[_Item]):
    """An iterator that can be closed."""

    def __next__(self) -> _Item:
        """Return the next item, or raise ``StopIteration``."""

    def close(self) -> None:
        """End the iterator."""


def until_left(stream: Closable[_Item]) -> Iterator[_Item]:
    """Yield the stream's items, and close it when the loop is left."""
    try:
        while True:
            try:
                item = next(stream)
            except StopIteration:
                return
            yield item
    finally:
        stream.close()
