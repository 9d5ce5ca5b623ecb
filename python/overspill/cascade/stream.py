"""A reply of one of two models, as it is made, and what came of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias, cast

from overspill import _core
from overspill.base.values import Stats, StopReason, Token
from overspill.cascade.signals import (
    Draft,
    EntropyMeter,
    Escalation,
    Judgement,
    Signal,
    judge,
)
from overspill.engine.model import Model
from overspill.engine.reply import Channel, ChatStream, ChatToken, ToolCall
from overspill.engine.stream import Stream, until_left

__all__ = ["CascadeStats", "CascadeStream", "CascadeToken", "Which"]

Which: TypeAlias = Literal["small", "large"]


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
        lend: Callable[[Which, CascadeStream], tuple[Model, bool]],
        escalations: Sequence[Escalation],
        start: Callable[[Model, Mapping[str, Any]], Stream | ChatStream],
        options: Mapping[str, Any],
        show_draft: bool,
    ) -> None:
        """Open the small model's stream; :meth:`Cascade.chat` and :meth:`Cascade.stream` make these."""
        self._lend, self._escalations = lend, escalations
        self._start, self._options, self._show_draft = start, options, show_draft
        self._is_over = False
        self._loading_s = 0.0
        self._judgement: Judgement | None = None
        self._draft: Draft | None = None
        self._large: Stream | ChatStream | None = None
        self._meter: EntropyMeter | None = None
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
        figures = {one.figure for one in self._escalations if isinstance(one, Signal)}
        watched = dict(options)
        if "logprobs" in figures and not watched.get("logprobs"):
            watched["logprobs"] = True
        if "entropies" in figures:
            watched["sampler"] = self._meter = EntropyMeter(watched.get("sampler"))
        return watched

    def _load(self, which: Which) -> Model:
        start = time.perf_counter()
        model, was_loaded = self._lend(which, self)
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
        judgement = judge(self._escalations, self._draft)
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
