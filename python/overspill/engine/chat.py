"""Conversations: a model's chat template, replies in its own format, and what has been said so far."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from overspill import _core
from overspill.base.files import replace_json
from overspill.base.values import Stats, StopReason
from overspill.engine.stream import until_left
from overspill.engine.tools import Tool, describe_tools
from overspill.sampling.json_schema import checked_schema

if TYPE_CHECKING:
    from overspill.engine.model import Model
    from overspill.engine.stream import Stream

__all__ = [
    "Channel",
    "Chat",
    "ChatStream",
    "ChatTemplate",
    "ChatToken",
    "Message",
    "OnFull",
    "ReplyForm",
    "Tool",
    "ToolCall",
    "ToolChoice",
]

logger = logging.getLogger("overspill")

NativeModel: TypeAlias = _core.Model
Message: TypeAlias = Mapping[str, Any]
"""What somebody said, as OpenAI's API has it."""
ToolChoice: TypeAlias = Literal["auto", "required", "none"]
OnFull: TypeAlias = Literal["error", "shift"]

_MOST_KNOWN = 4  # prompts and replies whose tokens are remembered
_MOST_DROPPED = 16  # turns that are forgotten in the middle of one reply


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


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model gets it, and the form of the reply to it."""

    text: str
    tokens: list[int]
    form: ReplyForm
    parser: _core.ReplyParser
    n_dropped: int
    """Tokens of old turns that were left out, so that the rest fits."""
    _known: deque[tuple[str, list[int]]]

    def remember(self, reply: str = "", ids: Sequence[int] = ()) -> None:
        """Keep the tokens of the prompt and of what was said to it, for a prompt that begins with both."""
        # The tokens that came: the same text could be written in others, too.
        self._known.append((self.text + reply, [*self.tokens, *ids]))


class ChatModel(Protocol):
    """What a chat template needs of a model."""

    _core: NativeModel

    @property
    def path(self) -> Path:
        """The file, which errors name."""


class ChatTemplate:
    """How a model is addressed; :attr:`Model.chat_template` has it."""

    def __init__(self, model: ChatModel, source: str = "") -> None:
        """Take the file's template, or another one in Jinja.

        Raises
        ------
        Error
            There is none, or it has mistakes.
        """
        if not source and not model._core.has_chat_template:
            raise _core.Error(
                f"{model.path} has no chat template: it is a base model, to be continued with model.stream(prompt); or "
                "give a template in Jinja: model.chat_template = overspill.ChatTemplate(model, source)"
            )
        # A template that somebody keeps does not keep the model's memory.
        self._model_reference = weakref.ref(model._core)
        self._core = model._core.chat_template(source)
        self._known: deque[tuple[str, list[int]]] = deque(maxlen=_MOST_KNOWN)

    @property
    def _model(self) -> NativeModel:
        model = self._model_reference()
        if model is None:
            raise _core.ClosedError("the model of the chat template is gone")
        return model

    @property
    def source(self) -> str:
        """The template, in Jinja."""
        return self._core.source

    def render(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        reasoning_effort: str | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return a conversation as the model gets it; parameters as for :meth:`Model.chat`.

        ``add_generation_prompt`` adds what asks for the reply. Without the token for the beginning of a text, if
        :meth:`Model.tokenize` adds it.
        """
        rendered = self._render(
            _messages(messages),
            describe_tools(tools or ()),
            "auto",
            "",
            reasoning_effort,
            thinking,
            add_generation_prompt,
        )
        text: str = rendered["text"]
        return text

    def _render(
        self,
        messages: Sequence[Message],
        tools_described: Sequence[Mapping[str, Any]],
        tool_choice: ToolChoice,
        json_schema: str,
        reasoning_effort: str | None,
        thinking: bool,
        add_generation_prompt: bool,
    ) -> dict[str, Any]:
        variables = {} if reasoning_effort is None else {"reasoning_effort": json.dumps(reasoning_effort)}
        return self._core.render(
            _json("messages", list(messages)),
            tools=_json("tools", tools_described) if tools_described else "",
            tool_choice=tool_choice,
            json_schema=json_schema,
            enable_thinking=bool(thinking),
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    def prepare(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice = "auto",
        reasoning_effort: str | None = None,
        thinking: bool = True,
        json_schema: str | Mapping[str, Any] | bool | None = None,
        on_full: OnFull = "error",
    ) -> ChatPrompt:
        """Return the prompt of a conversation, and the form of its reply; parameters as for :meth:`Model.chat`."""
        if on_full not in get_args(OnFull):
            raise ValueError(f"on_full must be one of {', '.join(get_args(OnFull))}, not {on_full!r}")
        if tools and json_schema is not None:
            raise ValueError("give either tools or json_schema")
        schema = ""
        if json_schema is not None:
            schema = checked_schema(json_schema)
            _core.grammar_of_json_schema(schema)  # says where it cannot be compiled
        said = _messages(messages)
        described = describe_tools(tools or ())

        def render(part: Sequence[Message], add_generation_prompt: bool = True) -> dict[str, Any]:
            return self._render(part, described, tool_choice, schema, reasoning_effort, thinking, add_generation_prompt)

        rendered = render(said)
        names = [tool["function"]["name"] for tool in described]
        if unknown := [name for name in names if name not in rendered["text"]]:
            raise ValueError(f"tools: the model's chat template does not tell it of {unknown[0]}: it knows no tools")
        tokens = self._tokens(rendered["text"])
        n_dropped = 0
        if on_full == "shift" and len(tokens) >= self._model.n_ctx:
            n_before = len(tokens)
            said = self._that_fits(said, render)
            rendered = render(said)
            tokens = self._tokens(rendered["text"])
            n_dropped = n_before - len(tokens)
        droppable = self._turns(said, rendered["text"], tokens, render) if on_full == "shift" else []
        form = ReplyForm(
            rendered["grammar"],
            rendered["trigger_patterns"],
            rendered["trigger_tokens"],
            rendered["begun"],
            rendered["named"],
            rendered["stop"],
            droppable,
        )
        return ChatPrompt(rendered["text"], tokens, form, rendered["parser"], n_dropped, self._known)

    def _that_fits(
        self, messages: list[Message], render: Callable[[Sequence[Message]], dict[str, Any]]
    ) -> list[Message]:
        """Leave out as few of the oldest turns as it takes; all but the last if that is not enough."""
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if len(starts) < 2:
            return messages

        def without(n_turns: int) -> list[Message]:
            return [*messages[: starts[0]], *messages[starts[n_turns] :]]

        few, many = 1, len(starts) - 1
        while few < many:
            middle = (few + many) // 2
            if len(self._tokens(render(without(middle))["text"])) < self._model.n_ctx:
                many = middle
            else:
                few = middle + 1
        return without(few)

    # --- tokens

    def _tokens(self, text: str) -> list[int]:
        """Return the tokens of a prompt: of what it begins with those that were decoded before, if there are any."""
        known = [one for one in tuple(self._known) if text.startswith(one[0])]
        if known:
            begun, tokens = max(known, key=lambda one: len(one[0]))
            rest = self._model.tokenize(text[len(begun) :].encode(), False, True)
            # Elsewhere than at a special token, a tokenizer might have joined what is cut apart here.
            if not rest or self._model.token_bytes(rest[0], True) == b"":
                return [*tokens, *rest]
        return self._model.tokenize(text.encode(), True, True)

    def _turns(
        self,
        messages: Sequence[Message],
        text: str,
        tokens: Sequence[int],
        render: Callable[[Sequence[Message], bool], dict[str, Any]],
    ) -> list[tuple[int, int]]:
        """Return where the turns before the last question lie in the tokens, as far as that can be told."""
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"][: _MOST_DROPPED + 1]
        ends: dict[int, int] = {}
        n_bytes = 0
        whole = text.encode()
        for i, token in enumerate(tokens):
            ends[n_bytes] = i
            n_bytes += len(self._model.token_bytes(token, True))
        offset = n_bytes - len(whole)  # the token for the beginning, which the text does not have
        places: list[int | None] = []
        for start in starts:
            try:
                before = render(messages[:start], False)["text"].encode() if start else b""
            except ValueError:  # some templates want a question
                before = None
            is_beginning = before is not None and whole.startswith(before)
            places.append(ends.get(len(before or b"") + offset) if is_beginning else None)
        return [(a, b) for a, b in pairwise(places) if a is not None and b is not None and a < b]


def _json(argument: str, value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument}: {error}") from None


def _messages(messages: str | Sequence[Message]) -> list[Message]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a string or a sequence of mappings, not {messages!r:.80}")
    said: list[Any] = list(messages)
    if not said:
        raise ValueError("messages must have at least one message")
    for i, message in enumerate(said):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f'messages[{i}] must be a mapping such as {{"role": "user", "content": "Hello"}}, not {message!r:.80}'
            )
        if not isinstance(message.get("content"), str | list | None):
            raise TypeError(f"messages[{i}]: content must be a text, not {message['content']!r:.80}")
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"messages[{i}] must have content")
    return [dict(message) for message in said]


class Chat:
    """A conversation with a model, which remembers what was said.

    >>> chat = overspill.Chat(model, system="Answer in one sentence.")
    >>> for token in chat.send("Why is the sky blue?"):
    ...     print(token, end="")
    """

    _FORMAT = "overspill chat 1"

    def __init__(self, model: Model, *, system: str | None = None, **options: Any) -> None:
        """Begin a conversation.

        Parameters
        ----------
        model
            A loaded model with a chat template.
        system
            What the model is told first.
        **options
            Those of :meth:`Model.chat`, for every reply.

        Raises
        ------
        Error
            The model has no chat template.
        """
        self.model = model
        _ = model.chat_template  # which says what is missing
        self.options = dict(options)
        self._open: ChatStream | None = None
        self.messages: list[dict[str, Any]] = []
        """What was said; it may be edited, and the longest beginning that stays is not decoded again."""
        if system is not None:
            self.system = system

    @property
    def system(self) -> str | None:
        """What the model is told first; None if nothing is."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def send(self, message: str | Message | None = None, **options: Any) -> ChatStream:
        """Say something, and stream the reply, which is part of the conversation when the stream has ended.

        What was said is so at once; if the stream ends before the model said anything, it is taken back. A stream of
        this conversation that is still open is closed first.

        Parameters
        ----------
        message
            A text of the user, any message, or None to have the conversation answered as it is.
        **options
            Those of :meth:`Model.chat`, for this reply.
        """
        new: list[dict[str, Any]] = []
        if message is not None:
            new = [dict(part) for part in _messages(message if isinstance(message, str) else [message])]
        self._close_open()
        return self._answer([*self.messages, *new], options)

    def _answer(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> ChatStream:
        before = list(self.messages)
        stream = self.model.chat(messages, **{**self.options, **options})
        asked = messages[-1]

        def add(ended: ChatStream) -> None:
            if not self.messages or self.messages[-1] is not asked:
                return  # the history was edited in the meantime
            if ended.raw or ended.stats.stop_reason == StopReason.EOS:
                self.messages.append(ended.message)
            else:
                self.messages[:] = before

        stream.on_end = add
        self._open = stream
        self.messages[:] = messages
        return stream

    def _close_open(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def add_result(self, call: ToolCall, result: object) -> None:
        """Add what a tool returned: a text, or anything that JSON can hold; ``send()`` has it answered then."""
        content = result if isinstance(result, str) else _json("result", result)
        self.messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content})

    def _last_question(self) -> int | None:
        users = (i for i in range(len(self.messages) - 1, -1, -1) if self.messages[i]["role"] == "user")
        return next(users, None)

    def undo(self) -> Any:
        """Take back the last question and what followed; return the question's content, None if there is none."""
        self._close_open()
        at = self._last_question()
        if at is None:
            return None
        question = self.messages[at]["content"]
        del self.messages[at:]
        return question

    def retry(self, **options: Any) -> ChatStream:
        """Have the last question answered anew; what was answered is kept if nothing comes in its place.

        Raises
        ------
        Error
            Nothing was asked yet.
        """
        self._close_open()
        at = self._last_question()
        if at is None:
            raise _core.Error("there is no question yet that could be answered anew")
        return self._answer(self.messages[: at + 1], options)

    def branch(self) -> Chat:
        """Return another conversation that has said the same so far."""
        other = Chat(self.model, **self.options)
        other.messages = copy.deepcopy(self.messages)
        return other

    # --- on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a file, with a checksum and the model's identity; an old file is replaced whole."""
        content = {"format": self._FORMAT, "model": _identity(self.model), "messages": self.messages}
        replace_json(Path(path), {**content, "sha256": _checksum(content)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model, **options: Any) -> Chat:
        """Read a conversation that was saved.

        Raises
        ------
        Error
            The file is missing, is none of these, is damaged, or is of another model.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise _core.Error(f"{path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict) or data.get("format") != cls._FORMAT:
            raise _core.Error(f"{path}: is damaged, or not a chat that was saved by this version")
        checksum = data.pop("sha256", None)
        if checksum != _checksum(data):
            raise _core.Error(f"{path}: is damaged: its checksum is wrong")
        if data["model"] != _identity(model):
            raise _core.Error(
                f"{path}: was saved with another model, {data['model']['name']!r}, and not with {model.path.name}; "
                "load that one"
            )
        chat = cls(model, **options)
        chat.messages = data["messages"]
        return chat


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(model: Model) -> dict[str, str]:
    info = model.info
    header = repr((info.architecture, info.name, sorted(info.tensors), sorted(info.metadata.items(), key=repr)))
    return {"name": info.name or model.path.name, "header": hashlib.sha256(header.encode()).hexdigest()}
