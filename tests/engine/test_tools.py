"""Functions that become tools, and tools that a model calls."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from chats import ALL_TEMPLATES, WEATHER, template, text_of
from overspill import (
    Channel,
    Chat,
    ChatTemplate,
    Model,
)
from overspill.engine.template import ToolChoice
from overspill.engine.tools import describe_tools
from reference_prompts import TEMPLATES
from sweeps import sweep


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


@pytest.mark.parametrize("role", ["usr", "User", "", "critic", "content", "\n"])
def test_a_role_that_the_template_does_not_know(tiny_gpt_oss: Model, role: str) -> None:
    """It would be rendered like any other, or left out."""
    mark = "{% for m in messages %}<{{ m.role or '' }}>{{ m['content'] }}{% endfor %}"
    message = {"role": role, "content": "Hello"}
    with pytest.raises(
        ValueError, match=r"^messages\[0\]: role must be one of system, developer, user, assistant, tool, not"
    ):
        ChatTemplate(tiny_gpt_oss, mark).render([message])
    if role == "critic":
        knows = ChatTemplate(tiny_gpt_oss, f"{mark}{{% if messages[0].role == 'critic' %}}!{{% endif %}}")
        assert knows.render([message]) == "<critic>Hello!"


@pytest.mark.parametrize(
    "name",
    [
        "MiMo-VL",
        "Qwen-Qwen2.5-7B-Instruct",
        "Qwen-Qwen3-0.6B",
        "ibm-granite-granite-4.0",
        "meta-llama-Llama-3.1-8B-Instruct",
    ],
)
def test_a_required_call_comes_at_once(model: Model, name: str) -> None:
    """A small model that would talk first, and hardly come to an end, calls before it says anything."""
    parameters = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
    paint = {"name": "paint", "description": "Paint.", "parameters": {**parameters, "additionalProperties": False}}
    model.chat_template = ChatTemplate(model, template(name))
    stream = model.chat("What is gravity?", tools=[paint], tool_choice="required", temperature=0, max_tokens=120)
    for token in stream:
        if token.tool_call is not None:
            assert token.tool_call.arguments["colour"] in ("red", "green")
            break
        assert token.channel != Channel.FINAL or not token.text.strip()
    else:
        raise AssertionError("there is no call")


def test_tools_a_model_calls(model: Model) -> None:
    """With a template that knows tools, one that is required is called with arguments that fit."""
    model.chat_template = ChatTemplate(model, template(HERMES))
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


HERMES = "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use"
ALARM = {
    "name": "set_alarm",
    "description": "Set it.",
    "parameters": {
        "type": "object",
        "properties": {
            "hour": {"type": "integer", "minimum": 0, "maximum": 23},
            "days": {"type": "array", "items": {"enum": ["mon", "tue"]}, "minItems": 1},
            "tone": {"type": "string", "pattern": "^[a-z]+$"},
        },
        "required": ["hour", "days"],
        "additionalProperties": False,
    },
}
# The formats in which each value stands between marks of its own: a text in any form.
TEXTS_ARE_FREE = {
    *("ByteDance-Seed-OSS", "GLM-4.6", "Qwen3-Coder", "Qwen3.5-4B", "StepFun3.5-Flash", "deepseek-ai-DeepSeek-V3.2"),
    *("deepseek-ai-DeepSeek-V4", "deepseek-ai-DeepSeek-V4-Flash-0731", "inclusionai-ling-3.0-flash", "muse-glimmer"),
    *("poolside-Laguna-S-2.1", "tencent-Hy3"),
}
# Those that are not JSON within values either.
VALUES_ARE_FREE = {"MiniMax-M3"}
# Those that llama.cpp holds to no schema.
ALL_IS_FREE = {
    *("Kimi-K3", "LFM2.5-8B-A1B", "google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved"),
    *("LFM2-8B-A1B", "LFM2.5-Instruct"),
}
ALWAYS = ("openai-gpt-oss-120b", "Qwen3-Coder", "meta-llama-Llama-3.1-8B-Instruct", "google-gemma-4-31B-it")


@pytest.fixture(scope="module")
def wide_model(tiny_gpt_oss: Model) -> Iterator[Model]:
    """Yield a model with room for long templates, byte by byte."""
    with Model(tiny_gpt_oss.path, offload="cpu", n_ctx=4096, n_threads=1) as model:
        yield model


def reached(model: Model, raw: str, tool: dict[str, Any], tool_choice: ToolChoice = "required") -> int:
    """Return how many bytes of a reply the grammar of its calls lets through."""
    of_bytes = {model.token_bytes(token): token for token in range(model.n_vocab)}
    asked: list[int] = []
    refusal = ""

    def say(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> int:
        asked.append(raw.encode()[len(asked)])
        return of_bytes[bytes(asked[-1:])]

    try:
        list(model.chat("Hi", tools=[tool], tool_choice=tool_choice, sampler=say, max_tokens=len(raw.encode())))
    except ValueError as error:
        refusal = str(error)
    assert not refusal or "is not a token that the grammar allows here" in refusal
    return len(asked) - bool(refusal)


@pytest.mark.parametrize("name", sweep(ALL_TEMPLATES, {ALL_TEMPLATES.index(name) for name in ALWAYS}))
def test_arguments_fit_their_schema(wide_model: Model, name: str) -> None:
    """A call as the template itself writes it comes through to the argument that does not fit."""
    wide_model.chat_template = ChatTemplate(wide_model, template(name))

    def written(**arguments: Any) -> str:
        function = {"name": "set_alarm", "arguments": json.dumps(arguments)}
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "1", "function": function}],
        }
        question = {"role": "user", "content": "Hi"}
        chat = wide_model.chat_template
        prompt = chat.prepare([question], tools=[ALARM]).text
        whole = chat.render([question, call], tools=[ALARM], add_generation_prompt=False)
        return whole.removeprefix(prompt) if whole.startswith(prompt) else ""

    def end_of(value: str, raw: str) -> int:
        return len(raw[: raw.index(value)].encode()) + len(value)

    try:
        good = written(hour=7, days=["mon", "tue"], tone="abc")
    except ValueError:
        good = ""
    if not good:
        pytest.skip("the template does not write this conversation, or the prompt has the beginning of the reply")
    wrong: list[tuple[str, str, dict[str, Any]]] = [
        ("7", "24", {"hour": 24, "days": ["mon"]}),
        ("mon", "wed", {"hour": 7, "days": ["wed"]}),
        ("abc", "ABC", {"hour": 7, "days": ["mon"], "tone": "ABC"}),
    ]
    # Of some, llama.cpp knows another form than the template writes.
    n_good = reached(wide_model, good, ALARM)
    written_so = [
        (value, written(**arguments))
        for right, value, arguments in wrong
        if right in good and n_good >= end_of(right, good)
    ]
    assert len(written_so) == 3 or name not in ALWAYS
    free = {"ABC"} if name in TEXTS_ARE_FREE else {"ABC", "wed"} if name in VALUES_ARE_FREE else set()
    expected = {value: name in ALL_IS_FREE or value in free for value, _ in written_so}
    found = {value: reached(wide_model, raw, ALARM) >= end_of(value, raw) for value, raw in written_so}
    assert found == expected


@pytest.mark.parametrize(
    ("a", "rest", "fits", "does_not"),
    [
        ({"type": "number", "minimum": 0.5}, {}, "-7", '"'),
        ({"type": "integer", "multipleOf": 2}, {}, "7", "7."),
        ({"type": "string", "format": "uri"}, {}, '"x', "7"),
        ({"type": "string", "pattern": "a(?!b)"}, {}, '"x', "7"),
        ({"type": "array", "uniqueItems": True}, {}, "[1, 1]", "7"),
        ({"not": {}}, {}, '{"x": [7]}', "x"),
        ({"$ref": "#/$defs/x"}, {"$defs": {"x": {"nullable": True}}}, '"x"', "x"),
        ({"$ref": "https://example.com/x"}, {}, '"x"', "x"),
        ({"type": "integer"}, {"minProperties": 1}, "7", "x"),
        ({"type": "integer"}, {"patternProperties": {"x": {}}, "required": ["a"]}, "7", "x"),
    ],
)
def test_what_no_grammar_holds_is_free(
    wide_model: Model, a: dict[str, Any], rest: dict[str, Any], fits: str, does_not: str
) -> None:
    """A parameter with a keyword of that kind has any value of its type, and the others are held as ever."""
    wide_model.chat_template = ChatTemplate(wide_model, template(HERMES))
    parameters = {"type": "object", "properties": {"b": {"type": "integer", "maximum": 5}, "a": a}, **rest}
    tool = {"name": "set_alarm", "parameters": parameters}
    call = '<tool_call>\n{"name": "set_alarm", "arguments": '
    for argument, is_let_through in [
        (f'"a": {fits}', True),
        (f'"a": {does_not}', False),
        ('"b": 6', False),
    ]:
        raw = f"{call}{{{argument}"
        assert (reached(wide_model, raw, tool) == len(raw.encode())) == is_let_through, argument


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "call"),
    [
        (HERMES, "", '<tool_call>\n{"name": "set_alarm", "arguments": '),
        (
            "openai-gpt-oss-120b",
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>commentary to=functions.set_alarm <|constrain|>json<|message|>",
        ),
    ],
)
def test_a_call_after_a_long_text(wide_model: Model, name: str, before: str, call: str) -> None:
    """The text is free, and the grammar holds from the call's marks on."""
    wide_model.chat_template = ChatTemplate(wide_model, template(name))
    for text in ("x", "A <tool_cal and é. " * 60):
        raw = f'{before}{text}{call}{{"hour": 24'
        assert reached(wide_model, raw, ALARM, "auto") == len(raw.encode()) - 1


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"properties": {"a": {"type": "number", "multipleOf": {}}}}, "#/properties/a: multipleOf"),
        ({"properties": {"a": {"type": "strin"}}}, "#/properties/a: unrecognized type 'strin'"),
        ({"type": "object", "required": ["x"], "additionalProperties": False}, "required 'x' must not be there"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "leads nowhere"),
        ({"properties": {"a": {"items": {"$ref": "#"}, "minItems": 1}}, "required": ["a"]}, "no value that ends"),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "unbalanced parentheses"),
        ({"properties": {name: {"type": "string", "maxLength": 99999} for name in "abc"}}, "more than 1000000 steps"),
    ],
)
@pytest.mark.parametrize("name", [HERMES, "Qwen3-Coder"])
def test_schemas_of_tools_that_are_refused(tiny_gpt_oss: Model, name: str, parameters: Any, text: str) -> None:
    """As those of replies are, and the error names the tool."""
    tiny_gpt_oss.chat_template = ChatTemplate(tiny_gpt_oss, template(name))
    tools = [{"name": "look_up", "parameters": parameters}]
    with pytest.raises(ValueError, match=r"^tools: (look_up: )?.*" + re.escape(text)):
        tiny_gpt_oss.chat("Hi", tools=tools, tool_choice="required")
