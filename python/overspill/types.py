"""The values that a stream and a model hand out: tokens, stop reasons, stats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from overspill._core import Token

__all__ = ["Completion", "Device", "LoadMode", "Offload", "Progress", "Stats", "StopReason", "Token"]

Offload: TypeAlias = Literal["auto", "cpu", "gpu"] | int
LoadMode: TypeAlias = Literal["mmap", "read", "mlock", "mmap+mlock", "direct-io"]
Progress: TypeAlias = Callable[[float], bool | None]


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

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens after the first over ``decode_s``; None before the second."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else None

    def __str__(self) -> str:
        """Return one line, such as ``5.01 tok/s · 1447 tokens · 1.25 s to first token · stop: eos``."""
        speed, first = self.tokens_per_second, self.time_to_first_token_s
        parts = [
            f"{speed:.2f} tok/s" if speed is not None else "– tok/s",
            f"{self.tokens} token{'' if self.tokens == 1 else 's'}",
            f"{first:.2f} s to first token" if first is not None else "no first token",
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
