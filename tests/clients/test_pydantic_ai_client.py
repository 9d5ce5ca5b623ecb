"""The server as pydantic-ai sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput, UsageLimits
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from client_tasks import LIKE_THIS, QUESTION, TOO_LONG, WEATHER_QUESTION, Colour, get_weather
from servers import Server

pytestmark = pytest.mark.clients


@pytest.fixture
def agent(server: Server) -> Callable[..., Any]:
    """Return a function from a model's name and other options to an agent that answers greedily."""

    def make(model: str, max_tokens: int = 100, **more: Any) -> Any:
        provider = OpenAIProvider(base_url=server.api, api_key="x")
        settings = {"temperature": 0, "max_tokens": max_tokens}
        return Agent(OpenAIChatModel(model, provider=provider), model_settings=settings, **more)

    return make


def test_a_reply(agent: Callable[..., Any], name: str, expected: Callable[[int], str]) -> None:
    """Whole and streamed it is the same, with its usage."""
    client = agent(name, max_tokens=8)
    whole = client.run_sync(QUESTION)

    async def streamed() -> tuple[list[str], int]:
        async with client.run_stream(QUESTION) as reply:
            return [text async for text in reply.stream_text(delta=True, debounce_by=None)], reply.usage.output_tokens

    pieces, n_tokens = asyncio.run(streamed())
    assert whole.output == "".join(pieces) == expected(8)
    assert len(pieces) > 4
    assert whole.usage.output_tokens == n_tokens == 8
    assert whole.usage.input_tokens > 8


def test_several_turns(agent: Callable[..., Any], name: str) -> None:
    """The second turn has the first in its cache."""
    client = agent(name, max_tokens=8, system_prompt="Be short.")
    first = client.run_sync(QUESTION)
    second = client.run_sync("Who found it?", message_history=first.all_messages())
    assert second.output
    assert second.usage.cache_read_tokens >= first.usage.input_tokens


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput, PromptedOutput])
def test_structured_outputs(agent: Callable[..., Any], name: str, tool_name: str, kind: Any) -> None:
    """An answer is the pydantic model that was asked for, as a call, by a schema, and by words alone."""
    output = kind(Colour, template="") if kind is PromptedOutput else kind(Colour)
    client = agent(tool_name if kind is ToolOutput else name, output_type=output)
    assert isinstance(client.run_sync(LIKE_THIS).output, Colour)


def test_a_function_as_output(agent: Callable[..., Any], tool_name: str) -> None:
    """The function is called with arguments of its signature."""
    assert agent(tool_name, output_type=get_weather).run_sync(WEATHER_QUESTION).output == "sunny"


def test_tools(agent: Callable[..., Any], tool_name: str) -> None:
    """The agent's loop of calls and results comes to an end."""
    client = agent(tool_name, tools=[get_weather], output_type=ToolOutput(Colour))
    done = client.run_sync(WEATHER_QUESTION, usage_limits=UsageLimits(request_limit=20))
    assert isinstance(done.output, Colour)
    assert done.usage.requests >= 1


def test_a_stream_that_is_left(agent: Callable[..., Any], name: str, server: Server) -> None:
    """Its request ends."""

    async def leave() -> None:
        settings = {"max_tokens": 900, "logit_bias": {"2": -100}}
        async with agent(name).run_stream(QUESTION, model_settings=settings) as reply:
            async for _ in reply.stream_text(delta=True, debounce_by=None):
                break

    asyncio.run(leave())
    server.wait_until_free()


@pytest.mark.parametrize(
    ("is_wrong_model", "question", "status", "part"),
    [(True, QUESTION, 404, "/v1/models lists them"), (False, TOO_LONG, 400, "the context holds 1024")],
)
def test_mistakes(
    agent: Callable[..., Any], name: str, is_wrong_model: bool, question: str, status: int, part: str
) -> None:
    """They raise pydantic-ai's own exception, with the server's status and text."""
    with pytest.raises(ModelHTTPError, match=part) as caught:
        agent("nothing" if is_wrong_model else name).run_sync(question)
    assert caught.value.status_code == status
