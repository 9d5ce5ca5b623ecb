"""What tells that a small model failed: signals of its sampler, and their judgement of a draft."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from overspill.base.checks import as_real
from overspill.base.units import format_count
from overspill.base.values import Stats, TokenChooser

__all__ = [
    "Draft",
    "EntropyMeter",
    "Escalation",
    "Judgement",
    "Signal",
    "judge",
    "mean_entropy",
    "mean_logprob",
]


@dataclass(frozen=True, slots=True)
class Draft:
    """What the small model replied, to be judged.

    The answer's tokens are those of its text and of its calls of tools: from the first that shows some of it on,
    without reasoning, and without special tokens such as the end.
    """

    text: str
    """The answer, without reasoning."""
    message: dict[str, Any]
    """The reply as a message of OpenAI's API, with ``reasoning_content`` and ``tool_calls`` if there are any."""
    stats: Stats
    """Its ``stop_reason`` tells a reply that was cut off."""
    logprobs: tuple[float, ...] = ()
    """For each of the answer's tokens the natural logarithm of its probability, in nats, at most 0, before temperature
    and truncation. Empty unless :func:`mean_logprob` is an escalation, or ``logprobs`` was said."""
    entropies: tuple[float, ...] = ()
    """The same of the entropy, in nats, from 0 to ln n_vocab; empty unless :func:`mean_entropy` is an escalation."""


class Judgement(NamedTuple):
    """Whether the large model is to be asked, and why, in words."""

    escalate: bool
    reason: str


Escalation: TypeAlias = Callable[[Draft], object]
"""Judges a :class:`Draft`: returns whether to escalate, or the reason as a text (an empty one: no), or a
:class:`Judgement`."""


@dataclass(frozen=True, slots=True)
class Signal:
    """An escalation by what the sampler knew: the mean of a figure over the answer's tokens, and a bound for it.

    A reply without an answer, such as one that was cut off while the model was reasoning, escalates too.
    """

    name: str
    figure: Literal["logprobs", "entropies"]
    """The field of :class:`Draft`."""
    bound: float
    """In nats."""
    side: Literal["below", "above"]
    """On which side of the bound the large model is asked."""

    def __call__(self, draft: Draft) -> Judgement:
        """Judge a draft."""
        values: tuple[float, ...] = getattr(draft, self.figure)
        if not values:
            return Judgement(True, f"there is no answer, the reply ended with {draft.stats.stop_reason}")
        mean = math.fsum(values) / len(values)
        escalate = mean < self.bound if self.side == "below" else mean > self.bound
        is_or_not = "is" if escalate else "is not"
        n = format_count(len(values), "token")
        return Judgement(
            escalate, f"{self.name} {mean:.3g} nats over {n} {is_or_not} {self.side} {self.bound:.3g} nats"
        )


def _bound(name: str, value: float) -> float:
    bound = as_real(name, value)
    if not math.isfinite(bound):
        raise ValueError(f"{name} must be a finite number of nats, not {value}")
    return bound


def mean_logprob(*, below: float = -1.0) -> Signal:
    """Escalate where the answer's tokens were improbable on average.

    The figure is ``1/n · Σ ln p(tokenᵢ)`` over the answer's n tokens, in nats: 0 is certainty, and its negative is the
    logarithm of the perplexity, so that the default asks the large model from a perplexity of e = 2.72 on. p is the
    model's own probability, before temperature and truncation. It costs what ``stream(logprobs=True)`` costs.

    It tells what was drawn: at a high temperature, improbable tokens are drawn also by a model that is sure.
    :func:`mean_entropy` does not depend on the draw.

    Parameters
    ----------
    below
        The bound, in nats; useful ones lie between -3 and 0.
    """
    return Signal("mean log-probability", "logprobs", _bound("below", below), "below")


def mean_entropy(*, above: float = 2.0) -> Signal:
    """Escalate where the model was undecided between tokens on average.

    The figure is ``1/n · Σ Hᵢ`` over the answer's n tokens, in nats, with ``Hᵢ = -Σ p ln p`` over the whole vocabulary:
    the exact entropy of the distribution that token i was drawn from, before temperature and truncation. 0 is
    certainty, ln k the choice between k equal tokens; the default is a choice between e² = 7.4 of them.

    It is computed by numpy from the logits, reasoning included, since only what follows tells where that ends. That
    takes 0.25 ms a token at a vocabulary of 201,088 on one core of a recent x86 CPU, and the next token is not worked
    on while yours is busy.

    Parameters
    ----------
    above
        The bound, in nats; useful ones lie between 0.5 and 4.
    """
    return Signal("mean entropy", "entropies", _bound("above", above), "above")


class EntropyMeter:
    """A sampler that measures the entropy of each token's logits, and leaves the choice to another one."""

    def __init__(self, sampler: TokenChooser | None) -> None:
        """Stand before ``sampler``; None: before the sampler of the stream."""
        self._sampler = sampler
        self._work: NDArray[np.float32] | None = None
        self.latest = 0.0
        """Entropy of the latest logits, in nats."""

    def __call__(self, logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> int | None:
        """Return the other sampler's choice, or None if there is none."""
        if self._work is None:
            self._work = np.empty((2, logits.size), np.float32)
        shifted, weights = self._work
        np.subtract(logits, logits.max(), out=shifted)
        np.maximum(shifted, -100, out=shifted)  # 4e-44 of the largest; a forbidden token's -inf would make NaN of 0
        np.exp(shifted, out=weights)
        total = float(weights.sum())
        self.latest = math.log(total) - float(weights @ shifted) / total
        return None if self._sampler is None else self._sampler(logits, tokens)


def judge(escalations: Sequence[Escalation], draft: Draft) -> Judgement:
    """Return the first judgement that asks for the large model, or else all of them in one."""
    reasons = []
    for escalation in escalations:
        answer = escalation(draft)
        name = getattr(escalation, "__name__", repr(escalation))
        if isinstance(answer, Judgement):
            judgement = answer
        elif isinstance(answer, str):
            judgement = Judgement(bool(answer), answer or f"{name} found nothing wrong")
        else:
            judgement = Judgement(bool(answer), f"{name} {'asked for it' if answer else 'found nothing wrong'}")
        if judgement.escalate:
            return judgement
        reasons.append(judgement.reason)
    return Judgement(False, "; ".join(reasons))
