"""Replies in every model's format: reasoning, answer and calls, however the text is cut."""

from __future__ import annotations

import itertools
import json
import logging
import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chats import WEATHER, template, text_of
from overspill import (
    Channel,
    ChatStream,
    ChatTemplate,
    Error,
    Model,
    StopReason,
    _core,
)
from reference_prompts import TEMPLATES

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
    """Return the form of a template's replies."""
    return ChatTemplate(model, template(name)).prepare("Hi", tools=tools).form


def said(form: _core.ReplyForm, texts: list[str]) -> tuple[str, str, list[tuple[str, Any]], str, ChatStream]:
    """Return reasoning, answer, calls, the arguments as they came, and the stream."""
    stream = ChatStream(Spoken(texts), form, lambda text, ids: None)  # type: ignore[arg-type]
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
    raw = '<|channel|>commentary to=functions.get_weather<|message|>{"city": '
    *_, stream = said(form, [raw])
    assert stream.is_malformed
    assert stream.tool_calls == []
    assert '{"city":' in stream.message["content"]


def test_brackets_without_end(smollm2: Model) -> None:
    """A model that repeats one is stopped by an error, and not by the end of the stack."""
    form = form_of(smollm2, "Qwen-Qwen2.5-7B-Instruct", [WEATHER])
    raw = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "'
    for deep in (raw + "[" * 20_000, raw + '", "days": ' + "[{" * 20_000, "[" * 20_000):
        with pytest.raises(Error, match="nested more than 128 deep"):
            form.parser.parse(deep, True)
    *_, stream = said(form, [raw + '", "days": ', *["[["] * 200])
    assert stream.is_malformed
    assert "[[[[" in stream.message["content"]


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
