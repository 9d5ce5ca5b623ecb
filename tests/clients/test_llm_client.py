"""The server as the command ``llm`` sees it, by its file of OpenAI-compatible models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from client_tasks import QUESTION, TOO_LONG, WEATHER_QUESTION
from servers import Server

pytestmark = pytest.mark.clients

Llm = Callable[..., "subprocess.CompletedProcess[str]"]

FILE = """
- model_id: plain
  model_name: {name}
  api_base: {api}
  supports_schema: true
- model_id: tools
  model_name: {tool_name}
  api_base: {api}
  supports_tools: true
- model_id: text
  model_name: {name}
  api_base: {api}
  completion: true
- model_id: unknown
  model_name: nothing
  api_base: {api}
"""
TOOL = """
def get_weather(city: str) -> str:
    "Tell the weather in a city."
    return "sunny"
"""


@pytest.fixture
def llm(server: Server, name: str, tool_name: str, tmp_path: Path) -> Llm:
    """Return the command, with a configuration of its own."""
    text = FILE.format(name=name, tool_name=tool_name, api=server.api)
    (tmp_path / "extra-openai-models.yaml").write_text(text, encoding="utf-8")
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llm", *map(str, arguments), "--key", "x", "-o", "temperature", "0"]
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", env=environment, stdin=subprocess.DEVNULL
        )

    return run


def test_a_reply(llm: Llm, expected: Callable[[int], str]) -> None:
    """Whole and streamed it is the same, with its usage."""
    for how in ([], ["--no-stream"]):
        done = llm("-m", "plain", QUESTION, "-o", "max_tokens", 8, "--usage", *how)
        assert (done.returncode, done.stdout.strip()) == (0, expected(8).strip()), done.stderr
        usage = re.search(r"Token usage: (\d+) input, (\d+) output", done.stderr)
        assert usage is not None
        assert int(usage[1]) > int(usage[2]) == 8


def test_several_turns(llm: Llm) -> None:
    """A conversation goes on with what was said."""
    assert llm("-m", "plain", "-s", "Be short.", QUESTION, "-o", "max_tokens", 8).returncode == 0
    done = llm("--continue", "Who found it?", "-o", "max_tokens", 8)
    assert (done.returncode, done.stdout.strip() != "") == (0, True), done.stderr


def test_a_continuation(llm: Llm) -> None:
    """Models of texts go on with one."""
    done = llm("-m", "text", "The sky is", "-o", "max_tokens", 8)
    assert (done.returncode, done.stdout.strip() != "") == (0, True), done.stderr


def test_a_schema(llm: Llm) -> None:
    """An answer fits it."""
    done = llm("-m", "plain", "--schema", "name, is_warm bool", "Choose a colour.", "-o", "max_tokens", 300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {key: type(value) for key, value in answer.items()} == {"name": str, "is_warm": bool}


def test_tools(llm: Llm) -> None:
    """They can be offered, and the chain of calls comes to an end."""
    done = llm("-m", "tools", "--functions", TOOL, WEATHER_QUESTION, "-o", "max_tokens", 60, "--chain-limit", 5)
    assert done.returncode == 0, done.stderr


def test_mistakes(llm: Llm) -> None:
    """They end the command, with the server's text."""
    for model, text, part in (("unknown", QUESTION, "/v1/models lists them"), ("plain", TOO_LONG, "the context holds")):
        done = llm("-m", model, text)
        assert done.returncode == 1
        assert part in done.stderr
