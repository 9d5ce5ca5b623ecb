"""The server as LlamaIndex sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from client_tasks import CHOICE, QUESTION, TOO_LONG, WEATHER_QUESTION, Colour, fits_weather, get_weather
from servers import Server

pytestmark = pytest.mark.clients

ASKED = [ChatMessage(role="user", content=QUESTION)]
TASK = PromptTemplate("{task}")


@pytest.fixture
def llm(server: Server) -> Callable[..., Any]:
    """Return a function from a model's name and other options to a client."""
    common = {"api_base": server.api, "api_key": "x", "max_retries": 0, "context_window": 1024, "temperature": 0}
    return lambda model, **more: OpenAILike(model=model, **{"is_chat_model": True, "max_tokens": 8, **common, **more})


@pytest.fixture
def caller(llm: Callable[..., Any], tool_name: str) -> Any:
    """Return a client of the model that knows tools."""
    return llm(tool_name, is_function_calling_model=True, max_tokens=200)


def test_a_reply(llm: Callable[..., Any], name: str, expected: Callable[[int], str]) -> None:
    """Whole, streamed and awaited it is the same, with its usage."""
    client = llm(name)
    whole, chunks = client.chat(ASKED), [*client.stream_chat(ASKED)]

    async def awaited() -> tuple[str, str]:
        reply = await client.achat(ASKED)
        last = [part async for part in await client.astream_chat(ASKED)][-1]
        return reply.message.content, last.message.content

    texts = {whole.message.content, chunks[-1].message.content, *asyncio.run(awaited())}
    assert texts == {expected(8)} == {"".join(chunk.delta or "" for chunk in chunks)}
    assert len([chunk for chunk in chunks if chunk.delta]) > 4
    usage = whole.raw.usage
    assert (usage.completion_tokens, usage.total_tokens) == (8, usage.prompt_tokens + 8)


def test_continuations(llm: Callable[..., Any], name: str) -> None:
    """Without a chat, a text goes on, whole and streamed."""
    client = llm(name, is_chat_model=False)
    whole, chunks = client.complete("The sky is"), [*client.stream_complete("The sky is")]
    assert whole.text == chunks[-1].text != ""
    assert len(chunks) > 4


def test_tools(llm: Callable[..., Any], caller: Any, tool_name: str) -> None:
    """A call's arguments fit the function's signature, and the conversation goes on with the result."""
    tools = [FunctionTool.from_defaults(get_weather)]
    whole = caller.chat_with_tools(tools, WEATHER_QUESTION, tool_required=True)
    streamed = [*caller.stream_chat_with_tools(tools, WEATHER_QUESTION, tool_required=True)][-1]
    for reply in (whole, streamed):
        (call,) = caller.get_tool_calls_from_response(reply)
        assert call.tool_name == "get_weather"
        assert fits_weather(call.tool_kwargs)
    (call,) = caller.get_tool_calls_from_response(whole)
    result = ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": call.tool_id})
    said = [ChatMessage(role="user", content=WEATHER_QUESTION), whole.message, result]
    assert llm(tool_name).chat(said).message.role == "assistant"
    assert caller.predict_and_call(tools, WEATHER_QUESTION, tool_required=True).response == "sunny"


def test_an_agent(caller: Any) -> None:
    """It runs to an answer, with the calls that the model makes."""

    async def run() -> Any:
        return await FunctionAgent(tools=[get_weather], llm=caller).run(WEATHER_QUESTION)

    assert asyncio.run(run()).response.role == "assistant"


def test_structured_outputs(llm: Callable[..., Any], caller: Any, name: str) -> None:
    """An answer is the pydantic model that was asked for, as a call and by a schema."""
    by_schema = llm(name, should_use_structured_outputs=True, max_tokens=100)
    for client in (caller, by_schema):
        assert isinstance(client.structured_predict(Colour, TASK, task=CHOICE), Colour)
    assert isinstance(caller.as_structured_llm(Colour).chat([ChatMessage(role="user", content=CHOICE)]).raw, Colour)
    last = [*by_schema.stream_structured_predict(Colour, TASK, task=CHOICE)][-1]
    assert Colour.model_validate(last.model_dump())


def test_a_stream_that_is_left(llm: Callable[..., Any], name: str, server: Server) -> None:
    """Its request ends."""
    stream = llm(name, max_tokens=900).stream_chat(ASKED, logit_bias={"2": -100})
    next(stream)
    stream.close()
    server.wait_until_free()


def test_mistakes(llm: Callable[..., Any], name: str) -> None:
    """They raise the exceptions of OpenAI's client, which LlamaIndex leaves as they are, with the server's text."""
    with pytest.raises(openai.NotFoundError, match="/v1/models lists them"):
        llm("nothing").chat(ASKED)
    with pytest.raises(openai.BadRequestError, match="the context holds 1024"):
        llm(name).chat([ChatMessage(role="user", content=TOO_LONG)])
