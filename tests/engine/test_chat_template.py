"""Prompts of conversations, as other libraries render them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from chats import GREEDY, template, text_of
from overspill import (
    ChatTemplate,
    Error,
    Model,
)
from programs import SUPPORT
from reference_prompts import CONVERSATIONS, TEMPLATES

REFERENCE: dict[str, dict[str, list[str]]] = json.loads(
    (SUPPORT / "reference_prompts.json").read_text(encoding="utf-8")
)


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


def test_templates_that_end_before_they_begin(model: Model) -> None:
    """An end token in what asks for the reply ends nothing, with a grammar either."""
    model.chat_template = ChatTemplate(
        model,
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_end|>go:{% endif %}",
    )
    assert text_of(model.chat("x", json_schema={"enum": [1, 2]})) in ("1", "2")
    assert text_of(model.chat("x", **GREEDY)) is not None
