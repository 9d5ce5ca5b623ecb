"""Two models that answer together: the small one, and the large one where the small one fails."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from overspill import _core
from overspill.base.checks import as_real
from overspill.base.units import format_bytes, format_count, parse_bytes
from overspill.base.values import Stats, StopReason, Token, TokenChooser
from overspill.engine.chat import Channel, ChatStream, ChatToken, Message, ToolCall
from overspill.engine.model import Model
from overspill.engine.stream import Stream, until_left
from overspill.header.info import ModelInfo
from overspill.hub import resolve
from overspill.machine.devices import add_rpc_server
from overspill.machine.hardware import Hardware
from overspill.placement.device_names import CPU
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast, forecast
from overspill.planning.plan import plan
from overspill.sampling.sampler import Sampler

__all__ = [
    "Cascade",
    "CascadeStats",
    "CascadeStream",
    "CascadeToken",
    "Draft",
    "Escalation",
    "Judgement",
    "Signal",
    "mean_entropy",
    "mean_logprob",
]

Which: TypeAlias = Literal["small", "large"]
_BOTH: tuple[Which, Which] = ("small", "large")

# --- when the large model is asked


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


class _EntropyMeter:
    """A sampler that looks at the logits, and leaves the choice to the one that it stands before."""

    def __init__(self, sampler: TokenChooser | None) -> None:
        self._sampler = sampler
        self._work: NDArray[np.float32] | None = None
        self.latest = 0.0

    def __call__(self, logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> int | None:
        if self._work is None:
            self._work = np.empty((2, logits.size), np.float32)
        shifted, weights = self._work
        np.subtract(logits, logits.max(), out=shifted)
        np.maximum(shifted, -100, out=shifted)  # 4e-44 of the largest; a forbidden token's -inf would make NaN of 0
        np.exp(shifted, out=weights)
        total = float(weights.sum())
        self.latest = math.log(total) - float(weights @ shifted) / total
        return None if self._sampler is None else self._sampler(logits, tokens)


def _judge(escalations: Sequence[Escalation], draft: Draft) -> Judgement:
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


# --- what comes out


@dataclass(frozen=True, slots=True)
class CascadeToken:
    """A token, and whose; ``str()`` gives its text."""

    token: Token | ChatToken
    """As :meth:`Model.stream` or :meth:`Model.chat` gave it."""
    model: Which
    restarted: bool = False
    """Whether the answer starts anew here: what came before was a draft, and does not count. Only with
    ``show_draft``, and only on the first token of the large model."""

    @property
    def id(self) -> int:
        """Its number in the vocabulary of its model."""
        return self.token.id

    @property
    def text(self) -> str:
        """The text that it completes."""
        return self.token.text

    @property
    def channel(self) -> Channel:
        """What it is a part of; of a stream that is no chat, the answer."""
        return self.token.channel if isinstance(self.token, ChatToken) else Channel.FINAL

    @property
    def logprob(self) -> float | None:
        """Natural logarithm of its probability; None if nobody asked."""
        return self.token.logprob

    @property
    def top_logprobs(self) -> tuple[tuple[int, float], ...]:
        """The most likely tokens and the logarithms of their probabilities, best first; empty unless asked for."""
        return self.token.top_logprobs

    @property
    def tool_call(self) -> ToolCall | None:
        """A whole call of a tool, on the token that completes it."""
        return self.token.tool_call if isinstance(self.token, ChatToken) else None

    def __str__(self) -> str:
        """Return the text."""
        return self.text


@dataclass(frozen=True, slots=True)
class CascadeStats:
    """Who answered and why, and what each model did."""

    answered_by: Which | None
    """None while the small model's reply has not been judged, or if it never was."""
    reason: str
    """In words, with the figure that was decisive."""
    small: Stats
    large: Stats | None
    """None if it was not asked."""
    loading_s: float
    """Time spent loading models for this reply, which happens where there is memory for one at a time."""

    def __str__(self) -> str:
        """Return who and why, and a line for each model."""
        who = "not judged yet" if self.answered_by is None else f"the {self.answered_by} model answered: {self.reason}"
        loading = [f"loading: {self.loading_s:.2f} s"] if self.loading_s else []
        large = [] if self.large is None else [f"large: {self.large}"]
        return "\n".join([who, f"small: {self.small}", *large, *loading])


class CascadeStream:
    """A reply of one of two models: iterate over it to get :class:`CascadeToken` after token.

    It can be left and closed as :class:`Stream` can. One thread at a time may ask for tokens, any may close.
    """

    def __init__(
        self,
        cascade: Cascade,
        start: Callable[[Model, Mapping[str, Any]], Stream | ChatStream],
        options: Mapping[str, Any],
        show_draft: bool,
    ) -> None:
        """Open the small model's stream; :meth:`Cascade.chat` and :meth:`Cascade.stream` make these."""
        self._cascade, self._start, self._options, self._show_draft = cascade, start, options, show_draft
        self._is_over = False
        self._loading_s = 0.0
        self._judgement: Judgement | None = None
        self._draft: Draft | None = None
        self._large: Stream | ChatStream | None = None
        self._meter: _EntropyMeter | None = None
        self._text = ""
        self._ready: deque[CascadeToken] = deque()
        self._held: list[CascadeToken] = []
        self._is_draft_shown = False
        self._n_measured = 0
        self._logprobs: list[float] = []
        self._entropies: list[float] = []
        self._current: Stream | ChatStream | None = None
        try:
            self._small_model = self._load("small")
            self._small = start(self._small_model, self._watched(options))
        except BaseException:
            self._is_over = True
            raise
        self._current = self._small

    def _watched(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options for a reply that is to be judged."""
        figures = {one.figure for one in self._cascade.escalations if isinstance(one, Signal)}
        watched = dict(options)
        if "logprobs" in figures and not watched.get("logprobs"):
            watched["logprobs"] = True
        if "entropies" in figures:
            watched["sampler"] = self._meter = _EntropyMeter(watched.get("sampler"))
        return watched

    def _load(self, which: Which) -> Model:
        start = time.perf_counter()
        model, was_loaded = self._cascade._take(which, self)
        if was_loaded:
            self._loading_s += time.perf_counter() - start
        return model

    # --- iterating

    def __iter__(self) -> Iterator[CascadeToken]:
        """Yield the tokens; the stream is closed when the loop is left."""
        return until_left(self)

    def __next__(self) -> CascadeToken:
        """Return the next token, or raise ``StopIteration`` at the end."""
        try:
            while not self._is_over:
                if self._ready:
                    return self._ready.popleft()
                self._step()
        except _core.CancelledError:
            if not self._is_over:
                raise
        except BaseException:
            self._is_over = True
            raise
        raise StopIteration

    def __enter__(self) -> CascadeStream:
        """Return the stream itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        self._is_over = True
        if self._current is not None:
            self._current.__exit__(kind, error, traceback)

    def close(self) -> None:
        """End the stream; a step that runs in another thread is cancelled, and so is loading. Idempotent."""
        self._is_over = True
        if self._current is not None:
            self._current.close()

    def _step(self) -> None:
        """Take a token from the model whose turn it is, or see what follows where there is none."""
        assert self._current is not None
        one = next(cast("Iterator[Token | ChatToken]", self._current), None)
        if one is None:
            if self._judgement is None:
                self._judge()
            else:
                self._is_over = True
            return
        if self._large is not None:
            token = CascadeToken(one, "large", restarted=self._is_draft_shown)
            self._is_draft_shown = False
            self._ready.append(token)
        else:
            token = CascadeToken(one, "small")
            self._measure(token)
            self._is_draft_shown = self._show_draft
            (self._ready if self._show_draft else self._held).append(token)
        if token.channel is Channel.FINAL:
            self._text += token.text

    def _measure(self, token: CascadeToken) -> None:
        """Keep the figures of one of the answer's tokens, see :class:`Draft`."""
        # A chat's token may come in parts, of which the first has the figures.
        n_tokens = self._small.stats.tokens
        is_new, self._n_measured = n_tokens > self._n_measured, n_tokens
        has_begun = bool(self._logprobs or self._entropies or token.text)
        if not is_new or not has_begun or token.channel is Channel.REASONING:
            return
        if not self._small_model.token_bytes(token.id, special=False):
            return
        if token.logprob is not None:
            self._logprobs.append(token.logprob)
        if self._meter is not None:
            self._entropies.append(self._meter.latest)

    def _judge(self) -> None:
        stats = self._small.stats
        if stats.stop_reason in (StopReason.CLOSED, StopReason.INTERRUPTED):
            self._is_over = True
            return
        figures = tuple(self._logprobs), tuple(self._entropies)
        self._draft = Draft(self._text, self._message(self._small), stats, *figures)
        judgement = _judge(self._cascade.escalations, self._draft)
        if judgement.escalate:
            self._held.clear()
            self._large = self._current = self._start(self._load("large"), self._options)
            self._text = ""
            if self._is_over:
                self._large.close()
        else:
            self._ready.extend(self._held)
        self._judgement = judgement

    def _message(self, stream: Stream | ChatStream) -> dict[str, Any]:
        return stream.message if isinstance(stream, ChatStream) else {"role": "assistant", "content": self._text}

    # --- what came of it

    @property
    def draft(self) -> Draft | None:
        """What the small model said, also if the large one answered then; None until it has been said."""
        return self._draft

    @property
    def message(self) -> dict[str, Any]:
        """The answer so far as a message, to be added to a conversation; empty content while nobody answers yet."""
        if self._judgement is None or self._draft is None:
            return {"role": "assistant", "content": ""}
        return self._draft.message if self._large is None else self._message(self._large)

    @property
    def stats(self) -> CascadeStats:
        """Who answers, why, and what both did so far."""
        judged = self._judgement
        who: Which | None = None if judged is None else "large" if judged.escalate else "small"
        large = None if self._large is None else self._large.stats
        return CascadeStats(who, "" if judged is None else judged.reason, self._small.stats, large, self._loading_s)

    def __repr__(self) -> str:
        """Return the stats in brackets."""
        return f"<overspill.CascadeStream {self.stats}>"


# --- the two models


class Cascade:
    """A small model that answers, and a large one that is asked where the small one fails.

    >>> cascade = overspill.Cascade("gpt-oss-20b.gguf", "gpt-oss-120b.gguf", overspill.mean_logprob(below=-1.0))
    >>> with cascade.chat("Why is the sky blue?") as reply:
    ...     for token in reply:
    ...         print(token, end="", flush=True)
    >>> print(reply.stats)  # who answered and why, and how fast

    The small model's reply is held back until it has been judged, so that whoever joins the tokens has one answer, and
    code for ``model.chat`` does as it did: half an answer, and then another one, would go unnoticed into files and
    conversations. An answer of the small model comes all at once then. ``show_draft=True`` gives its tokens out as they
    are made; where the large model is asked after all, its first token says that the answer starts anew
    (:attr:`CascadeToken.restarted`). Either way :attr:`CascadeStream.draft` keeps what the small model said.

    Parameters
    ----------
    small, large
        GGUF files, as :class:`Model` takes them, or loaded models. The cascade closes those that it loaded.
    escalate
        When the large model is asked: :func:`mean_logprob`, :func:`mean_entropy`, a function of yours from a
        :class:`Draft` to ``True``, ``False`` or a reason in words, or a sequence of these, of which one is enough.
    memory
        How much of a device's memory both models together may use, as in ``{"gpu": "20GiB", "cpu": "100GiB"}``.
        Default: what is free. Of two files, both are loaded if forecasts say that there is room for both, else one at a
        time: the large one at first need, after the small one was closed, and back for the next question.
        :attr:`budget` says which and why.
    **options
        Those of :class:`Model`, for both files.

    Raises
    ------
    ModelLoadError, OutOfMemoryError, Error, ValueError, TypeError
        As for :class:`Model`; of the large file at once, too, even if it is not loaded yet, as far as its header tells.
    """

    def __init__(
        self,
        small: str | os.PathLike[str] | Model,
        large: str | os.PathLike[str] | Model,
        escalate: Escalation | Sequence[Escalation] | None = None,
        *,
        memory: Mapping[str, int | str] | None = None,
        **options: Any,
    ) -> None:
        """Load the small model, and the large one if there is room for both."""
        given = [mean_logprob()] if escalate is None else escalate if isinstance(escalate, Sequence) else [escalate]
        if not given or not all(map(callable, given)):
            raise TypeError(
                "escalate must be a function of a draft, such as overspill.mean_logprob(below=-1.0), or several, "
                f"not {escalate!r}"
            )
        self.escalations: Sequence[Escalation] = tuple(given)
        """What judges the small model's replies, in order."""
        self.keeps_both = True
        """Whether both models are in memory; otherwise one at a time."""
        self.budget = ""
        """Why, in words."""
        self._options = options
        self._memory = dict(memory or {})
        self._lock = threading.Lock()
        self._closed = False
        self._streams: weakref.WeakSet[CascadeStream] = weakref.WeakSet()
        self.models: dict[Which, Model] = {}
        """Those that are loaded."""
        self._paths: dict[Which, Path] = {}
        for which, one in zip(_BOTH, (small, large), strict=True):
            if isinstance(one, Model):
                self.models[which] = one
            else:
                self._paths[which] = resolve(one) if isinstance(one, str) else Path(one)
        if len(self._paths) == 2:
            self._plan_budget()
        else:
            self.budget = "a model that was given loaded stays so"
        try:
            self._load_first()
        except BaseException:
            self.close()
            raise

    def _load_first(self) -> None:
        for which in _BOTH if self.keeps_both else _BOTH[:1]:
            if which in self.models:
                continue
            try:
                self.models[which] = self._load(which)
            except _core.OutOfMemoryError as error:
                # A forecast that was too good is no reason to give up.
                if which == "small" or len(self._paths) < 2:
                    raise
                self.keeps_both, self.budget = False, f"one model at a time: {error}"

    def _plan_budget(self) -> None:
        """Forecast whether both files fit here; speeds do not matter, so nothing is measured."""
        for endpoint in self._options.get("rpc", ()):
            add_rpc_server(endpoint)
        small, large = (ModelInfo.from_file(self._paths[which]) for which in _BOTH)
        hardware = Hardware.here(small, memory=self._memory, n_threads=self._options.get("n_threads"), measure=False)
        self.keeps_both, self.budget = fit_together(small, large, hardware, self._options)

    def _load(self, which: Which, user: CascadeStream | None = None) -> Model:
        memory = dict(self._memory)
        if memory and self.models:
            hardware = Hardware.here(memory=memory, measure=False)
            for name, size in memory.items():
                device = hardware.device(name).name
                used = sum(model.memory[device].total_bytes for model in self.models.values() if device in model.memory)
                memory[name] = max(0, parse_bytes(f"memory[{name!r}]", size) - used)
        options = dict(self._options)
        report = options.pop("progress", None)
        if user is not None or report is not None:
            options["progress"] = lambda share: (
                (user is None or not user._is_over) and (report is None or report(share) is not False)
            )
        return Model(self._paths[which], memory=memory, **options)

    def _take(self, which: Which, user: CascadeStream) -> tuple[Model, bool]:
        """Return a model, and whether it had to be loaded for that."""
        with self._lock:
            if self._closed:
                raise _core.ClosedError("the cascade is closed")
            self._streams.add(user)
            if which in self.models:
                return self.models[which], False
            for other in set(self.models) & set(self._paths):
                if any(not stream._is_over for stream in self._streams if stream is not user):
                    raise _core.Error(
                        f"there is memory for one model at a time, and another stream still needs the {other} one: "
                        "end or close it first"
                    )
                self.models.pop(other).close()
            self.models[which] = self._load(which, user)
            return self.models[which], True

    # --- asking

    def chat(self, messages: str | Sequence[Message], *, show_draft: bool = False, **options: Any) -> CascadeStream:
        """Stream a reply to a conversation: the small model's, or if that does not do, the large one's.

        Parameters
        ----------
        messages
            As for :meth:`Model.chat`.
        show_draft
            Whether the small model's tokens come out before they have been judged; see :class:`Cascade`.
        **options
            Those of :meth:`Model.chat`, for both models.

        Raises
        ------
        ClosedError, Error, ContextFullError, ValueError, TypeError
            As for :meth:`Model.chat`; what the escalations raise reaches you, too. :class:`Error` also if there is
            memory for one model at a time, and a stream of the other one is open.
        """
        checked = _checked_options(options)
        return CascadeStream(self, lambda model, more: model.chat(messages, **more), checked, show_draft)

    def stream(self, prompt: str, *, show_draft: bool = False, **options: Any) -> CascadeStream:
        """Continue ``prompt``: a text, since the models may number their tokens differently.

        Parameters are otherwise those of :meth:`Model.stream` and of :meth:`chat`, and so are the errors.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, since token ids are one model's own, not {prompt!r:.80}")
        checked = _checked_options(options)
        return CascadeStream(self, lambda model, more: model.stream(prompt, **more), checked, show_draft)

    # --- the end

    def close(self) -> None:
        """End the open streams, and close the models that were loaded here. Idempotent."""
        for stream in list(self._streams):
            stream.close()
        with self._lock:
            self._closed = True
            for which in self._paths:
                if which in self.models:
                    self.models.pop(which).close()

    def __enter__(self) -> Cascade:
        """Return the cascade itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Return which models are loaded."""
        loaded = ", ".join(f"{which}: {self.models[which].path.name}" for which in _BOTH if which in self.models)
        return f"<overspill.Cascade {'closed' if self._closed else loaded}>"


def _checked_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse what belongs to one model and would be used up by it."""
    if isinstance(options.get("sampler"), Sampler):
        raise TypeError("sampler must be a function here, or sampling options: a Sampler's state is one model's")
    if not isinstance(options.get("grammar"), str | None):
        raise TypeError("grammar must be GBNF here: a mask is one model's, and used up by it")
    return options


def fit_together(
    small: ModelInfo, large: ModelInfo, hardware: Hardware, options: Mapping[str, Any]
) -> tuple[bool, str]:
    """Forecast the small model on what there is, and the large one on what it leaves; say whether both fit, and why.

    ``options`` are those of :class:`Model`.
    """
    offload = options.get("offload", "auto")
    if offload == "cpu":
        hardware = replace(hardware, devices=(hardware.cpu,))
    needed = {device.name: 0 for device in hardware.devices}
    for which, info in zip(_BOTH, (small, large), strict=True):
        expected = _forecast(info, hardware, offload, options)
        if expected.verdict == "does not fit":
            beside = " beside the small one" if which == "large" else ""
            return False, f"one model at a time: the {which} one does not fit{beside}: {expected.reason}"
        used = {device.name: expected.memory[device.name].total_bytes for device in hardware.devices}
        needed = {name: n_bytes + used[name] for name, n_bytes in needed.items()}
        hardware = hardware.without(used)
    uses = " and ".join(f"{format_bytes(n)} of {'RAM' if name == CPU else name}" for name, n in needed.items() if n)
    return True, f"both models are in memory: they need {uses}"


def _forecast(info: ModelInfo, hardware: Hardware, offload: Any, options: Mapping[str, Any]) -> Forecast:
    names = ("n_ctx", "type_k", "type_v", "load_mode")
    settings = {name: options[name] for name in names if options.get(name) is not None}
    settings["n_ubatch"] = options.get("n_ubatch") or options.get("n_batch") or 512
    if offload in ("auto", "cpu", "tuned"):
        return plan(info, hardware=hardware, **settings).forecast()
    placement = offload if isinstance(offload, Placement) else Placement.from_offload(info, hardware.gpus, offload)
    return forecast(info, placement, hardware, **settings)
