"""A stream of tokens, and its stats."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from overspill._core import ClosedError, Error, ExpertRecorder, Generation, GenerationStats, Model, SequenceState
from overspill._core import StopReason as NativeStopReason
from overspill.base.text import short_repr
from overspill.base.values import (
    Breakdown,
    CacheType,
    ExpertStats,
    Stats,
    StopReason,
    Token,
)
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import layer_caches

__all__ = [
    "CachedExperts",
    "Closable",
    "FullContext",
    "ReadBytes",
    "Replies",
    "Stream",
    "TracedExperts",
    "stats_of",
    "until_left",
]

logger = logging.getLogger("overspill")


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
            threads_left_out=parts.n_threads_left_out / n if n else 0.0,
            major_page_faults=None if parts.n_major_page_faults < 0 else parts.n_major_page_faults,
            read_bytes=None if read_bytes is None else read_bytes(depth, n),
        ),
    )


class TracedExperts:
    """The experts that a stream's tokens use, kept by the core until they are read."""

    def __init__(self, info: ModelInfo, n_ctx: int) -> None:
        """Take memory for ``n_ctx`` tokens; an :class:`Error` for a model without experts."""
        self._layers = info.expert_layers
        if not self._layers or not info.n_experts_used:
            raise Error(f"{info.name or info.architecture} has no experts: only a mixture of experts has")
        self.recorder = ExpertRecorder(max(self._layers) + 1, info.n_experts_used, n_ctx)

    def read(self) -> NDArray[np.uint16]:
        """Return them as :meth:`Stream.read_experts` does."""
        return self.recorder.read()[:, self._layers]


class CachedExperts:
    """What a model's cache of experts has answered since this was made."""

    def __init__(self, model: Model) -> None:
        """Begin to count."""
        self._model = model
        self._first = self._last = model.expert_counts()

    def stats(self) -> ExpertStats | None:
        """Return the counts; None without a cache, and the last ones seen of a model that is closed."""
        now = self._last = self._model.expert_counts() or self._last
        first = self._first
        if now is None or first is None:
            return None
        return ExpertStats(
            now.n_requests - first.n_requests,
            now.n_hits - first.n_hits,
            now.n_insertions - first.n_insertions,
            now.hit_bytes - first.hit_bytes,
            now.miss_bytes - first.miss_bytes,
            now.n_resident,
            now.n_slots,
            now.n_experts,
            now.is_off,
        )


class FullContext:
    """Warns, once for a model, whoever waited for a reply that nothing but the context ended."""

    def __init__(self, model: str, n_ctx: int) -> None:
        self._model, self._n_ctx, self._has_warned = model, n_ctx, False

    def check(self, stats: Stats) -> None:
        """Look at the stats of a reply without ``max_tokens``."""
        if stats.stop_reason is StopReason.CONTEXT_FULL and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: a reply of %d tokens ended as the context (n_ctx=%d) was full: max_tokens=... ends it earlier",
                self._model,
                stats.tokens,
                self._n_ctx,
            )


class Stream:
    """A reply as it is made: an iterator of :class:`Token`.

    Each ``next()`` runs one step of the model, without the GIL. Leaving the loop, by
    ``break`` or by an exception, ends the stream; so does :meth:`close`, or leaving the
    ``with`` block. The model is usable afterwards, and :attr:`stats` stays readable.
    """

    def __init__(
        self,
        generation: Generation,
        read_bytes: ReadBytes,
        experts: TracedExperts | None = None,
        cache: CachedExperts | None = None,
        context: FullContext | None = None,
        keep: Callable[[SequenceState], None] | None = None,
    ) -> None:
        """Wrap a native generation; use :meth:`Model.stream`.

        ``context`` is for a reply without ``max_tokens``, ``keep`` for what the KV cache has of the stream at its end.
        """
        self._context, self._keep = context, keep
        self._cache = cache
        self._generation = generation
        self._read_bytes = read_bytes
        self._experts = experts

    def __iter__(self) -> Iterator[Token]:
        """Yield the tokens; the stream is closed when the loop is left."""
        try:
            # Not `yield from`: that would hand `close()` through without our reason.
            for token in self._generation:  # noqa: UP028
                yield token
        except GeneratorExit:
            close_left(self)
            raise
        finally:
            self.close()

    def __next__(self) -> Token:
        """Return the next token, or raise ``StopIteration`` at the end."""
        if self._keep is None:
            return next(self._generation)
        try:
            return next(self._generation)
        except StopIteration:
            self._save()
            raise

    def _save(self) -> None:
        """Keep what the KV cache had at the end, once."""
        state = None if self._keep is None else self._generation.take_state()
        if state is not None and self._keep is not None:
            self._keep(state)

    def __enter__(self) -> Stream:
        """Return the stream itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._generation.close(NativeStopReason.interrupted if interrupted else NativeStopReason.closed)
        self._save()

    def close(self) -> None:
        """End the stream; a step that runs in another thread is cancelled. Idempotent."""
        self._generation.close(NativeStopReason.closed)
        self._save()

    def read_experts(self) -> NDArray[np.uint16]:
        """Return which experts each layer used for the tokens that were decoded since the last call.

        The first tokens are those of the prompt that were decoded, and not reused. The token that was sampled last has
        not been decoded yet, unless the stream was ahead of its caller.

        Returns
        -------
        numpy.ndarray
            uint16, of shape (tokens, layers with experts, experts of a token), the most probable first. 65535 stands
            where the CPU did not compute a layer's experts: on a GPU nobody sees them, and of a prompt llama.cpp
            computes in the last layer only the token whose logits are asked for.

        Raises
        ------
        Error
            The stream was opened without ``experts=True``.
        """
        if self._experts is None:
            raise Error("the stream keeps no experts: ask for them with stream(..., experts=True)")
        return self._experts.read()

    @property
    def stats(self) -> Stats:
        """Counts and times of the stream so far."""
        found = stats_of(self._generation.stats(), self._read_bytes)
        return found if self._cache is None else replace(found, experts=self._cache.stats())

    def _tell_of_full_context(self) -> None:
        """Warn of the whole reply if nothing but the context ended it; for calls that return all of it."""
        if self._context is not None:
            self._context.check(self.stats)

    def __repr__(self) -> str:
        """Return the stats in brackets."""
        return short_repr(self, str(self.stats))


class Replies:
    """The replies to many prompts, some at a time: an iterator of each as it ends, by its number."""

    def __init__(self, prompts: Sequence[list[int]], start: Callable[[list[int]], Generation], parallel: int) -> None:
        """Begin the first ones. ``start`` opens the stream of a prompt."""
        self._waiting = deque(enumerate(prompts))
        self._start, self._parallel = start, parallel
        self._open: deque[tuple[int, Generation, list[Token]]] = deque()
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        while self._waiting and len(self._open) < self._parallel:
            i, prompt = self._waiting.popleft()
            self._open.append((i, self._start(prompt), []))

    def __iter__(self) -> Iterator[tuple[int, list[Token], GenerationStats]]:
        """Yield the number of a prompt, the tokens of its reply, and the core's figures."""
        try:
            while self._open:
                i, stream, tokens = self._open[0]
                # Whoever waits for one decodes for all.
                token = next(stream, None)
                if token is not None:
                    tokens.append(token)
                    self._open.rotate(-1)
                    continue
                self._open.popleft()
                stats = stream.stats()
                if stats.stop_reason in _GIVEN_UP:
                    return
                try:
                    self._fill()
                except ClosedError:
                    return
                yield i, tokens, stats
        finally:
            self.close()

    def close(self) -> None:
        """End those that are open, and begin no others."""
        self._waiting.clear()
        while self._open:
            self._open.popleft()[1].close(NativeStopReason.closed)


_GIVEN_UP = (NativeStopReason.closed, NativeStopReason.interrupted)

_Item = TypeVar("_Item", covariant=True)


class Closable(Protocol[_Item]):
    """An iterator that can be closed."""

    def __next__(self) -> _Item:
        """Return the next item, or raise ``StopIteration``."""

    def close(self) -> None:
        """End the iterator."""


def close_left(stream: Closable[_Item]) -> None:
    """Close a stream whose loop was left: whoever leaves it hears of an error by the log alone."""
    try:
        stream.close()
    except Error as error:
        logger.warning("%s", error)


def until_left(stream: Closable[_Item]) -> Iterator[_Item]:
    """Yield the stream's items, and close it when the loop is left."""
    try:
        while True:
            try:
                item = next(stream)
            except StopIteration:
                return
            yield item
    except GeneratorExit:
        close_left(stream)
        raise
    finally:
        stream.close()
