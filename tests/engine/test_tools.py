"""Functions that become tools, and tools that a model calls."""

from __future__ import annotations

import enum
import json
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from chats import WEATHER, template, text_of
from overspill import (
    Channel,
    Chat,
    ChatTemplate,
    Model,
)
from overspill.engine.tools import describe_tools
from reference_prompts import TEMPLATES


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
    close = [*model.tokenize('"}', add_special=False), *model.tokenize("<|im_end|>", add_special=False)]
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
    assert reply.tool_calls
    for call in reply.tool_calls:
        assert call.name == "get_weather"
        assert isinstance(call.arguments["city"], str)
    assert [token.tool_call for token in tokens if token.tool_call] == reply.tool_calls
    arguments = [json.loads(token.text) for token in tokens if token.channel == Channel.TOOL_CALL and token.text]
    assert arguments == [call.arguments for call in reply.tool_calls]
    chat = Chat(model, temperature=0)
    chat.messages = [{"role": "user", "content": "Weather in Paris?"}, reply.message]
    for call in reply.tool_calls:
        chat.add_result(call, {"degrees": 20})
    assert text_of(chat.send(max_tokens=8))
    with pytest.raises(ValueError, match="knows no tools"):
        ChatTemplate(model, template(TEMPLATES["gemma 2"])).prepare("x", tools=[WEATHER])
