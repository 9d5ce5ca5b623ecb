"""Types of what a model takes and gives: settings, tokens, stop reasons, stats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from overspill._core import Token
from overspill.base.units import format_count, format_rate

__all__ = [
    "DEFAULT_CACHE_TYPE",
    "DEFAULT_LOAD_MODE",
    "DEFAULT_SWITCH",
    "Breakdown",
    "CacheType",
    "Completion",
    "Device",
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

CacheType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Switch: TypeAlias = Literal["auto", "on", "off"]
LoadMode: TypeAlias = Literal["mmap", "read", "mlock", "mmap+mlock", "direct-io"]


class _Default(str):
    """The default of an argument: equal to the same value from a caller, and told apart from it."""

    __slots__ = ()


DEFAULT_CACHE_TYPE = cast(CacheType, _Default("f16"))
DEFAULT_SWITCH = cast(Switch, _Default("auto"))
DEFAULT_LOAD_MODE = cast(LoadMode, _Default("mmap"))


def is_given(argument: object) -> bool:
    """Tell whether a caller gave an argument, though it may have its default's value."""
    return argument is not None and not isinstance(argument, _Default)


Progress: TypeAlias = Callable[[float], bool | None]
TokenChooser: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.int32]], int | None]
"""Given logits, float32 of shape (n_vocab,), and all tokens so far, returns the next one, or None for the sampler's."""
LogitsProcessor: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.int32]], None]
"""The same, but it only edits the logits in place."""


@runtime_checkable
class TokenMask(Protocol):
    """Says which tokens may come next: what ``stream(grammar=...)`` takes besides GBNF."""

    def allowed(self) -> NDArray[np.uint32] | NDArray[np.int32] | None:
        """Return one bit per token, as :meth:`Sampler.sample` takes them; None allows all."""

    def accept(self, token: int) -> None:
        """Take note that ``token`` has come."""


class StopReason(StrEnum):
    """Why a stream ended."""

    EOS = "eos"
    """The model produced an end-of-generation token."""
    STOP_STRING = "stop_string"
    """One of the caller's stop strings came up; it is not part of the text."""
    MAX_TOKENS = "max_tokens"
    """As many tokens as were asked for."""
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
    """Where the time of the tokens after the first went: seconds of all of them together.

    It is always counted, by the clock between the loop's steps. What is not named here of a stream's ``decode_s`` is
    bookkeeping, handing a step from thread to thread, and clearing old turns away.
    """

    tokens: int = 0
    """Whose time this is: all but the first."""
    wait_s: float = 0.0
    """Until the model's other streams had their turn."""
    decode_s: float = 0.0
    """``llama_decode``: on a CPU the computation, on a GPU its launch; with both, all up to the last piece."""
    sync_s: float = 0.0
    """Waiting for devices to finish."""
    logits_s: float = 0.0
    """Finding the row of logits. It is not copied."""
    sample_s: float = 0.0
    """Sampler and native grammar."""
    python_s: float = 0.0
    """Functions of yours that take part in choosing, with the views made for them."""
    text_s: float = 0.0
    """From token to text, stop strings included."""
    caller_s: float = 0.0
    """Between a token and the question for the next: your loop and Python's call. Not part of the stream's time, and
    hidden behind the next step where the stream looks ahead."""
    graph_splits: int = 0
    """Pieces of the graph of one token, each computed by one device; every other one is a change of device."""
    graphs_reused: int = 0
    """Tokens for which llama.cpp did not have to build the graph anew."""
    major_page_faults: int | None = None
    """Of the whole process meanwhile: weights that had to be read from the disk again, as RAM is short. None where the
    system does not tell, and for prompts that were decoded together."""
    read_bytes: int | None = None
    """Weights and KV cache that these tokens read, from the header: of the experts those used, of the cache what was
    filled. None for prompts that were decoded together, which share what is read."""

    @property
    def gigabytes_per_s(self) -> float | None:
        """What is read over the time of ``llama_decode`` and of waiting for it, in 10^9 bytes a second."""
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


@dataclass(frozen=True, slots=True)
class Stats:
    """What a stream did so far, and how fast.

    Times count only what the stream itself spent, in seconds: what the caller does
    between two tokens is not in them.
    """

    prompt_tokens: int
    """Tokens in the prompt, special ones included."""
    tokens: int
    """Tokens that came out, the end-of-generation token included."""
    prefill_s: float
    """Time spent on the prompt."""
    decode_s: float
    """Time spent on every token after the first."""
    time_to_first_token_s: float | None
    """Prefill and the first draw; None before the first token."""
    stop_reason: StopReason | None
    """None while the stream is open."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not decoded again, as the stream before had them; see ``stream(reuse=True)``."""
    dropped_tokens: int = 0
    """Tokens of old turns that were forgotten to make room; see ``chat(on_full="shift")``."""
    breakdown: Breakdown = Breakdown()
    """What ``decode_s`` was spent on."""

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
            *([f"{self.cached_tokens} cached"] if self.cached_tokens else []),
            *([f"{self.dropped_tokens} dropped"] if self.dropped_tokens else []),
            f"stop: {self.stop_reason}" if self.stop_reason is not None else "running",
        ]
        return " · ".join(parts)


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole reply: a stream, folded. ``str()`` gives its text."""

    text: str
    tokens: list[Token]
    stats: Stats

    def __str__(self) -> str:
        """Return the text."""
        return self.text


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

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU, an integrated one or a device of an RPC server too."""
        return self.kind in ("gpu", "integrated_gpu")


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a model takes of a device's memory."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes
