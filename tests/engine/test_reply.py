"""Replies in every model's format: reasoning, answer and calls, however the text is cut."""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chats import ALL_TEMPLATES, WEATHER, template, text_of
from overspill import (
    Channel,
    ChatStream,
    ChatTemplate,
    Model,
    StopReason,
    _core,
)
from reference_prompts import TEMPLATES
from sweeps import sweep

# One for each way in which llama.cpp reads replies, of those that most people use.
COMMON_TEMPLATES = {
    "openai-gpt-oss-120b",
    "Qwen-Qwen3-0.6B",
    "Qwen3-Coder",
    "meta-llama-Llama-3.1-8B-Instruct",
    "google-gemma-4-31B-it",
    "Kimi-K2-Thinking",
    "mistralai-Ministral-3-14B-Reasoning-2512",
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


def form_of(model: Model, name: str, tools: list[Any] | None = None) -> _core.ReplyForm:
    """Return the form of a template's replies; a ValueError if it cannot tell a model of the tools."""
    return ChatTemplate(model, template(name)).prepare("Hi", tools=tools).form


def as_written(
    model: Model, name: str, message: dict[str, Any], tools: list[Any] | None
) -> tuple[str, str, _core.ReplyForm]:
    """Return a template's prompt, the same with the message as its reply, and the form of replies to it."""
    question = {"role": "user", "content": "Hi"}
    rendered = ChatTemplate(model, template(name))
    prompt = rendered.render([question], tools=tools)
    whole = rendered.render([question, message], tools=tools, add_generation_prompt=False)
    return prompt, whole, form_of(model, name, tools)


def said(
    form: _core.ReplyForm, texts: list[str], reason: StopReason = StopReason.EOS
) -> tuple[str, str, list[tuple[str, Any]], str, ChatStream]:
    """Return reasoning, answer, calls, the arguments as they came, and the stream; what came must be what it has."""
    stream = ChatStream(Spoken(texts, reason), form, lambda text, ids: None)  # type: ignore[arg-type]
    parts: dict[Channel, str] = dict.fromkeys(Channel, "")
    calls = []
    for token in stream:
        parts[token.channel] += token.text
        calls += [(token.tool_call.name, token.tool_call.arguments)] if token.tool_call else []
    assert [(call.name, call.arguments) for call in stream.tool_calls] == calls
    assert (parts[Channel.REASONING], parts[Channel.FINAL]) == (stream.reasoning, stream.text)
    return parts[Channel.REASONING], parts[Channel.FINAL], calls, parts[Channel.TOOL_CALL], stream


@cache
def marks_of(name: str) -> list[str]:
    """Return what looks like a mark in a template's source, and marks of other models."""
    marks = r"</?[^<>\s{}%'\"()=~+]{1,40}>|\[/?[A-Z_]{3,}\]|<function=|<invoke name=\"|<parameter=|to=functions\."
    others = {
        "<|channel|>final<|message|>",
        "<|channel|>analysis<|message|>",
        "<|start|>assistant",
        "</think>",
        "[ARGS]",
    }
    return sorted(others | set(re.findall(marks, template(name))))


@st.composite
def replies(draw: st.DrawFn, name: str) -> str:
    """Return a text of marks, pieces of marks, calls that are whole, wrong or cut off, and words w0z, w1z ... once."""
    marks = st.sampled_from(marks_of(name))
    after = st.sampled_from(
        ["", " ", "\n", ", ", " é🙂", " < ", " {", ' "', " [", "\0", "\x1b[2J", "\ufffd", " </", "\t"]
    )
    calls = [
        '{"name": "get_weather", "arguments": {"city": "WORD"}}',
        '{"name": "get_weather", "parameters": {"city": "WORD"}}',
        '[{"name": "get_weather", "arguments": {"city": "a\nb WORD", "days": 2}}]',
        '{"name": "WORD", "arguments": {}}',
        'get_weather{"city": "WORD"}',
        "get_weather",
        "functions.get_weather:0",
        '{"city": "WORD',
    ]
    pieces = st.one_of(
        after.map(lambda end: f"WORD{end}"),
        marks,
        marks.flatmap(lambda mark: st.integers(1, len(mark)).map(lambda n: mark[:n])),
        st.sampled_from(calls),
        st.sampled_from(["\n", " ", "```", "json\n"]),
    )
    text = "".join(draw(st.lists(pieces, min_size=1, max_size=12)))
    number = itertools.count()
    return re.sub("WORD", lambda _: f"w{next(number)}z", text)


def assert_nothing_is_lost(form: _core.ReplyForm, raw: str, cuts: list[int]) -> None:
    """Every word of the reply is in one part, once, and the parts are the same however it is cut."""
    outcomes = []
    spans = itertools.pairwise([0, *sorted({cut % len(raw) for cut in cuts} - {0}), len(raw)])
    for texts in ([raw], list(raw), [raw[a:b] for a, b in spans]):
        reasoning, answer, calls, arguments, stream = said(form, texts)
        assert "".join(json.dumps(made, ensure_ascii=False) for _, made in calls).count("w") == arguments.count("w")
        shown = f"{reasoning}|{answer}|{arguments}|{' '.join(name for name, _ in calls)}"
        words = re.findall(r"w\d+z", raw)
        assert {word: len(re.findall(word, shown)) for word in words} == dict.fromkeys(words, 1)
        assert stream.raw == raw
        outcomes.append((reasoning, answer, calls))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize("case", HARMONY)
def test_harmony_however_it_is_cut(smollm2: Model, case: str) -> None:
    """Reasoning, answer and calls are the same at every chunk boundary, and at many random ones."""
    raw, (reasoning, answer, calls) = HARMONY[case]
    form = form_of(smollm2, TEMPLATES["gpt-oss"], [WEATHER])
    cuts = [[at] for at in range(1, len(raw))]
    shuffled = random.Random(1)
    cuts += [sorted(shuffled.sample(range(1, len(raw)), min(n, len(raw) - 1))) for n in (2, 5, 20, 1000)]
    for cut in cuts:
        texts = [raw[a:b] for a, b in itertools.pairwise([0, *cut, len(raw)])]
        *got, arguments, stream = said(form, texts)
        assert (got[0], got[1], got[2]) == (reasoning, answer, calls), cut
        assert not stream.is_malformed
        if calls:
            assert json.loads(arguments) == calls[0][1]
            assert stream.message["tool_calls"][0]["function"]["name"] == "get_weather"


def test_thinking_in_tags(smollm2: Model) -> None:
    """Qwen's and DeepSeek's thoughts are told from the answer, however the text is cut."""
    for name, begun in (("qwen3", "<think>\n"), ("deepseek r1", "")):
        raw = begun + "Two and two.\n</think>\n\nIt is **4**, a < b."
        form = form_of(smollm2, TEMPLATES[name])
        for at in range(1, len(raw)):
            reasoning, answer, *_ = said(form, [raw[:at], raw[at:]])
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
    form = form_of(smollm2, TEMPLATES["gpt-oss"])
    for texts in ([raw], list(raw)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="overspill"):
            reasoning, answer, _, _, stream = said(form, texts)
        assert stream.is_malformed
        assert stream.raw == raw
        assert answer
        assert raw.endswith(answer)
        assert reasoning in raw
        assert "does not follow the model's own format" in caplog.text
        assert stream.message["content"] == answer


def test_calls_with_arguments_that_are_no_json(smollm2: Model) -> None:
    """They are given as text."""
    form = form_of(smollm2, TEMPLATES["gpt-oss"], [WEATHER])
    raw = "<|channel|>commentary to=functions.get_weather<|message|>"
    odd = ('{"city": "\\ud800"}', '{"days": 1e999}', '{"city": "a", "city": "b"}', '{"days": {"a": 1, "a": 2}}')
    for arguments in (*odd, '{"city": ', "[1]", '"x"', "7", '{"city": "\\', '{"days": 1' + "0" * 5000 + "}"):
        for texts in ([raw + arguments], list(raw + arguments)):
            _, answer, calls, given, stream = said(form, texts)
            assert (calls, given) == ([], "")
            assert stream.is_malformed
            assert answer.endswith(arguments)
            assert stream.message["content"] == answer


FINAL, NEXT = "<|channel|>final<|message|>", "<|end|><|start|>assistant"
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
TO_WEATHER = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}'
PARIS = [("get_weather", {"city": "Paris"})]
HERMES = "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use"


@pytest.mark.parametrize(
    ("name", "has_tools", "raw", "reasoning", "answer", "calls", "is_malformed"),
    [
        ("llama 3.1", True, 'As {"name": "Ann", "age": 3}.', "", 'As {"name": "Ann", "age": 3}.', [], False),
        ("llama 3.1", True, 'As {"name": "get_we', "", 'As {"name": "get_we', [], False),
        ("llama 3.1", True, "if (a) { b(); } else {", "", "if (a) { b(); } else {", [], False),
        ("llama 3.1", True, CALL.replace("arguments", "parameters"), "", "", PARIS, False),
        ("llama 3.1", True, CALL.replace("arguments", "parameters") + "Now.", "", "Now.", PARIS, False),
        ("qwen3", True, "<think>a < b and <tool then</think>c < d <", "a < b and <tool then", "c < d <", [], False),
        ("qwen3", True, "<think>a < b</thi", "a < b</thi", "", [], False),
        ("Qwen3-Coder", True, "x <tool_call> y</think> z", "", "x <tool_call> y</think> z", [], True),
        ("Qwen3.5-4B", True, "a <tool_call> b</think>c", "a <tool_call> b", "c", [], True),
        (HERMES, True, f"Well. <tool_call>\n{CALL}\n</tool_call>", "", "Well. ", PARIS, False),
        (HERMES, True, f"<tool_call>\n{CALL}\n</tool_call> Done.", "", "Done.", PARIS, False),
        (
            HERMES,
            True,
            f"<tool_call>\n{CALL.replace('Par', chr(10))}\n</tool_call>",
            "",
            "",
            [("get_weather", {"city": "\nis"})],
            False,
        ),
        (HERMES, False, f"<tool_call>{CALL}</tool_call>", "", f"<tool_call>{CALL}</tool_call>", [], False),
        (HERMES, True, "<tool_call>\n{}</tool_call>", "", "<tool_call>\n{}</tool_call>", [], True),
        ("gpt-oss", True, f"{FINAL}One.{NEXT}{FINAL}Two.{NEXT}{FINAL}Three.", "", "One.Two.Three.", [], False),
        (
            "gpt-oss",
            False,
            f"{FINAL}One.{NEXT}<|channel|>analysis<|message|>Hm.{NEXT}{FINAL}Two.<|end|>",
            "Hm.",
            "One.Two.",
            [],
            False,
        ),
        ("gpt-oss", True, f"{FINAL}One.{NEXT}{TO_WEATHER}", "", "One.", PARIS, False),
        ("gpt-oss", False, TO_WEATHER, "", TO_WEATHER, [], True),
        ("gpt-oss", True, TO_WEATHER.replace("get_", "no_"), "", TO_WEATHER.replace("get_", "no_"), [], True),
        ("gpt-oss", True, f"Text{NEXT}{FINAL}Two.", "", "Text<|end|>Two.", [], True),
        ("gemma 4", False, "<|channel>thought\nHm.<channel|>One.<channel|>Two.", "Hm.", "One.<channel|>Two.", [], True),
    ],
)
def test_each_part_is_in_its_place(
    smollm2: Model, name: str, has_tools: bool, raw: str, reasoning: str, answer: str, calls: Any, is_malformed: bool
) -> None:
    """Of replies that do something special, at every cut in two and character by character."""
    form = form_of(smollm2, TEMPLATES.get(name, name), [WEATHER] if has_tools else None)
    for texts in (list(raw), *([raw[:at], raw[at:]] for at in range(len(raw)))):
        *got, _, stream = said(form, texts)
        assert got == [reasoning, answer, calls], texts
        assert stream.is_malformed == is_malformed


@pytest.mark.parametrize("name", sweep(ALL_TEMPLATES, {ALL_TEMPLATES.index(name) for name in COMMON_TEMPLATES}))
@pytest.mark.parametrize("has_tools", [False, True])
def test_no_word_is_lost(smollm2: Model, name: str, has_tools: bool) -> None:
    """Every word of any text is in the reasoning, the answer or a call, once, and its cut makes no difference."""
    try:
        form = form_of(smollm2, name, [WEATHER] if has_tools else None)
    except ValueError:
        form = form_of(smollm2, name)  # the template does not tell the model of tools

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(replies(name), st.lists(st.integers(1, 500), max_size=6))
    def check(raw: str, cuts: list[int]) -> None:
        assert_nothing_is_lost(form, raw, cuts)

    check()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_text_is_text(smollm2: Model, text: str) -> None:
    """Where a format has no marks, the answer is the reply, character for character."""
    _, answer, calls, _, stream = said(form_of_smollm2(smollm2), list(text))
    assert (answer, calls, stream.is_malformed) == (text, [], False)


@cache
def form_of_smollm2(model: Model) -> _core.ReplyForm:
    """Return the form of replies in ChatML."""
    return ChatTemplate(model).prepare("Hi").form


@pytest.mark.parametrize("name", sweep(ALL_TEMPLATES, {ALL_TEMPLATES.index(name) for name in COMMON_TEMPLATES}))
def test_a_template_s_own_messages_are_read_back(smollm2: Model, name: str) -> None:
    """A message that the template writes into a prompt is the reply that is read from there."""
    call = {
        "type": "function",
        "id": "call00001",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": "It is {4}, a < b."},
        {"role": "assistant", "content": "It is {4}, a < b.", "reasoning_content": "Two <and> {two}."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    end = re.compile(r"(?:</?[^<>\s]{1,40}>|\[e~\[|assistant|\s)*")  # how the template ends a message
    n_read = 0
    for message, tools in itertools.product(messages, ([WEATHER], None)):
        if (tools is None and "tool_calls" in message) or (tools is not None and name in UNREADABLE_WITH_TOOLS):
            continue
        try:
            prompt, whole, form = as_written(smollm2, name, message, tools)
        except ValueError:  # some templates want another order, or know no tools
            continue
        raw = whole.removeprefix(prompt)
        if raw == whole or name in ("NVIDIA-Nemotron-Nano-v2", "upstage-Solar-Open-100B"):
            continue  # the prompt begins a thought, which the message does not have; or <|content|> is not known
        thought = message.get("reasoning_content", "")
        if not all(part in raw for part in (message["content"], thought, "Paris" if "tool_calls" in message else "")):
            continue  # the template does not write it
        reasoning, answer, calls, *_ = said(form, list(raw))
        assert reasoning.strip() == thought
        assert calls == ([("get_weather", {"city": "Paris"})] if "tool_calls" in message else [])
        assert answer.strip().startswith(message["content"])
        assert end.fullmatch(answer.strip()[len(message["content"]) :]), answer
        n_read += 1
    assert n_read or name not in COMMON_TEMPLATES


# What llama.cpp makes of these templates does not read what they write.
UNREADABLE_WITH_TOOLS = {"Mistral-Small-3.2-24B-Instruct-2506", "upstage-Solar-Open-100B"}


@pytest.mark.parametrize("reason", [StopReason.MAX_TOKENS, StopReason.CLOSED])
def test_a_reply_that_is_cut_off(smollm2: Model, reason: StopReason) -> None:
    """A call that is complete is one; of another, the answer has what there is. Neither is malformed."""
    form = form_of(smollm2, HERMES, [WEATHER])
    raw = f"Well. <tool_call>\n{CALL}\n</tool_call>"
    for n in range(1, len(raw) + 1):
        reasoning, answer, calls, arguments, stream = said(form, list(raw[:n]), reason)
        assert (reasoning, stream.is_malformed) == ("", False)
        if raw.index("}}") + 2 <= n:
            assert (calls, json.loads(arguments)) == (PARIS, PARIS[0][1])
            assert answer == "Well. " or raw[:n].endswith(answer.removeprefix("Well. "))
        else:
            assert (calls, arguments) == ([], "")
            assert answer == raw[:n] or (answer == "Well. " and raw[:n].strip().endswith("<tool_call>"))


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("llama 3.1", "As {"),
        ("llama 3.1", ""),
        ("qwen3", "<think>"),
        ("gpt-oss", FINAL),
        (HERMES, "<tool_call>{"),
        ("gpt-oss", ""),
    ],
)
def test_a_long_reply_comes_as_it_is_made(smollm2: Model, name: str, beginning: str) -> None:
    """Whether it follows the format or not, no more waits than what may be a mark."""
    stream = ChatStream(
        Spoken([beginning, *["abc "] * 1000]),  # type: ignore[arg-type]
        form_of(smollm2, TEMPLATES.get(name, name), [WEATHER]),
        lambda text, ids: None,
    )
    for token in stream:
        n_given = len(stream.reasoning) + len(stream.text)
        assert n_given >= len(stream.raw) - len(beginning) - 4, token
    assert (stream.reasoning + stream.text).endswith("abc " * 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("gpt-oss", FINAL),
        ("qwen3", "<think>"),
        (HERMES, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "'),
        ("Qwen3-Coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\n"),
    ],
)
def test_a_reply_of_any_length(smollm2: Model, name: str, beginning: str) -> None:
    """A token costs the same after many; otherwise this would take minutes."""
    reader = form_of(smollm2, TEMPLATES.get(name, name), [WEATHER]).new_reader()
    started = time.monotonic()
    n = 0
    for text in itertools.chain([beginning], ["a < ", "b [", "c\\n ", "</d "] * 25_000):
        n += sum(len(piece.text) for piece in reader.add(text))
    assert n + sum(len(piece.text) for piece in reader.finish(False)) >= 350_000
    assert time.monotonic() - started < 60


def test_brackets_without_end(smollm2: Model) -> None:
    """A model that repeats one gets them as text, and does not reach the end of the stack."""
    form = form_of(smollm2, "Qwen-Qwen2.5-7B-Instruct", [WEATHER])
    raw = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "'
    for deep in (raw + "[" * 20_000, raw + '", "days": ' + "[{" * 20_000, "[" * 20_000, '{"a":' * 20_000):
        for texts in ([deep], [deep[at : at + 64] for at in range(0, len(deep), 64)]):
            _, answer, calls, _, stream = said(form, texts)
            assert (answer, calls) == (deep, [])
            assert stream.is_malformed == deep.startswith("<tool_call>")


@pytest.mark.parametrize("name", sweep(ALL_TEMPLATES, {ALL_TEMPLATES.index(name) for name in COMMON_TEMPLATES}))
def test_long_parts(smollm2: Model, name: str) -> None:
    """Each part of a long reply is whole, character for character, and the call after it is read."""
    random_ = random.Random(1)
    pieces = ["word ", "é🙂", "< </thi ", "a < b", "[1, {2}]", "\\", '"quoted"', "\n", "</", "\u00e9 "]
    content, thought, city = ("".join(random_.choices(pieces, k=1500)).strip() + end for end in "xyz")
    arguments = json.dumps({"city": city, "days": 2}, ensure_ascii=random_.random() < 0.5)
    call = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": arguments}}
    for with_call, with_thought in itertools.product((False, True), repeat=2):
        message: dict[str, Any] = {"role": "assistant", "content": content}
        message |= {"tool_calls": [call]} if with_call else {}
        message |= {"reasoning_content": thought} if with_thought else {}
        tools = [WEATHER] if with_call else None
        try:
            prompt, whole, form = as_written(smollm2, name, message, tools)
        except ValueError:  # some templates want another order, or know no tools
            continue
        raw = whole.removeprefix(prompt)
        outcomes = [said(form, texts)[:3] for texts in (*cuts(raw), [raw[:5000], raw[5000:]])]
        assert outcomes[0] == outcomes[1] == outcomes[2]
        reasoning, answer, calls = outcomes[0]
        assert [made for _, made in calls] in ([], [{"city": city, "days": 2}])
        for text in (content, thought):
            assert text in f"{reasoning}|{answer}" or text not in raw
    assert name not in COMMON_TEMPLATES or raw != whole


DEPTHS = [1, 2, 50, 127, 128, 129, 130, 300, 1000, 5000]


@pytest.mark.parametrize("name", sweep(ALL_TEMPLATES, {ALL_TEMPLATES.index(name) for name in COMMON_TEMPLATES}))
def test_brackets_of_any_depth(smollm2: Model, name: str) -> None:
    """In texts they are text, and the call after them is one; in arguments, a call that is too deep is text."""
    rendered = ChatTemplate(smollm2, template(name))
    question = {"role": "user", "content": "Hi"}

    def written(content: str, arguments: str) -> str | None:
        function = {"name": "get_weather", "arguments": arguments}
        call = {"type": "function", "id": "call00001", "function": function}
        message = {"role": "assistant", "content": content, "tool_calls": [call]}
        try:
            prompt = rendered.render([question], tools=[WEATHER])
            whole = rendered.render([question, message], tools=[WEATHER], add_generation_prompt=False)
        except ValueError:  # some templates want another order, or know no tools
            return None
        raw = whole.removeprefix(prompt)
        return raw if raw != whole and content in raw and "Paris" in raw else None

    try:
        form = form_of(smollm2, name, [WEATHER])
    except ValueError:
        form = form_of(smollm2, name)
    shallow = written("w0z w1z", '{"city": "Paris"}')
    reads_calls = shallow is not None and said(form, [shallow])[2] == PARIS and "w0z w1z" in said(form, [shallow])[1]
    for depth in DEPTHS:
        for bracket in ("[", '{"a":', "("):
            text = f"w0z {bracket * depth} w1z"
            raw = text if shallow is None else shallow.replace("w0z w1z", text)
            by_cut = [said(form, texts)[:3] for texts in cuts(raw)]
            assert by_cut[0] == by_cut[1]
            reasoning, answer, calls = by_cut[0]
            assert text in f"{reasoning}|{answer}", depth
            if reads_calls and not begins_a_call(form, bracket):
                assert calls == PARIS, (depth, bracket)
        if shallow is not None:
            raw = shallow.replace("Paris", f"w2z{'[' * depth}w3z")
            nested = shallow.replace('"Paris"', "[" * depth + '"w2z w3z"' + "]" * depth)
            for texts in (*cuts(raw), *(cuts(nested) if '"Paris"' in shallow else ())):
                reasoning, answer, calls, arguments, _ = said(form, texts)
                shown = f"{reasoning}|{answer}|{arguments}"
                assert [shown.count(f"w{i}z") for i in range(4)] == [1] * 4, depth
                if reads_calls and "".join(texts) == raw:
                    assert calls == [("get_weather", {"city": f"w2z{'[' * depth}w3z"})], depth


def cuts(raw: str) -> list[list[str]]:
    """Return a text as a whole, and in small pieces."""
    return [[raw], [raw[at : at + 7] for at in range(0, len(raw), 7)]]


def begins_a_call(form: _core.ReplyForm, text: str) -> bool:
    """Return whether a text waits, since calls begin with it."""
    return "".join(piece.text for piece in form.new_reader().add(f"a {text}")).strip() == "a"


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
