"""Greedy replies of one prompt that was decoded in different batches, which round differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Chosen(Protocol):
    """A token that was chosen, with the most likely ones (``logprobs=5`` and more)."""

    @property
    def id(self) -> int:
        """Return its number."""

    @property
    def top_logprobs(self) -> tuple[tuple[int, float], ...]:
        """Return ids and log-probabilities."""


# Twice as much as llama.cpp's own log-probabilities move when a long prompt is cut into other batches: Gemma 3 270M,
# 600 tokens, n_batch=512 against 510, on a CPU with AVX-512.
NATS = 1.0


def is_same(one: Sequence[Chosen], other: Sequence[Chosen], nats: float = NATS) -> bool:
    """Return whether all tokens are the same; assert that where they part, both were about as likely."""
    for mine, yours in zip(one, other, strict=False):
        if mine.id != yours.id:
            for odds in (dict(mine.top_logprobs), dict(yours.top_logprobs)):
                assert mine.id in odds and yours.id in odds, "one of them was not even likely"  # noqa: PT018
                assert abs(odds[mine.id] - odds[yours.id]) < nats
            return False
    assert len(one) == len(other)
    return True
