"""A model's chat template: it turns messages into a prompt, and says which form the reply has."""

from __future__ import annotations

import json
import re
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

from overspill._core import ChatTemplate as NativeChatTemplate
from overspill._core import ClosedError, Error, Model, ReplyForm
from overspill._core import ToolChoice as NativeToolChoice
from overspill.base.cached import absent_on_error, cached_property
from overspill.base.checks import as_flag, as_json, as_text, check_choice, shown
from overspill.base.text import short_repr
from overspill.engine.control_tokens import ControlTokens, rewritten, unused_character, written_out
from overspill.engine.jinja import Program, TemplateRefusalError
from overspill.engine.message_forms import ANY_TOOL, MessageForms, repaired, try_out, variables_of
from overspill.engine.tools import MarkedTools, Tool, describe_tools, marked_tools
from overspill.sampling.json_schema import parsed_schema, schema_rules

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
"""A message of a conversation, with the keys of OpenAI's API, and ``trusted``."""
ToolChoice: TypeAlias = Literal["auto", "required", "none"]
OnFull: TypeAlias = Literal["error", "shift"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_KNOWN = 64  # prompts and replies whose tokens are remembered
_MOST_BEGUN = 8  # of them, from one saved conversation
_MOST_DROPPED = 16  # turns that are forgotten in the middle of one reply


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A prompt with marks in the names of control tokens that are only text; the mark is empty if there are none."""

    marked: str
    mark: str

    @property
    def text(self) -> str:
        """The prompt without marks."""
        return self.marked.replace(self.mark, "") if self.mark else self.marked


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The prompt of a conversation, and the form of the reply to it."""

    text: str
    tokens: list[int]
    form: ReplyForm
    n_dropped: int
    """Tokens of the oldest turns, which are left out so that the rest fits."""
    _rendered: _Rendered
    _known: deque[tuple[_Rendered, list[int]]]
    """The template's memory of texts and their tokens."""

    def remember(self, reply: str = "", ids: Sequence[int] = ()) -> None:
        """Keep the tokens of prompt and reply for later prompts that begin with their text."""
        # The same text could be written in other tokens, which the KV cache does not have.
        said = _Rendered(self._rendered.marked + reply, self._rendered.mark)
        self._known.append((said, [*self.tokens, *ids]))


class ChatModel(Protocol):
    """The part of a model that a chat template needs."""

    _core: NativeModel

    @property
    def path(self) -> Path:
        """The model's file; errors name it."""


@lru_cache(maxsize=16)
def _program(source: str) -> Program:
    return Program(source)


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
            The file has no template, or the template has mistakes, or is too large or nested too deep.
        """
        if not isinstance(getattr(model, "_core", None), NativeModel):
            raise TypeError(f"model must be an overspill.Model, not {shown(model)}")
        as_text("source", source)
        native = model._core
        sources = [source, ""] if source else [native.chat_template_source(False), native.chat_template_source(True)]
        if not any(sources):
            raise Error(
                f"{model.path} has no chat template: it is a base model, to be continued with model.stream(prompt); or "
                "give a template in Jinja: model.chat_template = overspill.ChatTemplate(model, source)"
            )
        plain, with_tools = sources[0] or sources[1], sources[1] or sources[0]
        self._source = plain
        self._model_reference = weakref.ref(native)
        # Compiled and tried first: that refuses what llama.cpp, which has hardly any bounds, would not survive.
        self._programs = {False: _program(plain), True: _program(with_tools)}
        for tools, program in self._programs.items():
            try_out(program, {**self._always, "tools": [ANY_TOOL] if tools else None})
        self._core = NativeChatTemplate(native, source)
        for tools, program in list(self._programs.items()):
            amended = self._core.amended(tools and bool(sources[1]))
            if amended and amended.rstrip() != program.source.rstrip():
                self._programs[tools] = _program(amended)
        self._known: deque[tuple[_Rendered, list[int]]] = deque(maxlen=_MOST_KNOWN)

    @property
    @absent_on_error
    def _model(self) -> NativeModel:
        model = self._model_reference()
        if model is None:
            raise ClosedError("the model of the chat template is gone")
        if model.closed:
            raise ClosedError("the model of the chat template is closed")
        return model

    def _remember(self, tokens: Sequence[int]) -> None:
        """Keep tokens that a KV cache has, for prompts that begin with their text, or with some turns of it."""
        native, before = self._model, self._added[0]
        if list(tokens[: len(before)]) != before:
            return
        controls = [i for i in range(len(before), len(tokens)) if native.token_bytes(tokens[i], False) == b""]
        for end in [*controls[-_MOST_BEGUN:], len(tokens)]:
            text = b"".join(native.token_bytes(token, True) for token in tokens[len(before) : end])
            with suppress(UnicodeDecodeError):  # it ends within a character
                self._known.append((_Rendered(text.decode(), ""), list(tokens[:end])))

    @property
    def source(self) -> str:
        """The template's source, in Jinja."""
        return self._source

    def __repr__(self) -> str:
        """Return the beginning of the source in brackets."""
        return short_repr(self, shown(self._source))

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
        described = describe_tools(() if tools is None else tools)
        variables = variables_of(reasoning_effort, as_flag("thinking", thinking))
        asks = as_flag("add_generation_prompt", add_generation_prompt)
        return self._render(checked_messages(messages), described, variables, asks).text

    def _check_roles(self, messages: Sequence[Message]) -> None:
        """Raise a ValueError for a role that is not common, and that the template does not know either."""
        for i, message in enumerate(messages):
            role = message["role"]
            if role not in _ROLES and self._controls.marked(role, "\ue000") != role:
                raise ValueError(f"messages[{i}]: role must not name a control token, as {shown(role)} does")
            if role not in _ROLES and not self._knows_role(role):
                raise ValueError(f"messages[{i}]: role must be one of {', '.join(_ROLES)}, not {shown(role)}")

    def _knows_role(self, role: str) -> bool:
        # It stands in quotes, and not as the key of a message: message['content'].
        return bool(role) and re.search(rf"""(?<![\w\])]\[)(['"]){re.escape(role)}\1""", self.source) is not None

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
        rules = "" if json_schema is None else schema_rules(parsed_schema(json_schema))
        marked = marked_tools(as_json("tools", described)) if described else MarkedTools("", "", rules)
        said = checked_messages(messages)
        variables = variables_of(reasoning_effort, thinking)

        def render(part: Sequence[Message], add_generation_prompt: bool = True) -> _Rendered:
            return self._render(part, described, variables, add_generation_prompt)

        rendered = render(said)
        names = [tool["function"]["name"] for tool in described]
        if unknown := [name for name in names if name not in rendered.text]:
            raise ValueError(f"tools: the model's chat template does not tell it of {unknown[0]}: it knows no tools")
        tokens = self._tokens(rendered)
        n_dropped = 0
        if on_full == "shift" and len(tokens) >= self._model.n_ctx:
            n_before = len(tokens)
            said = self._that_fits(said, render)
            rendered = render(said)
            tokens = self._tokens(rendered)
            n_dropped = n_before - len(tokens)
        form = self._core.form(
            as_json("messages", said),
            tools=as_json("tools", described) if described else "",
            tool_choice=NativeToolChoice[tool_choice],
            tools_by_call=marked.by_call,
            tools_by_parameter=marked.by_parameter,
            has_schema=json_schema is not None,
            rules=marked.rules,
            enable_thinking=bool(thinking),
            variables={name: json.dumps(value) for name, value in variables.items() if name != "enable_thinking"},
        )
        if on_full == "shift":
            form.droppable = self._turns(said, rendered.text, tokens, render)
        return ChatPrompt(rendered.text, tokens, form, n_dropped, rendered, self._known)

    def _that_fits(self, messages: list[Message], render: Callable[[Sequence[Message]], _Rendered]) -> list[Message]:
        """Return the messages without the fewest oldest turns that do not fit; the last turn always stays."""
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if len(starts) < 2:
            return messages

        def without(n_turns: int) -> list[Message]:
            return [*messages[: starts[0]], *messages[starts[n_turns] :]]

        few, many = 1, len(starts) - 1
        while few < many:
            middle = (few + many) // 2
            if len(self._tokens(render(without(middle)))) < self._model.n_ctx:
                many = middle
            else:
                few = middle + 1
        return without(few)

    # --- rendering

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        add_generation_prompt: bool,
    ) -> _Rendered:
        _ = self._model  # whose error says that it is closed
        self._check_roles(messages)
        effort = variables.get("reasoning_effort", "")
        if self._controls.marked(effort, "\ue000") != effort:
            raise ValueError(f"reasoning_effort must not name a control token, as {shown(effort)} does")
        # A copy of values that JSON knows: a template gets no object of the caller.
        written = as_json("messages", [messages, tools])
        said, described = json.loads(written)
        program = self._programs[bool(tools)]
        trusted = [as_flag(f"messages[{i}]: trusted", m.pop("trusted", False)) for i, m in enumerate(said)]
        given = [self._forms(bool(tools)).fitting(message) for message in said]
        always = {**self._always, **variables, "add_generation_prompt": add_generation_prompt}
        mark = unused_character(f"{written}{program.source}{always}")

        def conversation(marked: Callable[[str, str], str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            def rewrite(text: str) -> str:
                return marked(text, mark)

            told = [
                message if is_trusted else {**rewritten(message, rewrite), "role": message["role"]}
                for message, is_trusted in zip(given, trusted, strict=True)
            ]
            return told, rewritten(described, rewrite)

        marked, fenced = conversation(self._controls.marked), conversation(self._controls.fenced)
        text = written_out(self._rendered(program, *marked, always, len(written)), mark)
        if fenced != marked:
            # A template that cuts texts may have made a name of what it left of them.
            other = written_out(self._rendered(program, *fenced, always, len(written)), mark)
            if self._controls.names(other) != self._controls.names(text):
                text = other
        bos, eos = self._always["bos_token"], self._always["eos_token"]
        before, after = self._added
        if before and bos:
            text = text.removeprefix(bos)
        if after and eos:
            text = text.removesuffix(eos)
        # Where no text had to be marked, the prompt is read as any other text.
        return _Rendered(text, mark if mark in text else "")

    def _rendered(
        self,
        program: Program,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        n_given: int,
    ) -> str:
        """Return a prompt from messages as they are, or from what says the same to a template that refuses them."""
        everything = {**variables, "tools": tools or None}
        candidates: list[dict[str, Any]] = [{"messages": candidate} for candidate in repaired(messages)]
        # Some count the tools, whether there are any or not; some want them as text.
        functions = json.dumps([tool["function"] for tool in tools], ensure_ascii=False, indent=4)
        candidates += [{**candidate, "tools": tools, "functions": functions} for candidate in candidates]
        refusal: TemplateRefusalError | None = None
        for candidate in candidates:
            try:
                return _NO_CHARACTER.sub("\ufffd", program.render({**everything, **candidate}, n_given))
            except TemplateRefusalError as error:
                refusal = refusal or error
        raise ValueError(f"messages: the chat template refuses them: {refusal}") from None

    @cached_property
    def _always(self) -> dict[str, Any]:
        """Variables that every conversation has."""
        ids = self._model.special_tokens()
        names = {
            f"{name}_token": self._model.token_bytes(ids[name], True).decode(errors="replace") if name in ids else ""
            for name in ("bos", "eos")
        }
        return {**names, "documents": None}

    def _forms(self, with_tools: bool) -> MessageForms:
        if with_tools not in self._found:
            self._found[with_tools] = MessageForms(self._programs[with_tools], self._always)
        return self._found[with_tools]

    @cached_property
    def _found(self) -> dict[bool, MessageForms]:
        return {}

    # --- tokens

    @cached_property
    def _controls(self) -> ControlTokens:
        return ControlTokens(self._model)

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """Tokens that the vocabulary puts before and behind every text."""
        whole, bare = self._model.tokenize(b"a", True, True), self._model.tokenize(b"a", False, True)
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at], whole[at + len(bare) :]

    def _tokens(self, rendered: _Rendered) -> list[int]:
        """Return the tokens of a prompt; of its beginning those that were decoded before, if there are any."""
        known = [
            one
            for one in tuple(self._known)
            if one[0].mark in ("", rendered.mark) and rendered.marked.startswith(one[0].marked)
        ]
        known.sort(key=lambda one: len(one[0].marked), reverse=True)
        for begun, tokens in [] if self._added[1] else known[:_MOST_BEGUN]:
            rest = self._tokens_of(rendered.marked[len(begun.marked) :], rendered.mark)
            # Only before a control token can a text be cut in two and give the same tokens.
            if not rest or self._model.token_bytes(rest[0], False) == b"":
                return [*tokens, *rest]
        if rendered.mark:
            before, after = self._added
            return [*before, *self._tokens_of(rendered.marked, rendered.mark), *after]
        return self._model.tokenize(rendered.marked.encode(), True, True)

    def _tokens_of(self, marked: str, mark: str) -> list[int]:
        parts = self._controls.parts(marked, mark) if mark else [(marked, True)]
        tokens = [self._model.tokenize(part.encode(), False, special) for part, special in parts if part]
        return [token for of_part in tokens for token in of_part]

    def _turns(
        self,
        messages: Sequence[Message],
        text: str,
        tokens: Sequence[int],
        render: Callable[[Sequence[Message], bool], _Rendered],
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
            except (ValueError, Error):  # some templates want a question
                places.append(None)
                continue
            if whole.startswith(before):
                places.append(ends.get(len(before) + offset))
                continue
            # Some end a conversation with another token than a message.
            begun = self._controls.without_last(before.decode()).encode()
            at = ends.get(len(begun) + offset) if whole.startswith(begun) else None
            is_control = at is not None and self._model.token_bytes(tokens[at], False) == b""
            places.append(at + 1 if at is not None and is_control else None)
        return [(a, b) for a, b in pairwise(places) if a is not None and b is not None and a < b]


_NO_CHARACTER = re.compile("[\ud800-\udfff]")


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
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f'messages: messages[{i}] has another content part type than {{"type": "text", "text": "..."}}: '
                    f"{shown(part)}"
                )
        _check_calls(i, message.get("tool_calls"))
        for key in ("reasoning_content", "name", "tool_call_id"):
            if not isinstance(message.get(key), str | None):
                raise TypeError(f"messages[{i}]: {key} must be a text, not {shown(message[key])}")
        as_json("messages", dict(message))
        if any(not isinstance(call.get("id"), str | None) for call in message.get("tool_calls") or ()):
            raise TypeError(f"messages[{i}]: the id of a call must be a text")
    # A key without a value says as much as no key.
    optional = ("reasoning_content", "name", "tool_call_id", "tool_calls")
    return [{key: v for key, v in message.items() if v is not None or key not in optional} for message in said]


def _check_calls(i: int, calls: object) -> None:
    if not isinstance(calls, list | tuple | None):
        raise TypeError(f"messages[{i}]: tool_calls must be a list, not {shown(calls)}")
    for call in calls or ():
        function = call.get("function") if isinstance(call, Mapping) and call.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'messages: messages[{i}] has another tool call type than {{"type": "function", "function": '
                f'{{"name": "...", "arguments": ...}}}}: {shown(call)}'
            )
        if not isinstance(function.get("arguments"), str | Mapping):
            raise ValueError(
                f"messages: messages[{i}]: arguments of {function['name']} must be a mapping or JSON, not "
                f"{function.get('arguments')!r:.80}"
            )
