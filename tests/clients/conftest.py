"""Clients of OpenAI's API from packages that no other test needs: ``pip install --group clients``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from client_tasks import QUESTION
from servers import Server, serving

_PACKAGES = ("instructor", "langchain_openai", "llama_index", "llm", "pydantic_ai")
collect_ignore_glob = [] if all(find_spec(package) for package in _PACKAGES) else ["test_*.py"]


@pytest.fixture(scope="session")
def server(smollm2_path: Path, tool_user: Path) -> Iterator[Server]:
    """Serve SmolLM2, and the same with a template that knows tools."""
    with serving(smollm2_path, tool_user, "--ctx", 1024, "--parallel", 4, "--offload", "cpu") as started:
        yield started


@pytest.fixture(scope="session")
def name(smollm2_path: Path) -> str:
    """Return the model's name."""
    return smollm2_path.stem


@pytest.fixture(scope="session")
def tool_name(tool_user: Path) -> str:
    """Return the name of the model that knows tools."""
    return tool_user.stem


@pytest.fixture(scope="session")
def options(server: Server) -> dict[str, Any]:
    """Return what OpenAI's clients are made with."""
    return {"base_url": server.api, "api_key": "x", "max_retries": 0, "timeout": 60}


@pytest.fixture(scope="session")
def expected(server: Server, name: str) -> Callable[[int], str]:
    """Return a function from a number of tokens to the greedy answer to ``QUESTION``, of OpenAI's own client."""

    def answer(n_tokens: int) -> str:
        reply = server.client().chat.completions.create(
            model=name, messages=[{"role": "user", "content": QUESTION}], max_tokens=n_tokens, temperature=0
        )
        return reply.choices[0].message.content or ""

    return answer
