"""Chat: prompts as other libraries render them, replies in every model's format, and nothing decoded twice."""

from __future__ import annotations

import enum
import itertools
import json
import logging
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from model_files import llama_cpp_folder
from overspill import (
    Channel,
    Chat,
    ChatStream,
    ChatTemplate,
    ContextFullError,
    Error,
    Model,
    StopReason,
    _core,
)
from overspill.engine.tools import describe_tools
from programs import SUPPORT
from reference_prompts import CONVERSATIONS, TEMPLATES
from rounding import is_same

REFERENCE: dict[str, dict[str, list[str]]] = json.loads(
    (SUPPORT / "reference_prompts.json").read_text(encoding="utf-8")
)
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def model(smollm2_path: Path) -> Iterator[Model]:
    """Return SmolLM2, which has a chat template, with nothing in its context yet."""
    with Model(smollm2_path, n_ctx=1024, n_threads=2, repack="off") as loaded:
        yield loaded


def template(name: str) -> str:
    """Return one of the templates in llama.cpp's folder, in Jinja."""
    return (llama_cpp_folder() / "models" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def text_of(stream: ChatStream) -> str:
    """Return the answer of a stream that is read to its end."""
    return "".join(token.text for token in stream if token.channel == Channel.FINAL)


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(smollm2: Model, name: str) -> None:
    """Letter by letter, for several conversations, with thinking and without."""
    chat = ChatTemplate(smollm2, template(TEMPLATES[name])) if TEMPLATES[name] else smollm2.chat_template
    assert len(REFERENCE[name]) >= 3
    for about, expected in REFERENCE[name].items():
        for thinking, text in zip((True, False), expected, strict=True):
            got = chat.render(CONVERSATIONS[about], thinking=thinking)
            for form in ("%Y-%m-%d", "%d %b %Y"):
                got = got.replace(datetime.now().strftime(form), "TODAY")
            assert got == text, about


def test_reasoning_effort(smollm2: Model) -> None:
    """gpt-oss is told of it."""
    chat = ChatTemplate(smollm2, template(TEMPLATES["gpt-oss"]))
    assert "Reasoning: high" in chat.render("Hello", reasoning_effort="high")


@pytest.mark.parametrize(
    ("messages", "kind", "text"),
    [
        ([], ValueError, "at least one message"),
        (5, TypeError, "messages must be a string or a sequence"),
        ({"role": "user", "content": "x"}, TypeError, "messages must be a string or a sequence"),
        ([{"role": "user"}], ValueError, r"messages\[0\] must have content"),
        ([{"content": "x"}], TypeError, r"messages\[0\] must be a mapping such as"),
        ([{"role": "user", "content": 5}], TypeError, r"messages\[0\]: content must be a text"),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, "messages: .*content part type"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], ValueError, "messages: .*tool call type"),
        ([{"role": "user", "content": {1, 2}}], TypeError, "content must be a text"),
        ([{"role": "user", "content": "x", "more": {1}}], TypeError, "messages: .*not JSON serializable"),
    ],
)
def test_messages_that_are_none(smollm2: Model, messages: Any, kind: type[Exception], text: str) -> None:
    """The message says which, and what it should be."""
    with pytest.raises(kind, match=text):
        smollm2.chat(messages)


def test_templates_that_are_none(smollm2: Model, gemma: Model) -> None:
    """A base model's error names what to do; a template's mistake is told, and so is its refusal of a conversation."""
    assert not gemma.has_chat_template
    with pytest.raises(Error, match=r"has no chat template.*model\.stream\(prompt\).*ChatTemplate\(model, source\)"):
        gemma.chat("Hello")
    with pytest.raises(Error, match="the chat template has a mistake"):
        ChatTemplate(smollm2, "{% for %}")
    refusing = ChatTemplate(smollm2, "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}x")
    with pytest.raises(ValueError, match="one at a time"):
        refusing.render(CONVERSATIONS["two turns"])
    gemma.chat_template = ChatTemplate(
        gemma, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    try:
        assert text_of(gemma.chat("What is 1 + 1?", **GREEDY))
    finally:
        del gemma.chat_template


# --- replies -----------------------------------------------------------------------------------

WEATHER = {
    "name": "get_weather",
    "description": "Get the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
HARMONY = {
    "reasoning and answer": (
        "<|channel|>analysis<|message|>The user says hi; <b>2 < 3</b> 日本.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello, 世界! 🙂\n\n- a < b",
        ("The user says hi; <b>2 < 3</b> 日本.", "Hello, 世界! 🙂\n\n- a < b", []),
    ),
    "answer alone": ("<|channel|>final<|message|>Hello", ("", "Hello", [])),
    "a preamble and a call": (
        "<|channel|>analysis<|message|>I need the weather.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "東京", "days": 3}',
        ("I need the weather.", "Let me look.", [("get_weather", {"city": "東京", "days": 3})]),
    ),
}


class Spoken:
    """A stream of tokens that say given texts, for replies that no small model gives."""

    def __init__(self, texts: list[str], reason: StopReason = StopReason.EOS) -> None:
        self._texts, self._reason = iter(texts), reason
        self.ended = False

    def __next__(self) -> _Spoken:
        try:
            return _Spoken(next(self._texts))
        except StopIteration:
            self.ended = True
            raise

    def close(self) -> None:
        """Do nothing."""

    @property
    def stats(self) -> Any:
        """Return what a chat stream asks for."""
        return type("Stats", (), {"stop_reason": self._reason if self.ended else None})()


class _Spoken:
    id, logprob, top_logprobs = 7, None, ()

    def __init__(self, text: str) -> None:
        self.text = text


def parser_of(model: Model, name: str, tools: list[Any] | None = None) -> _core.ReplyParser:
    """Return the parser of a template's replies."""
    rendered = ChatTemplate(model, template(name))._render(
        [{"role": "user", "content": "Hi"}], describe_tools(tools or ()), "auto", "", None, True, True
    )
    parser: _core.ReplyParser = rendered["parser"]
    return parser


def said(parser: _core.ReplyParser, texts: list[str]) -> tuple[str, str, list[tuple[str, Any]], str, ChatStream]:
    """Return reasoning, answer, calls, the arguments as they came, and the stream."""
    stream = ChatStream(Spoken(texts), parser, lambda text, ids: None)  # type: ignore[arg-type]
    parts: dict[Channel, str] = dict.fromkeys(Channel, "")
    calls = []
    for token in stream:
        parts[token.channel] += token.text
        calls += [(token.tool_call.name, token.tool_call.arguments)] if token.tool_call else []
    assert [(call.name, call.arguments) for call in stream.tool_calls] == calls
    return parts[Channel.REASONING], parts[Channel.FINAL], calls, parts[Channel.TOOL_CALL], stream


@pytest.mark.parametrize("case", HARMONY)
def test_harmony_however_it_is_cut(smollm2: Model, case: str) -> None:
    """Reasoning, answer and calls are the same at every chunk boundary, and at many random ones."""
    raw, (reasoning, answer, calls) = HARMONY[case]
    parser = parser_of(smollm2, TEMPLATES["gpt-oss"], [WEATHER])
    cuts = [[at] for at in range(1, len(raw))]
    shuffled = random.Random(1)
    cuts += [sorted(shuffled.sample(range(1, len(raw)), min(n, len(raw) - 1))) for n in (2, 5, 20, 1000)]
    for cut in cuts:
        texts = [raw[a:b] for a, b in itertools.pairwise([0, *cut, len(raw)])]
        *got, arguments, stream = said(parser, texts)
        assert (got[0], got[1], got[2]) == (reasoning, answer, calls), cut
        assert not stream.is_malformed
        if calls:
            assert json.loads(arguments) == calls[0][1]
            assert stream.message["tool_calls"][0]["function"]["name"] == "get_weather"


def test_thinking_in_tags(smollm2: Model) -> None:
    """Qwen's and DeepSeek's thoughts are told from the answer, however the text is cut."""
    for name, begun in (("qwen3", "<think>\n"), ("deepseek r1", "")):
        raw = begun + "Two and two.\n</think>\n\nIt is **4**, a < b."
        parser = parser_of(smollm2, TEMPLATES[name])
        for at in range(1, len(raw)):
            reasoning, answer, *_ = said(parser, [raw[:at], raw[at:]])
            assert reasoning.strip() == "Two and two.", (name, at)
            assert answer.strip() == "It is **4**, a < b.", (name, at)


@pytest.mark.parametrize(
    "raw",
    [
        "<|channel|>nonsense<|message|>What I wanted to say",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>what<|message|>Something",
        "Just text without any channel",
        "<|channel|>final",
    ],
)
def test_malformed_replies_lose_nothing(smollm2: Model, caplog: pytest.LogCaptureFixture, raw: str) -> None:
    """What does not parse is given as it is, with a warning."""
    parser = parser_of(smollm2, TEMPLATES["gpt-oss"])
    for texts in ([raw], list(raw)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="overspill"):
            reasoning, answer, _, _, stream = said(parser, texts)
        assert stream.is_malformed
        assert stream.raw == raw
        assert answer
        assert raw.endswith(answer)
        assert reasoning in raw
        assert "does not follow the model's own format" in caplog.text
        assert stream.message["content"] == answer


def test_calls_with_arguments_that_are_no_json(smollm2: Model) -> None:
    """They are given as text."""
    parser = parser_of(smollm2, TEMPLATES["gpt-oss"], [WEATHER])
    raw = '<|channel|>commentary to=functions.get_weather<|message|>{"city": '
    *_, stream = said(parser, [raw])
    assert stream.is_malformed
    assert stream.tool_calls == []
    assert '{"city":' in stream.message["content"]


def test_brackets_without_end(smollm2: Model) -> None:
    """A model that repeats one is stopped by an error, and not by the end of the stack."""
    parser = parser_of(smollm2, "Qwen-Qwen2.5-7B-Instruct", [WEATHER])
    raw = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "'
    for deep in (raw + "[" * 20_000, raw + '", "days": ' + "[{" * 20_000, "[" * 20_000):
        with pytest.raises(Error, match="nested more than 128 deep"):
            parser.parse(deep, True)
    *_, stream = said(parser, [raw + '", "days": ', *["[["] * 200])
    assert stream.is_malformed
    assert "[[[[" in stream.message["content"]


def test_templates_that_end_before_they_begin(model: Model) -> None:
    """An end token in what asks for the reply is an error, with a grammar."""
    model.chat_template = ChatTemplate(
        model,
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_end|>go:{% endif %}",
    )
    with pytest.raises(Error, match="grammar"):
        list(model.chat("x", json_schema={"type": "object"}))
    assert text_of(model.chat("x", **GREEDY)) is not None


def test_a_call_that_goes_wrong(model: Model) -> None:
    """What begins like a call and is none is given as text."""
    model.chat_template = ChatTemplate(model, template("GLM-4.6"))
    forced = [*model.tokenize("<tool_call", add_special=False), *model.tokenize("><", add_special=False)]
    n_prompt: list[int] = []

    def force(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        n_prompt[:] = n_prompt or [len(tokens)]
        n = len(tokens) - n_prompt[0]
        if n < len(forced):
            logits[forced[n]] += 1000

    stream = model.chat("Weather?", tools=[WEATHER], logits_processors=[force], max_tokens=20, seed=1)
    list(stream)
    assert "<tool_call><" in stream.raw
    assert stream.stats.tokens > len(forced)


def test_json_schema(model: Model) -> None:
    """The answer parses and fits, whatever the template has around it."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    for seed in range(3):
        reply = model.chat("Describe a person.", json_schema=schema, max_tokens=300, seed=seed)
        person = json.loads(text_of(reply))
        assert person["name"] in ("Ann", "Bob")
        assert 0 <= person["age"] <= 99
    with pytest.raises(ValueError, match="json_schema: #: unrecognized type"):
        model.chat("x", json_schema={"type": "colour"})


# --- tools -------------------------------------------------------------------------------------


class Unit(enum.Enum):
    """Units of temperature."""

    CELSIUS = "C"
    KELVIN = "K"


def test_functions_become_tools() -> None:
    """Names, types, defaults and docstrings; what JSON does not know is refused."""

    def get_weather(
        city: str, days: int = 1, unit: Unit = Unit.CELSIUS, at: list[float] | None = None, how: Literal["a", "b"] = "a"
    ) -> str:
        """Get the weather."""
        return ""

    (tool,) = describe_tools([get_weather])
    assert tool == {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "unit": {"enum": ["C", "K"]},
                    "at": {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "null"}]},
                    "how": {"enum": ["a", "b"]},
                },
                "required": ["city"],
            },
        },
    }
    assert describe_tools([WEATHER])[0]["function"] == WEATHER

    def untyped(x):  # type: ignore[no-untyped-def]
        return x

    def strange(x: complex) -> None: ...

    for tools, text in (
        ([untyped], "untyped's parameter x needs a type"),
        ([strange], "strange's parameter x has a type that JSON does not know"),
        ([lambda: 1], "has no name"),
        ([5], r"tools\[0\] must be a function"),
        ([{}], r'tools\[0\] must have a "name"'),
        ([WEATHER, WEATHER], "two have the name get_weather"),
        ("search", "tools must be a sequence"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            describe_tools(tools)  # type: ignore[arg-type]


def test_tools_a_model_calls(model: Model) -> None:
    """With a template that knows tools, one that is required is called with arguments that fit."""
    model.chat_template = ChatTemplate(model, template("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use"))
    beginning = model.tokenize("<tool_call>", add_special=False)
    close = model.tokenize('"}', add_special=False)
    n_prompt: list[int] = []

    def begin(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        # A small model would talk first, which it may, and would hardly come to an end.
        n_prompt[:] = n_prompt or [len(tokens)]
        n = len(tokens) - n_prompt[0]
        logits[beginning[n] if n < len(beginning) else close] += 100 if n < len(beginning) else n / 10

    reply = model.chat(
        "Weather in Paris?",
        tools=[WEATHER],
        tool_choice="required",
        seed=1,
        max_tokens=200,
        logits_processors=[begin],
    )
    tokens = list(reply)
    (call,) = reply.tool_calls
    assert call.name == "get_weather"
    assert isinstance(call.arguments["city"], str)
    assert tokens[-1].tool_call == call
    assert json.loads("".join(token.text for token in tokens if token.channel == Channel.TOOL_CALL)) == call.arguments
    chat = Chat(model, temperature=0)
    chat.messages = [{"role": "user", "content": "Weather in Paris?"}, reply.message]
    chat.add_result(call, {"degrees": 20})
    assert text_of(chat.send(max_tokens=8))
    with pytest.raises(ValueError, match="knows no tools"):
        ChatTemplate(model, template(TEMPLATES["gemma 2"])).prepare("x", tools=[WEATHER])


# --- conversations -----------------------------------------------------------------------------

QUESTIONS = [
    "What is the capital of France?",
    "Write one word in Japanese.",
    "Count to five.",
    "Name a colour, please.",
    "What did I ask first?",
    "List two animals.",
    "Spell cat.",
    "Say hello.",
    "And goodbye?",
    "Thank you.",
]


def test_replies_are_those_of_whole_prompts(model: Model) -> None:
    """Over ten turns, replies are those of prompts that are decoded whole."""
    chat = Chat(model, logprobs=5, **GREEDY)
    same = 0
    for question in QUESTIONS:
        stream = chat.send(question)
        answer = list(stream)
        asked = model.chat_template.render(chat.messages[:-1])
        same += is_same(answer, list(model.stream(asked, logprobs=5, **GREEDY)))
    assert same >= 5


def test_prompts_cost_what_is_new(model: Model) -> None:
    """Over ten turns, at most 1.1 times the tokens of the text that came after the reply before."""
    chat = Chat(model, **GREEDY)
    n_decoded = n_new = 0
    known = ""
    for question in QUESTIONS:
        stream = chat.send(question)
        list(stream)
        prompt = model.chat_template.render(chat.messages[:-1])
        assert prompt.startswith(known)
        n_new += len(model.tokenize(prompt[len(known) :]))
        known = prompt + stream.raw
        n_decoded += stream.stats.prompt_tokens - stream.stats.cached_tokens
    assert stream.stats.cached_tokens > 200
    assert n_decoded <= 1.1 * n_new
    assert f"{stream.stats.cached_tokens} cached" in str(stream.stats)


@pytest.mark.parametrize("name", ["tiny_gpt_oss", "gemma", "smollm2"])
def test_reuse_gives_the_same_tokens(request: pytest.FixtureRequest, name: str) -> None:
    """With sliding windows too, whose memory cannot go back far: longer, shorter and other prompts."""
    path: Path = request.getfixturevalue(f"{name}_path")
    settings: dict[str, Any] = {"n_ctx": 2048, "n_threads": 2, "n_batch": 64, "repack": "off"}
    n_same = 0
    with Model(path, **settings) as model, Model(path, **settings) as fresh:
        base = model.tokenize("The quick brown fox jumps over the lazy dog. " * 60)
        prompts = [base[:400], base[:450], base[:300], base[:299] + base[5:40], base[:640], base[:17], base[1:300]]
        for prompt in prompts:
            # The reply is longer than a window's memory reaches back.
            reused = model.generate(prompt, reuse=True, temperature=0, max_tokens=150, logprobs=5)
            again = model.generate(prompt, reuse=True, temperature=0, max_tokens=8, logprobs=5)
            assert again.stats.cached_tokens >= len(prompt) - 17
            whole = fresh.generate(prompt, temperature=0, max_tokens=8, logprobs=5)
            assert whole.stats.cached_tokens == 0
            n_same += is_same(again.tokens, whole.tokens) + is_same(reused.tokens[:8], whole.tokens)
        assert n_same >= len(prompts) // 2


def test_edited_history_and_branches(model: Model) -> None:
    """The longest beginning that stays is not decoded again; what comes is what a new conversation would give."""
    chat = Chat(model, system="Be brief.", **GREEDY)
    for question in QUESTIONS[:4]:
        list(chat.send(question))
    other = chat.branch()
    other.messages[5]["content"] = "Name a fruit."  # the third question
    del other.messages[6:]
    stream = other.send(None, logprobs=5)
    answer = list(stream)
    shared = len(model.tokenize(model.chat_template.render(other.messages[:5], add_generation_prompt=False)))
    assert stream.stats.cached_tokens >= shared - 1
    is_same(answer, list(model.stream(model.chat_template.render(other.messages[:6]), logprobs=5, **GREEDY)))
    assert len(chat.messages) == 9
    assert chat.undo() == QUESTIONS[3]
    assert len(chat.messages) == 7
    assert text_of(chat.retry())
    assert chat.messages[-2]["content"] == QUESTIONS[2]
    assert chat.system == "Be brief."
    chat.system = None
    assert chat.messages[0]["role"] == "user"
    with pytest.raises(Error, match="no question yet"):
        Chat(model).retry()


def test_a_reply_that_is_broken_off(model: Model) -> None:
    """What was said stays in the conversation, and the model goes on."""
    chat = Chat(model, temperature=0)
    for token in chat.send("Tell me a long story."):
        if token.text.count(" "):
            break
    assert chat.messages[-1]["role"] == "assistant"
    assert chat.messages[-1]["content"]
    assert text_of(chat.send("Go on.", max_tokens=4))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_nothing_is_lost_when_something_fails(model: Model) -> None:
    """Options that are wrong, streams that overlap, and replies that never began leave a conversation that goes on."""
    chat = Chat(model, **GREEDY)
    list(chat.send("Hello"))
    said = list(chat.messages)
    for wrong in ({"temperature": -5}, {"max_tokens": 0}, {"on_full": "?"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            chat.retry(**wrong)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            chat.send("More", **wrong)
        assert chat.messages == said
    parts = [{"type": "text", "text": "Hello"}]
    list(chat.send({"role": "user", "content": parts}))
    list(chat.retry())
    assert chat.messages[2]["content"] == parts
    assert chat.undo() == parts
    assert chat.messages == said

    one = chat.send("One")
    next(one)
    two = chat.send("Two")  # which closes the first
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2 + ["user"]
    next(two)
    assert chat.undo() == "Two"
    assert list(two) == []
    assert len(chat.messages) == 4
    chat.send("Three").close()
    assert len(chat.messages) == 4
    before = list(chat.messages)
    chat.retry().close()
    assert chat.messages == before


# --- a full context ----------------------------------------------------------------------------


def test_a_full_context(smollm2_path: Path) -> None:
    """An error by default, which loses nothing; with on_full="shift" the oldest turns go, and the stats say so."""
    with Model(smollm2_path, n_ctx=256, n_threads=2) as model:
        chat = Chat(model, system="Be brief.", temperature=0, max_tokens=40)
        with pytest.raises(ContextFullError, match="n_ctx"):
            for _ in range(20):
                list(chat.send("Tell me something about the sea and the wind and the sand."))
        said_until_then = len(chat.messages)
        assert chat.messages[-1]["role"] == "assistant"
        stream = chat.send("What is next?", on_full="shift")
        assert text_of(stream)
        assert stream.stats.dropped_tokens > 0
        assert "dropped" in str(stream.stats)
        assert len(chat.messages) == said_until_then + 2

        # In the middle of a reply: old turns are forgotten, and it goes on.
        chat = Chat(model, system="Be brief.", temperature=0, on_full="shift")
        for _ in range(2):
            list(chat.send("Tell me something about the sea and the wind and the sand.", max_tokens=40))
        long = chat.send("Tell me a very long story.", max_tokens=230, logit_bias={0: -100.0, 2: -100.0})
        list(long)
        assert long.stats.dropped_tokens > 0
        assert long.stats.tokens > 256 - long.stats.prompt_tokens
        assert long.stats.stop_reason in (StopReason.MAX_TOKENS, StopReason.CONTEXT_FULL)
        # Some templates want a question in everything that they render.
        smollm2_like = ChatTemplate(model, template("Qwen3.5-4B"))
        model.chat_template = smollm2_like
        chat = Chat(model, system="Be brief.", on_full="shift", temperature=0, max_tokens=4)
        for _ in range(2):
            assert list(chat.send("Hello"))
    with pytest.raises(ValueError, match="on_full must be one of error, shift"):
        Chat(Model(smollm2_path, n_ctx=256, n_threads=2)).send("x", on_full="wrap")


# --- on disk -----------------------------------------------------------------------------------


def chat_in(file: Path, model: Model) -> Chat | None:
    """Return the chat in a file, or None where that is an error."""
    try:
        return Chat.load(file, model)
    except Error:
        return None


def test_saved_chats(model: Model, tiny_gpt_oss: Model, tmp_path: Path) -> None:
    """They come back whole; damaged ones, and those of other models, are refused."""
    chat = Chat(model, system="Sei höflich. 日本", **GREEDY)
    list(chat.send("Hello 🙂"))
    file = tmp_path / "chat.json"
    chat.save(file)
    assert Chat.load(file, model).messages == chat.messages
    whole = file.read_bytes()
    chance = random.Random(1)
    damaged = [whole[:n] for n in range(0, len(whole) - 1, 7)]
    for _ in range(300):
        at = chance.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :])
    damaged += [b"", b"[]", b"null", b"{}", b"[" * 100_000, b'{"format": "overspill chat 1"}', b"\xff\xfe"]
    for content in damaged:
        file.write_bytes(content)
        if chat_in(file, model) is not None:
            assert Chat.load(file, model).messages == chat.messages, content  # white space, say
        else:
            with pytest.raises(Error, match=r"is damaged|not a chat|another model"):
                Chat.load(file, model)
    with pytest.raises(Error, match="No such file"):
        Chat.load(tmp_path / "none.json", model)
    file.write_bytes(whole)
    tiny_gpt_oss.chat_template = ChatTemplate(tiny_gpt_oss, "{{ messages[0].content }}")
    try:
        with pytest.raises(Error, match="was saved with another model"):
            Chat.load(file, tiny_gpt_oss)
    finally:
        del tiny_gpt_oss.chat_template
