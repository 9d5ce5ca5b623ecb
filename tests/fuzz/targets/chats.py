"""Chat templates, changed, and replies in all their formats, nearly right."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from chats import WEATHER, cuts
from fuzz.mutators import mutated_json, mutated_text
from fuzz.targets.gguf_files import check_message
from fuzz.targets.languages import small_model
from model_files import llama_cpp_folder
from overspill import Channel, ChatStream, ChatTemplate, Error, StopReason, _core

__all__ = ["MARKS", "ChatTemplates", "Replies"]

_JINJA = (
    *("{{", "}}", "{%", "%}", "{%-", "-%}", "{#", "#}", "if", "else", "endif", "for", "in", "endfor", "set", "macro"),
    *(
        "endmacro",
        "message",
        "messages",
        "tools",
        "loop.index0",
        "loop.first",
        "|",
        "tojson",
        "length",
        "trim",
        "['role']",
    ),
    *(
        ".content",
        "[0]",
        "[-1]",
        "[::2]",
        "is",
        "not",
        "none",
        "string",
        "defined",
        "==",
        "+",
        "~",
        "*",
        "**",
        "//",
        "%",
    ),
    *(
        "range(10**9)",
        "range(3)",
        "namespace(a=1)",
        "raise_exception('no')",
        "strftime_now('%Y')",
        "{% raw %}",
        "join(', ')",
    ),
    *(
        "{% break %}",
        "add_generation_prompt",
        "bos_token",
        "'a' * 10**9",
        "()",
        "loop(messages)",
        "recursive",
        "['__class__']",
    ),
)
_CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the weather in Rome? <b>"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I look.",
        "tool_calls": [
            {
                "type": "function",
                "id": "123456789",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "123456789", "name": "get_weather", "content": "Sunny, 日本"},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
]
# The model's control tokens, and texts of the same length that are none.
_CONTROLS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
_OTHERS = ("<|ab_cde|>", "<|ab_fghij|>", "<|klmnopqrs|>")
_NAMES = ("role", "content", "tool_calls", "function", "arguments", "name", "type", "text", "reasoning_content", "user")


def _with_names(random: Random, value: Any, names: Sequence[str], between: Sequence[str], key: str = "") -> Any:
    """Return a copy of messages whose texts have names in some places, with something in between."""
    if isinstance(value, dict):
        return {name: _with_names(random, part, names, between, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_names(random, part, names, between, key) for part in value]
    if key not in ("content", "text", "reasoning_content", "arguments") or not isinstance(value, str):
        return value
    at = value.find("Rome") if key == "arguments" else random.randrange(len(value) + 1)
    for _ in range(random.randrange(3)):
        name = random.choice(names)
        n = random.randrange(1, len(name))
        value = value[:at] + name[:n] + random.choice(between) + name[n:] + value[at:]
    return value


def _sources() -> list[str]:
    folder = llama_cpp_folder() / "models" / "templates"
    return [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))]


@dataclass(frozen=True)
class Conversation:
    """A template and what it is given."""

    source: str
    messages: Any
    harmless: Any
    """The same messages without control tokens."""
    tools: list[Any]
    thinking: bool


class ChatTemplates:
    """Changed templates of real models, and conversations of every form."""

    def __init__(self, folder: Path) -> None:
        """Load the model."""
        self._model = small_model(folder)
        self._sources = _sources()

    def make(self, random: Random) -> Conversation:
        """Return a template or a conversation that is changed."""
        source = random.choice(self._sources)
        if random.random() < 0.7:
            source = mutated_text(random, source, _JINJA)
        messages: Any = copy.deepcopy(_CONVERSATION)[random.randrange(6) :]
        between = ["", " ", "<think>x</think>", "<|im_end|>", *cuts(source)]
        is_named, is_changed, seed = random.random() < 0.5, random.random() < 0.5, random.random()

        def changed(names: Sequence[str]) -> Any:
            chance = Random(seed)
            said = _with_names(chance, messages, names, between) if is_named else messages
            return mutated_json(chance, said, _NAMES) if is_changed else said

        tools = [WEATHER] if random.random() < 0.5 else []
        return Conversation(source, changed(_CONTROLS), changed(_OTHERS), tools, random.random() < 0.7)

    def check(self, case: Conversation) -> None:
        """Make the prompt, and the form of its reply."""
        try:
            template = ChatTemplate(self._model, case.source)
        except Error as error:
            check_message(error)
            return
        try:
            prompt = template.prepare(case.messages, tools=case.tools, thinking=case.thinking)
        except (Error, ValueError, TypeError) as error:
            # A template may complain of the conversation.
            check_message(error)
            return
        assert all(0 <= token < self._model.n_vocab for token in prompt.tokens)
        try:
            other = template.prepare(case.harmless, tools=case.tools, thinking=case.thinking)
        except (Error, ValueError, TypeError):
            return
        found, expected = (self._control_tokens(one.tokens) for one in (prompt, other))
        assert found == expected, f"texts make control tokens: {found} instead of {expected}"

    def _control_tokens(self, tokens: list[int]) -> Counter[int]:
        return Counter(token for token in tokens if self._model.token_bytes(token, special=False) == b"")


# What formats are made of; the pieces of one are near each other in every template.
MARKS = (
    *(
        "<think>",
        "</think>",
        "[THINK]",
        "[/THINK]",
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
        "<|end|>",
    ),
    *("<|start|>assistant", "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>", "<|call|>"),
    *("<tool_call>", "</tool_call>", "<function=get_weather>", "<parameter=city>", "</parameter>", "</function>"),
    *(
        "[TOOL_CALLS]",
        "get_weather",
        "[ARGS]",
        "<|python_tag|>",
        "<|tool_call|>",
        "<|tool▁calls▁begin|>",
        "<|tool▁call▁end|>",
    ),
    *(
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>",
        "<|im_end|>",
    ),
    *('{"name": "get_weather", "arguments": {"city": "WORD"}}', '{"name": "get_weather", "parameters": {"city": "R"}}'),
    *('{"city": "WORD", "days": 3}', '{"city": ', "}", "]", "```json\n", "```", "<|START_ACTION|>[", "<|END_ACTION|>"),
    *("<arg_key>city</arg_key>", "<arg_value>WORD</arg_value>", "<minimax:tool_call>", '<invoke name="get_weather">'),
    *("WORD ", "日本 WORD", "WORD", "\n", " ", "a < b", "<", "&amp;", "\\u00e9", "**bold**"),
)


@dataclass(frozen=True)
class Said:
    """A reply, cut into tokens, in the format of a template."""

    source: str
    tools: list[Any]
    pieces: list[str]


class Replies:
    """Replies that are nearly in their format. Each of their words is in one piece, in order, however they are cut."""

    def __init__(self, folder: Path) -> None:
        """Load the model."""
        self._model = small_model(folder)
        self._sources = _sources()
        self._templates: dict[str, ChatTemplate] = {}

    def make(self, random: Random) -> Said:
        """Return a reply of marks and texts."""
        text = "".join(random.choice(MARKS) for _ in range(1 + int(random.expovariate(0.12))))
        if random.random() < 0.7:
            text = mutated_text(random, text, MARKS)
        number = itertools.count()
        text = re.sub("WORD", lambda _: f"w{next(number)}z", text)[:1500]
        cuts = sorted(random.randrange(len(text) + 1) for _ in range(len(text) // random.choice((1, 3, 20))))
        pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        return Said(random.choice(self._sources), [WEATHER] if random.random() < 0.7 else [], pieces)

    def check(self, case: Said) -> None:
        """Read it, piece by piece."""
        if case.source not in self._templates:
            self._templates[case.source] = ChatTemplate(self._model, case.source)
        try:
            prompt = self._templates[case.source].prepare("Hi", tools=case.tools)
        except ValueError:  # one that knows no tools
            return
        said = dict.fromkeys(Channel, "")
        reply = ChatStream(_Script(case.pieces), prompt.form, lambda text, ids: None)  # type: ignore[arg-type]
        for token in reply:
            said[token.channel] += token.text
        raw = "".join(case.pieces)
        assert reply.raw == raw
        parts = _parts(prompt.form, case.pieces)
        assert parts == _parts(prompt.form, [raw]) == _parts(prompt.form, list(raw)), "the cut makes a difference"
        assert _words("|".join(text for _, text in parts)) == _words(raw), "a word is lost, or there twice"
        shown = "|".join(text for part, text in parts if part == _core.ReplyPart.answer)
        assert not set(_words(shown)) - set(_words(reply.text)), "a word of the answer is not in it"
        assert said[Channel.FINAL] == reply.text, "the answer is not the sum of its pieces"
        assert said[Channel.REASONING] == reply.reasoning, "the reasoning is not the sum of its pieces"
        json.dumps(reply.message)


def _parts(form: _core.ReplyForm, pieces: Sequence[str]) -> list[tuple[_core.ReplyPart, str]]:
    """Return what a reader makes of a reply: its texts, each as one, and its calls."""
    reader = form.new_reader()
    parts: list[tuple[_core.ReplyPart, str]] = []
    for piece in itertools.chain(*(reader.add(text) for text in pieces), reader.finish(True)):
        if parts and parts[-1][0] == piece.part != _core.ReplyPart.call:
            parts[-1] = (piece.part, parts[-1][1] + piece.text)
        else:
            parts.append((piece.part, piece.text))
    return parts


def _words(text: str) -> list[str]:
    return re.findall(r"w\d+z", text)


class _Script:
    """A stream that says what no model would be so kind to say: its tokens are given."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = iter(pieces)

    def __next__(self) -> SimpleNamespace:
        return SimpleNamespace(id=7, text=next(self._pieces), logprob=None, top_logprobs=())

    def close(self) -> None:
        """Hold nothing."""

    @property
    def stats(self) -> SimpleNamespace:
        """Say that the reply came to its end."""
        return SimpleNamespace(stop_reason=StopReason.EOS)
