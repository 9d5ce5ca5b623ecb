"""Functions that become tools, and tools that a model calls."""

from __future__ import annotations

import enum
import json
from typing import Any, Literal

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


SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]}


@pytest.mark.parametrize("key", ["parameters", "inputSchema", "input_schema"])
def test_schemas_by_any_usual_key(key: str) -> None:
    """OpenAI's, MCP's and Anthropic's: a template gets them by one."""
    for tool in ({"name": "f", key: SCHEMA}, {"type": "function", "function": {"name": "f", key: SCHEMA}}):
        assert describe_tools([tool])[0]["function"] == {"name": "f", "description": "", "parameters": SCHEMA}


def test_nulls_are_left_out() -> None:
    """A template would take them for texts."""
    city = {"type": "string", "description": None, "default": None}
    tool = {
        "name": "f",
        "description": None,
        "parameters": {"type": "object", "title": None, "properties": {"a": city}},
    }
    expected = {"type": "object", "properties": {"a": {"type": "string", "default": None}}}
    assert describe_tools([tool])[0]["function"] == {"name": "f", "description": "", "parameters": expected}
    assert describe_tools([{"name": "f", "parameters": None}])[0]["function"]["parameters"]["properties"] == {}


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ({"name": "f", "params": SCHEMA}, "params is not known"),
        ({"name": "f", "parameters": SCHEMA, "inputSchema": SCHEMA}, "parameters and inputSchema say the same"),
        ({"type": "function", "function": {"name": "f"}, "inputSchema": SCHEMA}, "inputSchema must be in its function"),
        ({"type": "web_search_20250305", "name": "web_search"}, "type must be"),
        ({"name": "f", "input_schema": [1]}, "input_schema must be a JSON schema"),
        ({"name": "f", "parameters": {"type": "string"}}, "parameters must be the JSON schema of an object"),
        ({"name": "f", "parameters": {"properties": None}}, "parameters must be a JSON schema"),
        ({"name": "f", "description": 3}, "description must be a string"),
        ({"name": "", "parameters": SCHEMA}, 'must have a "name"'),
        ({"name": "f", "parameters": {"enum": [float("nan")]}}, "JSON"),
        ({"name": "\ud800"}, "surrogates"),
        (print, "args cannot be given by its name"),
        (int, "int cannot be described"),
    ],
)
def test_a_tool_in_another_form_is_refused(tool: Any, text: str) -> None:
    """Rather than that the model is told of a tool without parameters."""
    with pytest.raises((TypeError, ValueError), match=rf"^tools\[0\].*{text}"):
        describe_tools([tool])


@pytest.mark.parametrize("role", ["usr", "User", "", "critic", "\n"])
def test_a_role_that_the_template_does_not_know(tiny_gpt_oss: Model, role: str) -> None:
    """It would be rendered like any other, or left out."""
    mark = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    message = {"role": role, "content": "Hello"}
    with pytest.raises(
        ValueError, match=r"^messages\[0\]: role must be one of system, developer, user, assistant, tool, not"
    ):
        ChatTemplate(tiny_gpt_oss, mark).render([message])
    if role == "critic":
        knows = ChatTemplate(tiny_gpt_oss, f"{mark}{{% if messages[0].role == 'critic' %}}!{{% endif %}}")
        assert knows.render([message]) == "<critic>Hello!"


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
