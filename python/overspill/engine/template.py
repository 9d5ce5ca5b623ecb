"""A model's chat template: it turns messages into a prompt, and says which form the reply has."""

from __future__ import annotations

import json
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

from overspill._core import ChatPrompt as NativeChatPrompt
from overspill._core import ChatTemplate as NativeChatTemplate
from overspill._core import ClosedError, Error, Model, ReplyForm, grammar_of_json_schema
from overspill._core import ToolChoice as NativeToolChoice
from overspill.base.checks import as_flag, as_json, as_text, check_choice, shown
from overspill.engine.tools import Tool, describe_tools
from overspill.sampling.json_schema import checked_schema

__all__ = [
    "ChatModel",
    "ChatPrompt",
    "ChatTemplate",
    "Message",
    "OnFull",
    "ToolChoice",
    "checked_messages",
]

NativeModel: TypeAlias = Model
Message: TypeAlias = Mapping[str, Any]
"""A message of a conversation, with the keys of OpenAI's API."""
ToolChoice: TypeAlias = Literal["auto", "required", "none"]
OnFull: TypeAlias = Literal["error", "shift"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_KNOWN = 4  # prompts and replies whose tokens are remembered
_MOST_DROPPED = 16  # turns that are forgotten in the middle of one reply


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The prompt of a conversation, and the form of the reply to it."""

    text: str
    tokens: list[int]
    form: ReplyForm
    n_dropped: int
    """Tokens of the oldest turns, which are left out so that the rest fits."""
    _known: deque[tuple[str, list[int]]]
    """The template's memory of texts and their tokens."""

    def remember(self, reply: str = "", ids: Sequence[int] = ()) -> None:
        """Keep the tokens of prompt and reply for later prompts that begin with their text."""
        # The same text could be written in other tokens, which the KV cache does not have.
        self._known.append((self.text + reply, [*self.tokens, *ids]))


class ChatModel(Protocol):
    """The part of a model that a chat template needs."""

    _core: NativeModel

    @property
    def path(self) -> Path:
        """The model's file; errors name it."""


class ChatTemplate:
    """A template that turns conversations into prompts; :attr:`Model.chat_template` is a model's own."""

    def __init__(self, model: ChatModel, source: str = "") -> None:
        """Compile the template of the model's file.

        Parameters
        ----------
        model
            The model whose tokens the prompts are made of; the template does not keep it in memory.
        source
            A template in Jinja to use instead.

        Raises
        ------
        Error
            The file has no template, or the template has mistakes.
        """
        if not isinstance(getattr(model, "_core", None), NativeModel):
            raise TypeError(f"model must be an overspill.Model, not {shown(model)}")
        as_text("source", source)
        if not source and not model._core.has_chat_template:
            raise Error(
                f"{model.path} has no chat template: it is a base model, to be continued with model.stream(prompt); or "
                "give a template in Jinja: model.chat_template = overspill.ChatTemplate(model, source)"
            )
        self._model_reference = weakref.ref(model._core)
        self._core = NativeChatTemplate(model._core, source)
        self._known: deque[tuple[str, list[int]]] = deque(maxlen=_MOST_KNOWN)

    @property
    def _model(self) -> NativeModel:
        model = self._model_reference()
        if model is None:
            raise ClosedError("the model of the chat template is gone")
        return model

    @property
    def source(self) -> str:
        """The template's source, in Jinja."""
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
        """Return the prompt of a conversation as text; other parameters as for :meth:`Model.chat`.

        The text has no beginning-of-sequence token where :meth:`Model.tokenize` adds one.

        Parameters
        ----------
        add_generation_prompt
            Whether the text ends with the template's request for a reply.
        """
        rendered = self._render(
            checked_messages(messages),
            describe_tools(() if tools is None else tools),
            "auto",
            "",
            reasoning_effort,
            as_flag("thinking", thinking),
            as_flag("add_generation_prompt", add_generation_prompt),
        )
        return rendered.text

    def _render(
        self,
        messages: Sequence[Message],
        tools_described: Sequence[Mapping[str, Any]],
        tool_choice: ToolChoice,
        json_schema: str,
        reasoning_effort: str | None,
        thinking: bool,
        add_generation_prompt: bool,
    ) -> NativeChatPrompt:
        variables = {}
        if reasoning_effort is not None:
            variables["reasoning_effort"] = json.dumps(as_text("reasoning_effort", reasoning_effort))
        self._check_roles(messages)
        return self._core.render(
            as_json("messages", list(messages)),
            tools=as_json("tools", tools_described) if tools_described else "",
            tool_choice=NativeToolChoice[tool_choice],
            json_schema=json_schema,
            enable_thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    def _check_roles(self, messages: Sequence[Message]) -> None:
        """Raise a ValueError for a role that is not common, and that the template does not know either."""
        for i, message in enumerate(messages):
            role = message["role"]
            if role not in _ROLES and not any(f"{mark}{role}{mark}" in self.source for mark in ("'", '"')):
                raise ValueError(f"messages[{i}]: role must be one of {', '.join(_ROLES)}, not {shown(role)}")

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
        check_choice("on_full", on_full, get_args(OnFull))
        check_choice("tool_choice", tool_choice, get_args(ToolChoice))
        thinking = as_flag("thinking", thinking)
        described = describe_tools(() if tools is None else tools)
        if described and json_schema is not None:
            raise ValueError("give either tools or json_schema")
        schema = ""
        if json_schema is not None:
            schema = checked_schema(json_schema)
            grammar_of_json_schema(schema)  # whose error says where the schema is wrong
        said = checked_messages(messages)

        def render(part: Sequence[Message], add_generation_prompt: bool = True) -> NativeChatPrompt:
            return self._render(part, described, tool_choice, schema, reasoning_effort, thinking, add_generation_prompt)

        rendered = render(said)
        names = [tool["function"]["name"] for tool in described]
        if unknown := [name for name in names if name not in rendered.text]:
            raise ValueError(f"tools: the model's chat template does not tell it of {unknown[0]}: it knows no tools")
        tokens = self._tokens(rendered.text)
        n_dropped = 0
        if on_full == "shift" and len(tokens) >= self._model.n_ctx:
            n_before = len(tokens)
            said = self._that_fits(said, render)
            rendered = render(said)
            tokens = self._tokens(rendered.text)
            n_dropped = n_before - len(tokens)
        form = rendered.form
        if on_full == "shift":
            form.droppable = self._turns(said, rendered.text, tokens, render)
        return ChatPrompt(rendered.text, tokens, form, n_dropped, self._known)

    def _that_fits(
        self, messages: list[Message], render: Callable[[Sequence[Message]], NativeChatPrompt]
    ) -> list[Message]:
        """Return the messages without the fewest oldest turns that do not fit; the last turn always stays."""
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if len(starts) < 2:
            return messages

        def without(n_turns: int) -> list[Message]:
            return [*messages[: starts[0]], *messages[starts[n_turns] :]]

        few, many = 1, len(starts) - 1
        while few < many:
            middle = (few + many) // 2
            if len(self._tokens(render(without(middle)).text)) < self._model.n_ctx:
                many = middle
            else:
                few = middle + 1
        return without(few)

    # --- tokens

    def _tokens(self, text: str) -> list[int]:
        """Return the tokens of a prompt; of its beginning those that were decoded before, if there are any."""
        known = [one for one in tuple(self._known) if text.startswith(one[0])]
        if known:
            begun, tokens = max(known, key=lambda one: len(one[0]))
            rest = self._model.tokenize(text[len(begun) :].encode(), False, True)
            # Only before a special token can a text be cut in two and give the same tokens.
            if not rest or self._model.token_bytes(rest[0], True) == b"":
                return [*tokens, *rest]
        return self._model.tokenize(text.encode(), True, True)

    def _turns(
        self,
        messages: Sequence[Message],
        text: str,
        tokens: Sequence[int],
        render: Callable[[Sequence[Message], bool], NativeChatPrompt],
    ) -> list[tuple[int, int]]:
        """Return the spans of tokens, first and end, of the turns before the last question, where they are known."""
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"][: _MOST_DROPPED + 1]
        ends: dict[int, int] = {}
        n_bytes = 0
        whole = text.encode()
        for i, token in enumerate(tokens):
            ends[n_bytes] = i
            n_bytes += len(self._model.token_bytes(token, True))
        offset = n_bytes - len(whole)  # of the beginning-of-sequence token, which the text does not have
        places: list[int | None] = []
        for start in starts:
            try:
                before = render(messages[:start], False).text.encode() if start else b""
            except ValueError:  # some templates want a question
                before = None
            is_beginning = before is not None and whole.startswith(before)
            places.append(ends.get(len(before or b"") + offset) if is_beginning else None)
        return [(a, b) for a, b in pairwise(places) if a is not None and b is not None and a < b]


def checked_messages(messages: str | Sequence[Message]) -> list[Message]:
    """Return copies of the messages, or a text as one message of the user; an error names the first wrong one."""
    if isinstance(messages, str):
        return [{"role": "user", "content": as_text("messages", messages)}]
    if isinstance(messages, bytes | bytearray | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a string or a sequence of mappings, not {shown(messages)}")
    said: list[Any] = list(messages)
    if not said:
        raise ValueError("messages must have at least one message")
    for i, message in enumerate(said):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f'messages[{i}] must be a mapping such as {{"role": "user", "content": "Hello"}}, not {shown(message)}'
            )
        if not isinstance(message.get("content"), str | list | None):
            raise TypeError(f"messages[{i}]: content must be a text, not {shown(message['content'])}")
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"messages[{i}] must have content")
        as_json("messages", dict(message))
    return [dict(message) for message in said]
