"""A reply in a chat: its form, and its tokens, divided into reasoning, answer and tool calls."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from types import TracebackType
from typing import Any

from overspill._core import ReplyForm, ReplyPart, ReplyPiece
from overspill.base import html
from overspill.base.checks import shown
from overspill.base.files import without_repetition
from overspill.base.text import short_repr
from overspill.base.values import Stats, StopReason
from overspill.engine.stream import Stream, until_left

__all__ = ["Channel", "ChatReply", "ChatStream", "ChatToken", "ToolCall", "call_in_message"]

logger = logging.getLogger("overspill")


class Channel(StrEnum):
    """The part of a reply that a token belongs to."""

    REASONING = "reasoning"
    """The model's reasoning before the answer."""
    FINAL = "final"
    """The answer."""
    TOOL_CALL = "tool_call"
    """Arguments for a tool, in JSON, once the call is complete."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model asks for."""

    name: str
    arguments: dict[str, Any]
    id: str
    """The ``tool_call_id`` of the message that has the result; empty if the model gives none."""

    def __repr__(self) -> str:
        """Return the call as Python has it, in brackets."""
        given = ", ".join(f"{name}={shown(value)}" for name, value in self.arguments.items())
        return short_repr(self, f"{self.name}({given})")


@dataclass(frozen=True, slots=True)
class ChatToken:
    """One token of a reply, or a piece of text or a tool call that it completes; ``str()`` gives its text."""

    id: int
    text: str
    """The text without the marks of the model's format; empty for a mark, and for text that may become one."""
    channel: Channel
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    tool_call: ToolCall | None = None
    """The call that is complete with this token."""

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def __repr__(self) -> str:
        """Return number, text and channel in brackets."""
        return short_repr(self, f"{self.id} {shown(self.text)} {self.channel}")


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A whole reply in a chat; ``str()`` gives its answer."""

    text: str
    """The answer, without reasoning."""
    reasoning: str
    """The model's reasoning before it; empty for models that do not reason."""
    tool_calls: tuple[ToolCall, ...]
    """The calls that the model asks for."""
    message: dict[str, Any]
    """The reply as a message of the role ``"assistant"``, for the next call of :meth:`Model.chat`."""
    stats: Stats

    def __str__(self) -> str:
        """Return the answer."""
        return self.text

    def __repr__(self) -> str:
        """Return the beginning of the answer in brackets."""
        return short_repr(self, repr(self.text))

    def _repr_html_(self) -> str:
        """Return reasoning, answer, calls and stats, for a notebook."""
        calls = [f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in self.tool_calls]
        reasoning = html.lines(self.reasoning.splitlines()) if self.reasoning else ""
        return reasoning + html.passage(self.text) + html.lines([*calls, str(self.stats)])


class ChatStream:
    """A reply as it is made: an iterator of :class:`ChatToken`.

    It can be left, closed and asked for its :attr:`stats` as :class:`Stream` can.
    """

    def __init__(
        self,
        stream: Stream,
        form: ReplyForm,
        on_text: Callable[[str, list[int]], None],
        *,
        n_dropped: int = 0,
    ) -> None:
        """Wrap a stream; use :meth:`Model.chat`."""
        self._stream, self._reader, self._on_text = stream, form.new_reader(), on_text
        self._named, self._n_dropped = frozenset(form.named), n_dropped
        self._waiting: deque[ChatToken] = deque()
        self._channel = Channel.FINAL
        self._reasoning = self._content = ""
        self._calls: list[ToolCall] = []
        self._is_over = False
        self._ids: list[int] = []
        self.raw = ""
        """The whole text of the reply so far, with the marks of the model's format."""
        self.is_malformed = False
        """Whether the reply left the model's own format; what is in no other part is then text of the answer."""
        self.tool_calls: list[ToolCall] = []
        """The calls that the model asks for; empty until the reply has ended."""
        self.on_end: Callable[[ChatStream], None] | None = None
        """A function that is called with the stream once it has ended."""

    # --- iterating

    def __iter__(self) -> Iterator[ChatToken]:
        """Yield the tokens; the stream is closed when the loop is left."""
        return until_left(self)

    def __next__(self) -> ChatToken:
        """Return the next token, or raise ``StopIteration`` at the end."""
        while not self._waiting:
            if self._is_over:
                raise StopIteration
            try:
                token = next(self._stream)
            except StopIteration:
                self._end()
                continue
            except BaseException:
                self._end()
                raise
            self._ids.append(token.id)
            self.raw += token.text
            parts = self._taken(self._reader.add(token.text)) or [(self._channel, "")]
            for i, (channel, text) in enumerate(parts):
                measured = (token.logprob, tuple(token.top_logprobs)) if i == 0 else (None, ())
                self._waiting.append(ChatToken(token.id, text, channel, *measured))
        return self._waiting.popleft()

    def __enter__(self) -> ChatStream:
        """Return the stream itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        try:
            self._stream.__exit__(kind, error, traceback)
        finally:
            self.close()

    def close(self) -> None:
        """End the stream; a step that runs in another thread is cancelled. Idempotent."""
        try:
            self._stream.close()
        finally:
            self._end()

    def finish(self) -> ChatReply:
        """Take the rest of the reply, and return the whole."""
        with self:
            for _token in self:
                pass
        return self._whole()

    def _whole(self) -> ChatReply:
        self._stream._tell_of_full_context()
        return self.reply

    @property
    def reply(self) -> ChatReply:
        """The reply so far."""
        return ChatReply(self.text, self.reasoning, tuple(self.tool_calls), self.message, self.stats)

    # --- what was said

    @property
    def stats(self) -> Stats:
        """Counts and times of the stream so far."""
        stats = self._stream.stats
        if not self._n_dropped:
            return stats
        return replace(stats, dropped_tokens=stats.dropped_tokens + self._n_dropped)

    @property
    def text(self) -> str:
        """The answer so far, without reasoning."""
        return self._content

    @property
    def reasoning(self) -> str:
        """The model's reasoning so far."""
        return self._reasoning

    @property
    def message(self) -> dict[str, Any]:
        """The reply so far as a message of the role ``"assistant"``, for the next call of :meth:`Model.chat`."""
        message: dict[str, Any] = {"role": "assistant", "content": self._content}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self.tool_calls:
            message["tool_calls"] = [call_in_message(call) for call in self.tool_calls]
        return message

    def __repr__(self) -> str:
        """Return the stats in brackets."""
        return short_repr(self, str(self.stats))

    # --- understanding

    def _taken(self, pieces: list[ReplyPiece]) -> list[tuple[Channel, str]]:
        """Return new pieces of the reply as text, by channel."""
        taken = []
        for piece in pieces:
            channel, text = Channel.FINAL, piece.text
            if piece.part == ReplyPart.reasoning:
                channel = Channel.REASONING
                self._reasoning += text
            elif piece.call is not None and (arguments := _arguments_of(piece.call.arguments)) is not None:
                channel, text = Channel.TOOL_CALL, piece.call.arguments
                self._calls.append(ToolCall(piece.call.name, arguments, piece.call.id))
            else:
                self._content += text
                if piece.call is not None:
                    self._leave_format(f"the arguments for the tool {piece.call.name} are no JSON object")
            taken.append((channel, text))
        if taken:
            self._channel = taken[-1][0]
        if self._reader.is_malformed:
            self._leave_format("marks are missing, or in the wrong place")
        return taken

    def _leave_format(self, reason: str) -> None:
        if not self.is_malformed:
            self.is_malformed = True
            logger.warning("the reply does not follow the model's own format, and the rest is text: %s", reason)

    def _end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        reason = self.stats.stop_reason
        if self.raw:
            is_whole = reason in (StopReason.EOS, StopReason.STOP_STRING)
            for channel, text in self._taken(self._reader.finish(is_whole)):
                self._waiting.append(ChatToken(self._ids[-1], text, channel))
        self.tool_calls = self._calls
        for call in self._calls:
            self._waiting.append(ChatToken(self._ids[-1], "", Channel.TOOL_CALL, tool_call=call))
        # Otherwise some text was held back, or cut off.
        if reason in (StopReason.EOS, StopReason.MAX_TOKENS, StopReason.CONTEXT_FULL):
            is_silent = reason == StopReason.EOS and self._ids[-1] not in self._named
            self._on_text(self.raw, self._ids[:-1] if is_silent else self._ids)
        if self.on_end is not None:
            self.on_end(self)


def call_in_message(call: ToolCall) -> dict[str, Any]:
    """Return a call as messages have it."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}


def _arguments_of(text: str) -> dict[str, Any] | None:
    """Return the arguments of a call; None if they are no JSON object that Python can hold and write again."""
    try:
        # Models write line breaks in strings as they are.
        values = json.loads(text or "{}", strict=False, object_pairs_hook=without_repetition)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
