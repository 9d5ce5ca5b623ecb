"""The Responses API as OpenAI's own client sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from client_tasks import WEATHER, Colour
from model_fixtures import with_template
from overspill import Model
from overspill.server.responses import ResponsesRequest
from servers import Server, serving

QUESTION = "Name three colours of the rainbow."
TOOL: Any = {"type": "function", **WEATHER, "strict": True}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """Return SmolLM2 with a template by which every reply begins with reasoning."""
    return with_template(smollm2_path, tmp_path_factory.mktemp("models") / "thinker.gguf", "Qwen-QwQ-32B")


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tool_user: Path, thinker: Path) -> Iterator[Server]:
    """Serve all three."""
    options = ("--ctx", 1024, "--parallel", 1, "--offload", "cpu")
    with serving(smollm2_path, tool_user, thinker, *options) as started:
        yield started


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    """Return OpenAI's client."""
    return server.client()


@pytest.fixture(scope="module")
def name(smollm2_path: Path) -> str:
    """Return the model's name."""
    return smollm2_path.stem


def streamed(client: openai.OpenAI, **options: Any) -> list[Any]:
    """Return the events of a streamed answer, which are numbered without a gap."""
    with client.responses.create(stream=True, **options) as stream:
        events: list[Any] = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def test_an_answer_is_the_engines(client: openai.OpenAI, name: str, smollm2_path: Path) -> None:
    """Greedy, its text and its numbers are those of a chat with the same messages."""
    with Model(smollm2_path, n_ctx=1024, offload="cpu") as model:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
        reply = model.ask(messages, temperature=0, max_tokens=8)
    response = client.responses.create(
        model=name, instructions="Be brief.", input=QUESTION, temperature=0, max_output_tokens=8, metadata={"a": "b"}
    )
    assert response.output_text == reply.text
    assert (response.status, response.temperature, response.metadata) == ("incomplete", 0, {"a": "b"})
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.input_tokens == reply.stats.prompt_tokens
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == reply.stats.prompt_tokens + 8


def test_a_conversation_in_items(client: openai.OpenAI, name: str, smollm2_path: Path) -> None:
    """What an answer consists of can be sent back, in front of the next question."""
    first = client.responses.create(model=name, input=QUESTION, temperature=0, max_output_tokens=8)
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    items += [item.model_dump() for item in first.output]
    items += [{"type": "message", "role": "user", "content": "And a fourth?"}]
    second = client.responses.create(model=name, input=items, temperature=0, max_output_tokens=8)
    with Model(smollm2_path, n_ctx=1024, offload="cpu") as model:
        said = [QUESTION, first.output_text, "And a fourth?"]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        assert second.output_text == model.ask(messages, temperature=0, max_tokens=8).text


@pytest.mark.parametrize(("n", "status"), [(8, "incomplete"), (60, "completed")])
def test_streamed_events_are_the_whole(client: openai.OpenAI, name: str, n: int, status: str) -> None:
    """Pieces, items and the last event say the same, which is what comes as a whole."""
    options: dict[str, Any] = {"model": name, "instructions": "Be brief.", "input": QUESTION, "temperature": 0}
    options["max_output_tokens"] = n
    events = streamed(client, **options)
    kinds = [event.type.removeprefix("response.") for event in events]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[:4] == begin
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", status]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    pieces = "".join(event.delta for event in events[4:-4])
    whole = client.responses.create(**options)
    last = events[-1].response
    assert pieces == events[-4].text == events[-3].part.text == last.output_text == whole.output_text
    assert events[-2].item == last.output[0]
    assert (last.status, last.usage.total_tokens) == (whole.status, whole.usage.total_tokens)
    if status == "incomplete":
        return  # for which the client's own helper has no end
    with client.responses.stream(**options) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == pieces


def test_logprobs(client: openai.OpenAI, name: str) -> None:
    """Each token has its own and those of the likeliest."""
    response = client.responses.create(
        model=name, input=QUESTION, temperature=0, max_output_tokens=6, include=["message.output_text.logprobs"],
        top_logprobs=2,
    )  # fmt: skip
    part: Any = response.output[0]
    logprobs = part.content[0].logprobs
    assert "".join(one.token for one in logprobs) == response.output_text
    assert all(len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob + 1e-6 for one in logprobs)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_tools(client: openai.OpenAI, tool_user: Path, choice: Any) -> None:
    """A call's arguments fit the schema, streamed or not, and a conversation with its result goes on."""
    question: Any = {"role": "user", "content": "What will the weather be in Rome, for 2 days?"}
    options: dict[str, Any] = {"model": tool_user.stem, "tools": [TOOL], "max_output_tokens": 400}
    options |= {"temperature": 0.3, "extra_body": {"seed": 1}}
    response = client.responses.create(input=[question], tool_choice=choice, **options)
    (call, *_) = (item for item in response.output if item.type == "function_call")
    assert call.name == "get_weather"
    assert set(json.loads(call.arguments)) == {"city", "days"}
    events = streamed(client, input=[question], tool_choice=choice, **options)
    (done, *_) = (event for event in events if event.type == "response.function_call_arguments.done")
    deltas = "".join(
        event.delta
        for event in events
        if event.type == "response.function_call_arguments.delta" and event.item_id == done.item_id
    )
    assert deltas == done.arguments == call.arguments
    assert events[-1].response.output[done.output_index].arguments == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: list[Any] = [question, *(item.model_dump() for item in response.output), result]
    answer = client.responses.create(input=items, tool_choice="none", **{**options, "max_output_tokens": 10})
    assert answer.output[0].type == "message"


def test_structured_outputs(client: openai.OpenAI, name: str) -> None:
    """A pydantic model is the schema, and the answer comes back as one."""
    parsed = client.responses.parse(model=name, input=QUESTION, text_format=Colour, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Colour)


def test_reasoning(client: openai.OpenAI, thinker: Path) -> None:
    """It is an item of its own, and counted; in chats, it is a field of its own."""
    options: dict[str, Any] = {"model": thinker.stem, "temperature": 0}
    response = client.responses.create(input=QUESTION, max_output_tokens=12, **options)
    reasoning: Any = response.output[0]
    assert (reasoning.type, response.output_text) == ("reasoning", "")
    events = streamed(client, input=QUESTION, max_output_tokens=12, **options)
    text = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert text == reasoning.content[0].text
    with Model(thinker, n_ctx=1024, offload="cpu") as model:
        assert model.ask(QUESTION, temperature=0, max_tokens=12).reasoning == text
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens in (11, 12)  # the last may wait for what could follow
    chat: Any = client.chat.completions.create(
        messages=[{"role": "user", "content": QUESTION}], max_tokens=12, **options
    )
    assert chat.choices[0].message.reasoning_content == text
    assert chat.choices[0].message.content == ""


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("user reasoning assistant user", ["user", "assistant thinks", "user"]),
        ("user reasoning user", ["user", "user"]),
        ("user reasoning call output", ["user", "assistant thinks calls", "tool"]),
        ("user assistant call output", ["user", "assistant calls", "tool"]),
        ("user assistant reasoning call output user", ["user", "assistant", "assistant thinks calls", "tool", "user"]),
    ],
)
def test_items_become_messages(kinds: str, expected: list[str]) -> None:
    """Reasoning belongs to the assistant's next message or call, and to nothing else."""
    items: dict[str, dict[str, Any]] = {
        "user": {"role": "user", "content": "x"},
        "assistant": {"role": "assistant", "content": "y"},
        "reasoning": {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "z"}]},
        "call": {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        "output": {"type": "function_call_output", "call_id": "1", "output": "w"},
    }
    request = ResponsesRequest.model_validate({"input": [items[kind] for kind in kinds.split()]})
    described = [
        message.role + " thinks" * bool(message.reasoning_content) + " calls" * bool(message.tool_calls)
        for message in request.for_chat().messages
    ]
    assert described == expected


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"input": [{"type": "reasoning"}]}, "no message"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"type": "message", "content": "x"}]}, "role"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "name"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"input": []}, "input"),
        ({"input": "word " * 3000}, "1024"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"model": "nothing"}, "nothing"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_mistakes(client: openai.OpenAI, name: str, changed: dict[str, Any], part: str, is_streamed: bool) -> None:
    """Each is an error in OpenAI's form that names the field, before anything is streamed."""
    options: dict[str, Any] = {"model": name, "input": QUESTION, "max_output_tokens": 4, **changed}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=part) as caught:
        client.responses.create(**options, stream=is_streamed)
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
