"""The server as instructor sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import instructor
import openai
import pytest
from instructor.core.exceptions import InstructorRetryException

from client_tasks import CHOICE, LIKE_THIS, TOO_LONG, Colour

pytestmark = pytest.mark.clients

ASKED: dict[str, Any] = {"max_tokens": 200, "temperature": 0, "max_retries": 0}


def said(text: str = LIKE_THIS) -> list[Any]:
    """Return a conversation."""
    return [{"role": "user", "content": text}]


def by_tools(mode: str) -> bool:
    """Return whether answers are calls of tools."""
    return mode.startswith("TOOLS")


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA"])
def test_structured_outputs(options: dict[str, Any], name: str, tool_name: str, mode: str) -> None:
    """An answer is the pydantic model that was asked for, with the usage of the reply that it is made of."""
    client = instructor.from_openai(openai.OpenAI(**options), mode=instructor.Mode[mode])
    model = tool_name if by_tools(mode) else name
    colour, reply = client.chat.completions.create_with_completion(
        model=model, response_model=Colour, messages=said(), **ASKED
    )
    assert isinstance(colour, Colour)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_streamed_outputs(options: dict[str, Any], name: str, tool_name: str, mode: str) -> None:
    """What has come of the answer is shown while it comes, and the last is whole."""
    client = instructor.from_openai(openai.OpenAI(**options), mode=instructor.Mode[mode])
    model = tool_name if by_tools(mode) else name
    parts = [
        *client.chat.completions.create_partial(model=model, response_model=Colour, messages=said(CHOICE), **ASKED)
    ]
    assert Colour.model_validate(parts[-1].model_dump())
    assert by_tools(mode) or parts[0].is_warm is None


def test_several_objects(options: dict[str, Any], tool_name: str) -> None:
    """They come one after another."""
    client = instructor.from_openai(openai.OpenAI(**options), mode=instructor.Mode.TOOLS)
    found = client.chat.completions.create_iterable(
        model=tool_name, response_model=Colour, messages=said(), **{**ASKED, "max_tokens": 600}
    )
    assert all(isinstance(one, Colour) for one in found)


def test_an_asynchronous_client(options: dict[str, Any], name: str) -> None:
    """Several at once."""

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(**options) as made:
            client = instructor.from_openai(made, mode=instructor.Mode.JSON_SCHEMA)
            asked = {"model": name, "response_model": Colour, "messages": said(), **ASKED}
            return await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(6)))

    assert all(isinstance(colour, Colour) for colour in asyncio.run(ask()))


def test_mistakes(options: dict[str, Any], name: str) -> None:
    """They raise instructor's own exception, with the server's text."""
    client = instructor.from_openai(openai.OpenAI(**options), mode=instructor.Mode.JSON)
    for model, text, part in (("nothing", LIKE_THIS, "/v1/models lists them"), (name, TOO_LONG, "the context holds")):
        with pytest.raises(InstructorRetryException, match=part):
            client.chat.completions.create(model=model, response_model=Colour, messages=said(text), **ASKED)
