"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from client_tasks import WEATHER, Colour
from overspill import Model
from rounding import NATS
from servers import Server, serving

QUESTION: list[Any] = [{"role": "user", "content": "Name three colours of the rainbow."}]
TOOL: Any = {"type": "function", "function": WEATHER}


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tool_user: Path) -> Iterator[Server]:
    """Serve both with four places."""
    with serving(smollm2_path, tool_user, "--ctx", 1024, "--parallel", 4, "--offload", "cpu") as started:
        yield started


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    """Return OpenAI's client."""
    return server.client()


@pytest.fixture(scope="module")
def name(smollm2_path: Path) -> str:
    """Return the model's name."""
    return smollm2_path.stem


def test_models(client: openai.OpenAI, name: str, tool_user: Path) -> None:
    """The list names what is served, and one can be asked for."""
    assert [model.id for model in client.models.list().data] == [name, tool_user.stem]
    assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="nothing"):
        client.models.retrieve("nothing")


def test_a_reply_is_the_models(client: openai.OpenAI, name: str, smollm2_path: Path) -> None:
    """Greedy, each token is the likeliest one, or about as likely, given those before it; so are the numbers."""
    reply = client.chat.completions.create(
        model=name, messages=QUESTION, max_tokens=24, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = reply.choices[0]
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    measured = choice.logprobs.content or []
    assert b"".join(bytes(token.bytes or []) for token in measured).decode() == choice.message.content
    assert reply.usage is not None
    with Model(smollm2_path, n_ctx=1024, offload="cpu") as model:
        prompt = model.chat_template.prepare(QUESTION).tokens
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 24)
        assert reply.usage.total_tokens == len(prompt) + 24
        logits = model.eval(prompt)
        for token in measured:
            (chosen,) = model.tokenize(token.token, add_special=False)
            assert logits[chosen] > logits.max() - NATS
            assert token.logprob <= max(other.logprob for other in token.top_logprobs) + NATS
            logits = model.eval([chosen])


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_replies_are_whole_ones(client: openai.OpenAI, name: str, n: int) -> None:
    """With a seed, pieces together are what comes as a whole, for each choice; the last chunk has the usage."""
    options: dict[str, Any] = {"model": name, "messages": QUESTION, "max_tokens": 16, "seed": 3, "n": n}
    options["temperature"] = 0.01
    whole = client.chat.completions.create(**options)
    texts, ends, usages = [""] * n, [None] * n, []
    with client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            usages.append(chunk.usage)
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert all(usage is None for usage in usages[:-1])
    assert usages[-1].completion_tokens == 16 * n
    assert ends == ["length"] * n == [choice.finish_reason for choice in whole.choices]
    assert all(texts)
    assert len(whole.choices) == n


def test_stop_strings_end_a_reply(client: openai.OpenAI, name: str) -> None:
    """Neither the text nor a chunk has one."""
    whole = client.completions.create(model=name, prompt="1, 2, 3, 4,", max_tokens=40, temperature=0).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    reply = client.completions.create(model=name, prompt="1, 2, 3, 4,", max_tokens=40, temperature=0, stop=[stop])
    assert stop not in reply.choices[0].text
    assert reply.choices[0].finish_reason == "stop"


def test_completions(client: openai.OpenAI, name: str) -> None:
    """Several prompts and choices, with the prompts' own text, offsets and streams."""
    prompts = ["Once upon a time", "The sky is"]
    reply = client.completions.create(model=name, prompt=prompts, n=2, max_tokens=5, temperature=0, echo=True)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(reply.choices, [prompts[0], prompts[0], prompts[1], prompts[1]], strict=True):
        assert choice.text.startswith(prompt)
        assert len(choice.text) > len(prompt)
    measured = client.completions.create(model=name, prompt=[1, 2, 3], max_tokens=4, temperature=0, logprobs=2)
    logprobs = measured.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == 4
    assert (logprobs.text_offset or [])[0] == 0
    with client.completions.create(model=name, prompt=prompts, max_tokens=5, temperature=0, stream=True) as stream:
        streamed = {0: "", 1: ""}
        for chunk in stream:
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
    assert all(streamed.values())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools(client: openai.OpenAI, tool_user: Path, choice: Any, streamed: bool) -> None:
    """The call's arguments fit the schema, and a conversation with its result goes on."""
    options: dict[str, Any] = {"model": tool_user.stem, "tools": [TOOL], "max_tokens": 400, "seed": 1}
    message: Any
    question: Any = {"role": "user", "content": "What will the weather be in Rome, for 2 days?"}
    if streamed:
        with client.chat.completions.stream(messages=[question], tool_choice=choice, **options) as stream:
            message = stream.get_final_completion().choices[0].message
    else:
        reply = client.chat.completions.create(messages=[question], tool_choice=choice, **options)
        assert reply.choices[0].finish_reason == "tool_calls"
        message = reply.choices[0].message
    assert message.tool_calls
    assert choice == "required" or len(message.tool_calls) == 1
    call = message.tool_calls[0]
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}
    assert isinstance(arguments["days"], int)
    said = [question, message.model_dump(exclude_none=True, exclude={"parsed"})]
    said[1]["tool_calls"] = [
        {"id": call.id, "type": "function", "function": {"name": "get_weather", "arguments": call.function.arguments}}
    ]
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    answer = client.chat.completions.create(messages=[*said, result], tool_choice="none", **options)
    assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("streamed", [False, True])
def test_one_call_at_most(client: openai.OpenAI, tool_user: Path, streamed: bool) -> None:
    """A model that would call again and again is ended after the first call."""
    options: dict[str, Any] = {"model": tool_user.stem, "tools": [TOOL], "tool_choice": "required"}
    options |= {"max_tokens": 200, "temperature": 0, "parallel_tool_calls": False}
    with client.chat.completions.stream(messages=QUESTION, **options) as stream:
        choice = stream.get_final_completion().choices[0]
    if not streamed:
        choice = client.chat.completions.create(messages=QUESTION, **options).choices[0]
    assert len(choice.message.tool_calls or ()) == 1
    assert choice.finish_reason == "tool_calls"


def test_structured_outputs(client: openai.OpenAI, name: str) -> None:
    """A pydantic model is the schema, and the reply comes back as one."""
    parsed = client.chat.completions.parse(
        model=name, messages=QUESTION, response_format=Colour, max_tokens=60, seed=1
    ).choices[0]
    assert isinstance(parsed.message.parsed, Colour)
    json_object: Any = {"type": "json_object"}
    reply = client.chat.completions.create(
        model=name, messages=QUESTION, response_format=json_object, max_tokens=300, temperature=0
    ).choices[0]
    if reply.finish_reason == "stop":
        assert isinstance(json.loads(reply.message.content or ""), dict)


def test_many_clients_at_once(server: Server, name: str) -> None:
    """Twelve asynchronous streams on four places; a third are left in the middle, the others get all their tokens."""

    async def one(client: openai.AsyncOpenAI, i: int) -> int:
        n = 0
        messages: list[Any] = [{"role": "user", "content": f"Write about the number {i}."}]
        stream = await client.chat.completions.create(
            model=name, messages=messages, max_tokens=20, stream=True, logit_bias={"2": -100}
        )
        async with stream:
            async for chunk in stream:
                n += bool(chunk.choices and chunk.choices[0].delta.content)
                if i % 3 == 0 and n == 4:
                    break
        return n

    async def everything() -> list[int]:
        async with openai.AsyncOpenAI(base_url=server.api, api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(12)))

    counts = asyncio.run(everything())
    assert all(n == 4 if i % 3 == 0 else n >= 8 for i, n in enumerate(counts))


@pytest.mark.parametrize(
    ("changed", "error", "part"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "/v1/models"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, openai.BadRequestError, "role"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError, "1024"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"n": 17}, openai.BadRequestError, "n"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         openai.BadRequestError, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "none"}}}},
         openai.BadRequestError, "schema"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         openai.BadRequestError, "image_url"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
def test_mistakes(
    client: openai.OpenAI,
    name: str,
    changed: dict[str, Any],
    error: type[openai.APIStatusError],
    part: str,
    streamed: bool,
) -> None:
    """Each is an error in OpenAI's form that names the field, before anything is streamed."""
    options: dict[str, Any] = {"model": name, "messages": QUESTION, "max_tokens": 4, "stream": streamed, **changed}
    with pytest.raises(error, match=part) as caught:
        client.chat.completions.create(**options)
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
