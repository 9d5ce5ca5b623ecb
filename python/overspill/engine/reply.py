"""A reply in a chat: the form that it is to have, and its tokens, told apart by reasoning, answer and calls."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import TracebackType
from typing import Any

from overspill import _core
from overspill.base.values import Stats, StopReason
from overspill.engine.stream import Stream, until_left

__all__ = ["Channel", "ChatStream", "ChatToken", "ReplyForm", "ToolCall"]

logger = logging.getLogger("overspill")


class Channel(StrEnum):
    """What a part of a reply is."""

    REASONING = "reasoning"
    """Said by the model to itself."""
    FINAL = "final"
    """The answer."""
    TOOL_CALL = "tool_call"
    """Arguments for a tool, in JSON."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model wants to be called."""

    name: str
    arguments: dict[str, Any]
    id: str
    """To be given back with the result, as ``tool_call_id``; empty if the model gives none."""


@dataclass(frozen=True, slots=True)
class ChatToken:
    """One token of a reply, or what it completes; ``str()`` gives its text."""

    id: int
    text: str
    """Without the marks of the model's format; empty for those, and while what is to come may be one."""
    channel: Channel
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    tool_call: ToolCall | None = None
    """A whole call, once it is complete."""

    def __str__(self) -> str:
        """Return the text."""
        return self.text


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """What a chat template wants of a stream."""

    grammar: str | None = None
    trigger_patterns: Sequence[str] = ()
    """From whose match on the grammar holds."""
    trigger_tokens: Sequence[int] = ()
    begun: Sequence[int] = ()
    """What has come of the grammar already: the end of the prompt."""
    named: Sequence[int] = ()
    """Special tokens whose names are to be in the text."""
    stop: Sequence[str] = ()
    droppable: Sequence[tuple[int, int]] = ()
    """Spans of the prompt that may be forgotten when the context is full, oldest first."""


class ChatStream:
    """A reply as it is made: iterate over it to get :class:`ChatToken` after token.

    It can be left, closed and asked for its :attr:`stats` as :class:`Stream` can.
    """

    def __init__(
        self,
        stream: Stream,
        parser: _core.ReplyParser,
        on_text: Callable[[str, list[int]], None],
        *,
        named: Sequence[int] = (),
        n_dropped: int = 0,
    ) -> None:
        """Wrap a stream; :meth:`Model.chat` makes these."""
        self._stream, self._parser, self._on_text = stream, parser, on_text
        self._named, self._n_dropped = frozenset(named), n_dropped
        self._waiting: deque[ChatToken] = deque()
        self._channel = Channel.FINAL
        self._reasoning = self._content = ""
        self._calls: list[tuple[str, str, str]] = []
        self._n_understood = 0  # characters of the raw text that are in what was given out
        self._is_over = False
        self._ids: list[int] = []
        self.raw = ""
        """All that the model said, marks of its format included."""
        self.is_malformed = False
        """Whether the reply did not follow the model's own format, so that the rest of it was given as it is."""
        self.tool_calls: list[ToolCall] = []
        """What the model wants to be called, once it has ended."""
        self.on_end: Callable[[ChatStream], None] | None = None

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
        """What the stream did so far, and how fast."""
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
        """What the model has said to itself so far."""
        return self._reasoning

    @property
    def message(self) -> dict[str, Any]:
        """The reply so far as a message, to be added to a conversation."""
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
        """Return what is new in the reply, by channel."""
        if self.is_malformed:
            return self._rest_as_it_is()
        try:
            reasoning, content, calls = self._parser.parse(self.raw, is_partial)
            if not is_partial and self.raw.strip() and not (reasoning or content or calls):
                raise _core.Error("it is nothing but marks")
        except _core.Error as error:
            self.is_malformed = True
            logger.warning("the reply does not follow the model's own format, the rest is given as it is: %s", error)
            return self._rest_as_it_is()
        thought, said = _added(self._reasoning, reasoning), _added(self._content, content)
        self._reasoning += thought
        self._content += said
        called = [
            _added(self._calls[i][1] if i < len(self._calls) else "", arguments)
            for i, (_, arguments, _) in enumerate(calls)
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
        # What was broken off is understood as far as it goes.
        reason = self.stats.stop_reason
        is_whole = reason in (StopReason.EOS, StopReason.STOP_STRING)
        if self.raw:
            for channel, text in self._understand(is_partial=not is_whole):
                self._waiting.append(ChatToken(self._ids[-1], text, channel))
        for name, arguments, call_id in self._calls if is_whole else ():
            self._take_call(name, arguments, call_id)
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
    """Return what came to a text; nothing if it would be taken back, which only a fault of the format does."""
    return now[len(before) :] if now.startswith(before) else ""
