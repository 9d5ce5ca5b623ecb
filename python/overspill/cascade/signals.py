"""Judgements of a small model's reply: by figures of its sampler, or by a function of the caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from overspill.base.checks import as_real, shown
from overspill.base.text import short_repr
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
    """The small model's whole reply, which escalations judge.

    ``logprobs`` and ``entropies`` have a figure for each of the answer's tokens: those of its text and of its tool
    calls. Reasoning and special tokens, such as the end, do not count.
    """

    text: str
    """The answer, without reasoning."""
    message: dict[str, Any]
    """The reply as a message of OpenAI's API, with ``reasoning_content`` and ``tool_calls`` if there are any."""
    stats: Stats
    """Speed, counts, and the ``stop_reason``, which shows whether the reply was cut off."""
    logprobs: tuple[float, ...] = ()
    """Natural logarithms of the tokens' probabilities before temperature and truncation, in nats, at most 0.
    Empty unless :func:`mean_logprob` is an escalation, or the option ``logprobs`` was given."""
    entropies: tuple[float, ...] = ()
    """Entropies of the distributions that the tokens were drawn from, in nats, 0 to ln n_vocab.
    Empty unless :func:`mean_entropy` is an escalation."""

    def __repr__(self) -> str:
        """Return the answer, or its beginning, and the stats in brackets."""
        return short_repr(self, f"{shown(self.text)}: {self.stats}")


class Judgement(NamedTuple):
    """A decision whether to ask the large model, and the reason in words."""

    escalate: bool
    reason: str

    def __repr__(self) -> str:
        """Return who answers and why, in brackets."""
        return short_repr(self, f"{'large' if self.escalate else 'small'}: {self.reason}")


Escalation: TypeAlias = Callable[[Draft], object]
"""A function that judges a :class:`Draft`. It returns a :class:`Judgement`, or whether to escalate, or the reason to
escalate as a text, which is empty if there is none."""


@dataclass(frozen=True, slots=True)
class Signal:
    """An escalation that compares the mean of a sampler's figure over the answer's tokens with a bound.

    A reply without an answer escalates too, such as one that was cut off amid the reasoning.
    """

    name: str
    figure: Literal["logprobs", "entropies"]
    """The field of :class:`Draft`."""
    bound: float
    """In nats."""
    side: Literal["below", "above"]
    """The side of the bound on which the large model is asked."""

    def __call__(self, draft: Draft) -> Judgement:
        """Return the judgement of a draft; its reason has the mean, the number of tokens and the bound."""
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
    """Return an escalation for answers whose tokens were improbable on average.

    The figure is ``1/n · Σ ln p(tokenᵢ)`` over the answer's n tokens, in nats. p is the model's own probability, before
    temperature and truncation. 0 is certainty; the negative is the logarithm of the perplexity, so the default bound
    is a perplexity of e = 2.72. It costs as much as ``stream(logprobs=True)``.

    The figure depends on the draw: at a high temperature, a model that is sure also gets improbable tokens.
    :func:`mean_entropy` does not depend on the draw.

    Parameters
    ----------
    below
        The bound, in nats; useful bounds are between -3 and 0.

    Raises
    ------
    ValueError, TypeError
        The bound is not a finite number.
    """
    return Signal("mean log-probability", "logprobs", _bound("below", below), "below")


def mean_entropy(*, above: float = 2.0) -> Signal:
    """Return an escalation for answers whose model was undecided between tokens on average.

    The figure is ``1/n · Σ Hᵢ`` over the answer's n tokens, in nats. ``Hᵢ = -Σ p ln p`` over the whole vocabulary is
    the entropy of the distribution that token i was drawn from, before temperature and truncation. 0 is certainty,
    and ln k a choice between k equal tokens; the default bound is a choice between e² = 7.4 of them.

    NumPy computes it from the logits of every token; those of the reasoning are dropped afterwards. That takes 0.25 ms
    a token at a vocabulary of 201,088, on one core of a recent x86 CPU. The model does not compute the next token
    meanwhile, nor while your code handles a token.

    Parameters
    ----------
    above
        The bound, in nats; useful bounds are between 0.5 and 4.

    Raises
    ------
    ValueError, TypeError
        The bound is not a finite number.
    """
    return Signal("mean entropy", "entropies", _bound("above", above), "above")


class EntropyMeter:
    """A sampler that measures the entropy of each token's logits, and leaves the choice to another sampler."""

    def __init__(self, sampler: TokenChooser | None) -> None:
        """Measure before ``sampler`` chooses; None stands for the stream's own sampler."""
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
    """Return the first judgement that escalates, or one that has the reasons of all against it."""
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
