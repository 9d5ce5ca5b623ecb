"""A reply of one of two models: its tokens, its stream and its stats."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias, cast

from overspill._core import CancelledError
from overspill.base.checks import shown
from overspill.base.text import short_repr
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
    """A token and the model that made it; ``str()`` gives its text."""

    token: Token | ChatToken
    """The token of :meth:`Model.stream` or :meth:`Model.chat`."""
    model: Which
    restarted: bool = False
    """Whether the answer starts anew here, and the tokens before were a draft that does not count. True only with
    ``show_draft``, and only on the first token of the large model."""

    @property
    def id(self) -> int:
        """The token's number in its model's vocabulary."""
        return self.token.id

    @property
    def text(self) -> str:
        """The text that the token completes."""
        return self.token.text

    @property
    def channel(self) -> Channel:
        """The part of the reply that the token belongs to; always the answer unless it is a chat."""
        return self.token.channel if isinstance(self.token, ChatToken) else Channel.FINAL

    @property
    def logprob(self) -> float | None:
        """Natural logarithm of the token's probability; None without the option ``logprobs``."""
        return self.token.logprob

    @property
    def top_logprobs(self) -> tuple[tuple[int, float], ...]:
        """The most likely tokens and the logarithms of their probabilities, best first; empty unless asked for."""
        return self.token.top_logprobs

    @property
    def tool_call(self) -> ToolCall | None:
        """The tool call that the token completes, if it does."""
        return self.token.tool_call if isinstance(self.token, ChatToken) else None

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def __repr__(self) -> str:
        """Return the model, and the token's number, text and channel in brackets."""
        return short_repr(self, f"{self.model}: {self.id} {shown(self.text)} {self.channel}")


@dataclass(frozen=True, slots=True)
class CascadeStats:
    """Which model answered and why, and the stats of each model."""

    answered_by: Which | None
    """None unless the small model's reply has been judged."""
    reason: str
    """Why that model answered, in words, with the decisive figure."""
    small: Stats
    large: Stats | None
    """None if the large model was not asked."""
    loading_s: float
    """Seconds of loading models for this reply; 0.0 where both are in memory."""

    def __str__(self) -> str:
        """Return the model that answered and why, and a line for each model."""
        who = "not judged yet" if self.answered_by is None else f"the {self.answered_by} model answered: {self.reason}"
        loading = [f"loading: {self.loading_s:.2f} s"] if self.loading_s else []
        large = [] if self.large is None else [f"large: {self.large}"]
        return "\n".join([who, f"small: {self.small}", *large, *loading])

    def __repr__(self) -> str:
        """Return that in one line, in brackets."""
        return short_repr(self, _in_one_line(self))


def _in_one_line(stats: CascadeStats) -> str:
    return str(stats).replace("\n", "; ")


class CascadeStream:
    """A reply of one of two models, as an iterator over :class:`CascadeToken`.

    Leaving and closing it work as with :class:`Stream`. One thread at a time may ask for tokens; any thread may close.
    """

    def __init__(
        self,
        lend: Callable[[Which, CascadeStream], tuple[Model, bool]],
        escalations: Sequence[Escalation],
        start: Callable[[Model, Mapping[str, Any]], Stream | ChatStream],
        options: Mapping[str, Any],
        show_draft: bool,
    ) -> None:
        """Open the small model's stream, as :meth:`Cascade.chat` and :meth:`Cascade.stream` do.

        Parameters
        ----------
        lend
            Returns a loaded model, and whether it was loaded for this.
        escalations
            Judge the small model's reply, in order.
        start
            Opens a model's stream with the options.
        options
            Those of the reply, for both models.
        show_draft
            Whether tokens of the small model come out before they are judged.
        """
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
        """Return the options, with those that the signals need."""
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
        except CancelledError:
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
        """Take a token from the current model, or judge and go on where it has none left."""
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
        """Keep the figures of a token if it is one of the answer's; see :class:`Draft`."""
        # A chat may divide a token: the first part has the figures.
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

    @property
    def draft(self) -> Draft | None:
        """The small model's whole reply, also where the large model answers; None until it is complete."""
        return self._draft

    @property
    def message(self) -> dict[str, Any]:
        """The answer so far as a message of a conversation; its content is empty until the draft is judged."""
        if self._judgement is None or self._draft is None:
            return {"role": "assistant", "content": ""}
        return self._draft.message if self._large is None else self._message(self._large)

    @property
    def stats(self) -> CascadeStats:
        """Which model answers and why, and the stats of both so far."""
        judged = self._judgement
        who: Which | None = None if judged is None else "large" if judged.escalate else "small"
        large = None if self._large is None else self._large.stats
        return CascadeStats(who, "" if judged is None else judged.reason, self._small.stats, large, self._loading_s)

    def __repr__(self) -> str:
        """Return the stats in brackets."""
        return short_repr(self, _in_one_line(self.stats))
