"""The server as LangChain sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, Literal

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

from client_tasks import LIKE_THIS, QUESTION, TOO_LONG, WEATHER_QUESTION, Colour, fits_weather, get_weather
from servers import Server

pytestmark = pytest.mark.clients


@pytest.fixture
def chat(options: dict[str, Any]) -> Callable[..., Any]:
    """Return a function from a model's name and other options to a client."""
    return lambda model, **more: ChatOpenAI(model=model, temperature=0, **{"max_tokens": 8, **options, **more})


def test_a_reply(chat: Callable[..., Any], name: str, expected: Callable[[int], str]) -> None:
    """Whole and streamed it is the same, with its usage."""
    client = chat(name, stream_usage=True)
    chunks = [*client.stream(QUESTION)]
    whole, streamed = client.invoke(QUESTION), reduce(add, chunks)
    assert whole.content == streamed.content == expected(8)
    assert len([chunk for chunk in chunks if chunk.content]) > 4
    for message in (whole, streamed):
        usage = message.usage_metadata
        assert usage["output_tokens"] == 8
        assert usage["total_tokens"] == usage["input_tokens"] + 8
        assert message.response_metadata["finish_reason"] == "length"


def test_many_at_once(chat: Callable[..., Any], name: str, expected: Callable[[int], str]) -> None:
    """More than there are places, asynchronous, whole and streamed."""
    client = chat(name)

    async def ask() -> tuple[list[Any], list[Any]]:
        return await client.abatch([QUESTION] * 8), [chunk async for chunk in client.astream(QUESTION)]

    replies, chunks = asyncio.run(ask())
    assert [reply.content for reply in replies] == [expected(8)] * 8
    assert "".join(chunk.content for chunk in chunks) == expected(8)


def test_several_turns(chat: Callable[..., Any], name: str) -> None:
    """Roles and parts of contents are understood, and the second turn has the first in its cache."""
    client = chat(name)
    said: list[Any] = [("system", "Be short."), ("human", [{"type": "text", "text": QUESTION}])]
    first = client.invoke(said)
    second = client.invoke([*said, first, ("human", "Who found it?")])
    assert second.content
    assert second.usage_metadata["input_token_details"]["cache_read"] >= first.usage_metadata["input_tokens"]


def test_logprobs(chat: Callable[..., Any], name: str) -> None:
    """Tokens come with the most likely ones."""
    reply = chat(name, logprobs=True, top_logprobs=2).invoke(QUESTION)
    measured = reply.response_metadata["logprobs"]["content"]
    assert "".join(one["token"] for one in measured) == reply.content
    assert all(len(one["top_logprobs"]) == 2 for one in measured)


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_tools(chat: Callable[..., Any], tool_name: str, choice: str) -> None:
    """A call's arguments fit the function's signature, and the conversation goes on with the result."""
    client = chat(tool_name, max_tokens=200).bind_tools([get_weather], tool_choice=choice)
    whole, streamed = client.invoke(WEATHER_QUESTION), reduce(add, client.stream(WEATHER_QUESTION))
    for message in (whole, streamed):
        assert [call["name"] for call in message.tool_calls] == ["get_weather"]
        assert fits_weather(message.tool_calls[0]["args"])
        assert message.response_metadata["finish_reason"] == "tool_calls"
    results = [ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]) for call in whole.tool_calls]
    after = chat(tool_name).bind_tools([get_weather], tool_choice="none")
    assert after.invoke([HumanMessage(WEATHER_QUESTION), whole, *results]).response_metadata["finish_reason"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_outputs(
    chat: Callable[..., Any], name: str, tool_name: str, method: Literal["json_schema", "function_calling", "json_mode"]
) -> None:
    """An answer is the pydantic model that was asked for."""
    client = chat(tool_name if method == "function_calling" else name, max_tokens=100)
    assert isinstance(client.with_structured_output(Colour, method=method).invoke(LIKE_THIS), Colour)


def test_a_stream_that_is_left(chat: Callable[..., Any], name: str, server: Server) -> None:
    """Its request ends."""
    stream = chat(name, max_tokens=900, logit_bias={"2": -100}).stream(QUESTION)
    assert next(stream) is not None
    stream.close()
    server.wait_until_free()


def test_mistakes(chat: Callable[..., Any], name: str) -> None:
    """They raise LangChain's own exceptions, with the server's text."""
    with pytest.raises(openai.NotFoundError, match="/v1/models lists them"):
        chat("nothing").invoke(QUESTION)
    with pytest.raises(ContextOverflowError, match="the context holds 1024"):
        chat(name).invoke(TOO_LONG)
