"""Many clients of a server at once: streamed replies of mixed lengths, some of which are left in the middle."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

N_CLIENTS = 64
LONGEST = 48
"""Tokens of the longest reply."""
QUESTIONS = [f"Write {i} words: {'one two three four five six seven eight ' * (i % 5)}" for i in range(24)]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, the number of tokens to answer with, and after how many of them the client leaves, if it does."""

    question: str
    n_tokens: int
    leave_after: int | None = None


@dataclass(slots=True)
class Answered:
    """What came of it."""

    asked: Asked
    tokens: list[Mapping[str, Any]] = field(default_factory=list)
    """The tokens with their log-probabilities, or the pieces of the message where nobody asked for these."""
    n_tokens: int = 0
    """Tokens of a whole reply, as the server counts them."""
    finish_reason: str | None = None
    n_refused: int = 0
    """How often the server had too many requests."""
    first_token_s: float = float("nan")
    seconds: float = float("nan")


def mixed(n: int, seed: int, *, leaves: bool = True) -> list[Asked]:
    """Return questions and lengths by chance; every third client leaves in the middle, if any does."""
    chance = random.Random(seed)
    asked = []
    for i in range(n):
        n_tokens = chance.randint(4, LONGEST)
        leave_after = chance.randrange(n_tokens) if leaves and i % 3 == 0 else None
        asked.append(Asked(chance.choice(QUESTIONS), n_tokens, leave_after))
    return asked


async def _answered(client: httpx.AsyncClient, asked: Asked, options: Mapping[str, Any]) -> Answered:
    answered = Answered(asked)
    request = {
        "messages": [{"role": "user", "content": asked.question}],
        "max_tokens": asked.n_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    while True:
        began = time.perf_counter()
        async with client.stream("POST", "/v1/chat/completions", json=request) as response:
            if response.status_code == 429:  # those who left are still counted, until a step ends
                answered.n_refused += 1
            else:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if len(answered.tokens) == asked.leave_after:
                        return answered
                    if line.startswith("data: {"):
                        _take(answered, json.loads(line.removeprefix("data: ")), began)
                answered.seconds = time.perf_counter() - began
                return answered
        await asyncio.sleep(0.01)


def _take(answered: Answered, chunk: Mapping[str, Any], began: float) -> None:
    """Take an event of the stream."""
    assert "error" not in chunk, chunk
    if chunk.get("usage"):
        answered.n_tokens = chunk["usage"]["completion_tokens"]
    for choice in chunk["choices"]:
        answered.finish_reason = choice["finish_reason"] or answered.finish_reason
        measured = (choice.get("logprobs") or {}).get("content")
        pieces = measured or ([choice["delta"]] if choice["delta"].get("content") else [])
        if pieces and not answered.tokens:
            answered.first_token_s = time.perf_counter() - began
        answered.tokens += pieces


def load(
    url: str, asked: Sequence[Asked], *, n_clients: int = N_CLIENTS, keeps: bool = True, **options: Any
) -> list[Answered]:
    """Return the answers to all questions; each client asks the next one when it has its answer.

    ``keeps`` is whether connections are used again, and ``options`` are more fields of each request.
    """

    async def clients() -> list[Answered]:
        answers: list[Answered] = []
        waiting: Iterator[Asked] = iter(asked)
        limits = httpx.Limits(max_connections=n_clients, max_keepalive_connections=n_clients if keeps else 0)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client, asyncio.TaskGroup() as group:

            async def one() -> None:
                for question in waiting:
                    answers.append(await _answered(client, question, options))

            for _ in range(n_clients):
                group.create_task(one())
        return answers

    return asyncio.run(clients())
