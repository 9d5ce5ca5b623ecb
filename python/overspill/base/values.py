"""Types of what a model takes and gives: settings, tokens, stop reasons, stats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from overspill._core import Token
from overspill.base import html
from overspill.base.cached import absent_on_error
from overspill.base.checks import shown
from overspill.base.text import short_repr
from overspill.base.units import format_count, format_rate

__all__ = [
    "DEFAULT_CACHE_TYPE",
    "DEFAULT_KERNELS",
    "DEFAULT_LOAD_MODE",
    "DEFAULT_SWITCH",
    "Breakdown",
    "CacheType",
    "Completion",
    "Device",
    "ExpertStats",
    "Experts",
    "Kernels",
    "LoadMode",
    "LogitsProcessor",
    "MemoryUse",
    "Progress",
    "Stats",
    "StopReason",
    "Switch",
    "Token",
    "TokenChooser",
    "TokenMask",
    "is_given",
]

# The core's property raises an Error alone.
Token.logits = property(  # type: ignore[assignment, method-assign]
    absent_on_error(vars(Token)["logits"].fget), doc=Token.logits.__doc__
)

CacheType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Switch: TypeAlias = Literal["auto", "on", "off"]
Kernels: TypeAlias = Literal["auto", "llama.cpp"]
Experts: TypeAlias = Literal["auto", "static", "cached"]
LoadMode: TypeAlias = Literal["mmap", "read", "mlock", "mmap+mlock", "direct-io"]


class _Default(str):
    """The default of an argument: equal to the same value from a caller, and told apart from it."""

    __slots__ = ()


DEFAULT_CACHE_TYPE = cast(CacheType, _Default("f16"))
DEFAULT_SWITCH = cast(Switch, _Default("auto"))
DEFAULT_KERNELS = cast(Kernels, _Default("auto"))
DEFAULT_LOAD_MODE = cast(LoadMode, _Default("mmap"))


def is_given(argument: object) -> bool:
    """Tell whether a caller gave an argument, though it may have its default's value."""
    return argument is not None and not isinstance(argument, _Default)


Progress: TypeAlias = Callable[[float], bool | None]
TokenChooser: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.int32]], int | None]
"""A function of logits, float32 of shape (n_vocab,), and all tokens so far, int32. It returns the next token's id, or
None to leave it to the sampler."""
LogitsProcessor: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.int32]], None]
"""A function of the same arguments that edits the logits in place."""


@runtime_checkable
class TokenMask(Protocol):
    """A grammar for ``stream(grammar=...)`` in Python: it says which tokens may come next."""

    def allowed(self) -> NDArray[np.uint32] | NDArray[np.int32] | None:
        """Return one bit per token, set if it may come next, as for :meth:`Sampler.sample`; None allows all."""

    def accept(self, token: int) -> None:
        """Advance the grammar by ``token``."""


class StopReason(StrEnum):
    """The reason why a stream ended."""

    EOS = "eos"
    """The model produced an end-of-generation token."""
    STOP_STRING = "stop_string"
    """The reply came to one of the caller's stop strings, which is not part of the text."""
    MAX_TOKENS = "max_tokens"
    """The reply has ``max_tokens`` tokens."""
    CONTEXT_FULL = "context_full"
    """Prompt and reply fill the context (``n_ctx``)."""
    CLOSED = "closed"
    """The caller left the loop, closed the stream, or closed the model."""
    INTERRUPTED = "interrupted"
    """Ctrl-C, or another signal whose handler raised."""
    ERROR = "error"
    """An exception ended the stream; it reached the caller."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The seconds of each step of the decode loop, for all tokens after the first together.

    They are always counted, by the clock between the steps. The rest of a
    stream's ``decode_s`` is bookkeeping, handing a step from thread to thread, and clearing old turns away.
    """

    tokens: int = 0
    """The number of tokens after the first, whose time this is."""
    wait_s: float = 0.0
    """Waiting until the model's other streams had their batch."""
    decode_s: float = 0.0
    """``llama_decode``: the computation on a CPU, its launch on a GPU; with both, everything up to the last split."""
    sync_s: float = 0.0
    """Waiting for devices to finish."""
    logits_s: float = 0.0
    """Finding the row of logits; copying it where Python looks at it while other streams are decoded."""
    sample_s: float = 0.0
    """The sampler and the native grammar."""
    python_s: float = 0.0
    """Your functions that take part in choosing, and making the views for them."""
    text_s: float = 0.0
    """From token to text, stop strings included."""
    caller_s: float = 0.0
    """Your loop and Python's call, between a token and the next ``next()``. It is not part of the stream's time, and
    hidden behind the next step if the stream looks ahead."""
    graph_splits: int = 0
    """The pieces of one token's graph, each computed by one device; every other piece is a change of device."""
    graphs_reused: int = 0
    """The number of tokens for which llama.cpp used the last graph again."""
    threads_left_out: float = 0.0
    """The mean number of CPU threads that did not decode, since other programs had their cores."""
    major_page_faults: int | None = None
    """The page faults of the whole process meanwhile, which read weights from the disk again if RAM is short. None if
    the system does not tell, and for prompts that were decoded together."""
    read_bytes: int | None = None
    """The bytes of weights and KV cache that these tokens read, from the header: only the experts in use, and the
    filled part of the cache. None for prompts that were decoded together, which share their reads."""

    @property
    def gigabytes_per_s(self) -> float | None:
        """``read_bytes`` over the time of ``llama_decode`` and of waiting for it, in 10^9 bytes a second."""
        seconds = self.decode_s + self.sync_s
        return self.read_bytes / seconds / 1e9 if self.read_bytes and seconds > 0 else None

    def __str__(self) -> str:
        """Return microseconds a token, such as ``decode 11234.0 · sync 0.2 · ... µs a token · 20.1 GB/s``."""
        if self.tokens == 0:
            return "no token after the first"
        names = ("wait", "decode", "sync", "logits", "sample", "python", "text", "caller")
        parts = [f"{name} {getattr(self, f'{name}_s') / self.tokens * 1e6:.1f}" for name in names]
        rate = self.gigabytes_per_s
        return " · ".join(
            [
                f"{' · '.join(parts)} µs a token",
                *([format_rate(rate * 1e9)] if rate is not None else []),
                format_count(self.graph_splits, "graph split"),
                *([f"{self.major_page_faults} page faults"] if self.major_page_faults else []),
            ]
        )

    def __repr__(self) -> str:
        """Return that line in brackets."""
        return short_repr(self, str(self))


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """What a cache of experts on GPUs answered, of the tokens that the model decoded one by one.

    Counts are of the model's tokens since the stream began, those of other streams among them.
    """

    requests: int
    """Experts that tokens used, in all layers."""
    hits: int
    """Of those, experts that a GPU computed."""
    insertions: int
    """Experts that were copied into the cache."""
    hit_bytes: int
    """Bytes of experts that were read from GPUs' memory."""
    miss_bytes: int
    """Bytes of experts that were read from RAM."""
    resident: int
    """Experts that are in the cache now."""
    slots: int
    """Experts that it has room for."""
    experts: int
    """Experts of all layers that it is for."""
    is_off: bool
    """Whether it is not used any more, since decoding was measured to be faster without."""

    @property
    def hit_share(self) -> float | None:
        """Hits per request; None before the first."""
        return self.hits / self.requests if self.requests else None


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts and times of a stream so far.

    Times are in seconds. They do not include the caller's own time between two tokens.
    """

    prompt_tokens: int
    """Tokens in the prompt, special ones included."""
    tokens: int
    """Tokens of the reply, the end-of-generation token included."""
    prefill_s: float
    """Time spent on the prompt."""
    decode_s: float
    """Time spent on every token after the first."""
    time_to_first_token_s: float | None
    """Time of the prompt and the first draw; None before the first token."""
    stop_reason: StopReason | None
    """None while the stream is open."""
    cached_tokens: int = 0
    """Tokens of the prompt that the stream before had decoded; see ``stream(reuse=True)``."""
    dropped_tokens: int = 0
    """Tokens of old turns that were forgotten to make room; see ``chat(on_full="shift")``."""
    breakdown: Breakdown = Breakdown()
    """The parts of ``decode_s``."""
    experts: ExpertStats | None = None
    """What a cache of experts answered; None without one."""

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens after the first over ``decode_s``; None before the second."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else None

    def __str__(self) -> str:
        """Return one line, such as ``5.01 tok/s · 1447 tokens · 1.25 s to first token · stop: eos``."""
        speed, first = self.tokens_per_second, self.time_to_first_token_s
        parts = [
            f"{speed:.2f} tok/s" if speed is not None else "– tok/s",
            format_count(self.tokens, "token"),
            f"{first:.2f} s to first token" if first is not None else "no first token",
            *([f"{share:.0%} of experts on the GPU"] if (share := self.experts and self.experts.hit_share) else []),
            *([f"{self.cached_tokens} cached"] if self.cached_tokens else []),
            *([f"{self.dropped_tokens} dropped"] if self.dropped_tokens else []),
            *([f"busy CPU: {left:.1f} threads left out"] if (left := self.breakdown.threads_left_out) >= 0.1 else []),
            f"stop: {self.stop_reason}" if self.stop_reason is not None else "running",
        ]
        return " · ".join(parts)

    def __repr__(self) -> str:
        """Return that line in brackets."""
        return short_repr(self, str(self))


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole reply; ``str()`` gives its text."""

    text: str
    tokens: list[Token]
    stats: Stats

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def __repr__(self) -> str:
        """Return the text, or its beginning, and the stats in brackets."""
        return short_repr(self, f"{shown(self.text)}: {self.stats}")

    def _repr_html_(self) -> str:
        """Return the text and the stats, for a notebook."""
        return html.passage(self.text) + html.lines([str(self.stats)])


@dataclass(frozen=True, slots=True)
class Device:
    """A device that llama.cpp can compute on."""

    name: str
    """llama.cpp's name for it, such as ``CUDA0`` or ``CPU``."""
    description: str
    """The hardware's own name."""
    kind: Literal["cpu", "gpu", "integrated_gpu", "accelerator"]
    backend: str
    """The backend that drives it, such as ``CUDA``, ``RPC`` or ``CPU``."""
    free_bytes: int
    """Free memory now; host RAM for a CPU. 0 where the backend does not tell."""
    total_bytes: int
    registers_host_memory: bool = False
    """Whether its driver can be told of weights in RAM, which it then copies as fast as pinned memory."""

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU, integrated or of an RPC server too."""
        return self.kind in ("gpu", "integrated_gpu")


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The bytes that a model takes of a device's memory."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    pinned_bytes: int = field(default=0, kw_only=True)
    """Of mapped weights in RAM, those that a GPU copies at the full speed of its link."""
    pinning: str = field(default="", kw_only=True)
    """How far they are registered with its driver, in words; empty if they are not to be."""

    @property
    def total_bytes(self) -> int:
        """The sum of the three."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes
