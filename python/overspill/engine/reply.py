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

from overspill._core import Error, ReplyForm
from overspill._core import ToolCall as NativeToolCall
from overspill.base.values import Stats, StopReason
from overspill.engine.stream import Stream, until_left

__all__ = ["Channel", "ChatStream", "ChatToken", "ToolCall"]

logger = logging.getLogger("overspill")


class Channel(StrEnum):
    """The part of a reply that a token belongs to."""

    REASONING = "reasoning"
    """The model's reasoning before the answer."""
    FINAL = "final"
    """The answer."""
    TOOL_CALL = "tool_call"
    """Arguments for a tool, in JSON."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model asks for."""

    name: str
    arguments: dict[str, Any]
    id: str
    """The ``tool_call_id`` of the message that has the result; empty if the model gives none."""


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
        self._stream, self._parser, self._on_text = stream, form.parser, on_text
        self._named, self._n_dropped = frozenset(form.named), n_dropped
        self._waiting: deque[ChatToken] = deque()
        self._channel = Channel.FINAL
        self._reasoning = self._content = ""
        self._calls: list[NativeToolCall] = []
        self._n_understood = 0  # characters of the raw text that are in what was given out
        self._is_over = False
        self._ids: list[int] = []
        self.raw = ""
        """The whole text of the reply so far, with the marks of the model's format."""
        self.is_malformed = False
        """Whether the reply left the model's own format; its rest is then given as plain text of the answer."""
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
            parts = self._understand(is_partial=True)
            if not parts:
                parts = [(self._channel, "")]
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
        self._stream.__exit__(kind, error, traceback)
        self.close()

    def close(self) -> None:
        """End the stream; a step that runs in another thread is cancelled. Idempotent."""
        self._stream.close()
        self._end()

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
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for call in self.tool_calls
            ]
        return message

    def __repr__(self) -> str:
        """Return the stats in brackets."""
        return f"<overspill.ChatStream {self.stats}>"

    # --- understanding

    def _understand(self, *, is_partial: bool) -> list[tuple[Channel, str]]:
        """Return the new pieces of text in the reply, by channel."""
        if self.is_malformed:
            return self._rest_as_it_is()
        try:
            reply = self._parser.parse(self.raw, is_partial)
            reasoning, content, calls = reply.reasoning, reply.content, reply.tool_calls
            if not is_partial and self.raw.strip() and not (reasoning or content or calls):
                raise Error("it is nothing but marks")
        except Error as error:
            self.is_malformed = True
            logger.warning("the reply does not follow the model's own format, the rest is given as it is: %s", error)
            return self._rest_as_it_is()
        thought, said = _added(self._reasoning, reasoning), _added(self._content, content)
        self._reasoning += thought
        self._content += said
        called = [
            _added(self._calls[i].arguments if i < len(self._calls) else "", call.arguments)
            for i, call in enumerate(calls)
        ]
        if len(calls) >= len(self._calls):
            self._calls = calls
        parts = [(Channel.REASONING, thought), (Channel.FINAL, said), *((Channel.TOOL_CALL, text) for text in called)]
        new = [(channel, text) for channel, text in parts if text]
        if new:
            self._channel = new[-1][0]
            self._n_understood = len(self.raw)
        return new

    def _rest_as_it_is(self) -> list[tuple[Channel, str]]:
        rest = self.raw[self._n_understood :]
        self._n_understood = len(self.raw)
        self._content += rest
        self._channel = Channel.FINAL
        return [(Channel.FINAL, rest)] if rest else []

    def _end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        # A reply that was broken off is parsed as far as it goes.
        reason = self.stats.stop_reason
        is_whole = reason in (StopReason.EOS, StopReason.STOP_STRING)
        if self.raw:
            for channel, text in self._understand(is_partial=not is_whole):
                self._waiting.append(ChatToken(self._ids[-1], text, channel))
        for call in self._calls if is_whole else ():
            self._take_call(call.name, call.arguments, call.id)
        # Otherwise some text was held back, or cut off.
        if reason in (StopReason.EOS, StopReason.MAX_TOKENS, StopReason.CONTEXT_FULL):
            is_silent = reason == StopReason.EOS and self._ids[-1] not in self._named
            self._on_text(self.raw, self._ids[:-1] if is_silent else self._ids)
        if self.on_end is not None:
            self.on_end(self)

    def _take_call(self, name: str, arguments: str, call_id: str) -> None:
        try:
            values = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            self.is_malformed = True
            logger.warning("the call of the tool %s has arguments that are no JSON object, and is given as text", name)
            self._content += f"{name}({arguments})"
            self._waiting.append(ChatToken(self._ids[-1], f"{name}({arguments})", Channel.FINAL))
            return
        call = ToolCall(name, values, call_id)
        self.tool_calls.append(call)
        self._waiting.append(ChatToken(self._ids[-1], "", Channel.TOOL_CALL, tool_call=call))


def _added(before: str, now: str) -> str:
    """Return the text added since ``before``; empty if text was taken back, which only a broken format does."""
    return now[len(before) :] if now.startswith(before) else ""
