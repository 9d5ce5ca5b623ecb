"""Type checkers find misspelt and wrongly typed options before anything runs."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import pytest

from overspill import Model
from overspill.base.checks import keywords_of
from overspill.engine.keywords import CHAT_KEYWORDS, STREAM_KEYWORDS, ChatKeywords, ReplyKeywords, StreamKeywords
from overspill.sampling.options import SAMPLING_KEYWORDS

RIGHT = """
import overspill

async def right(model: overspill.Model, chat: overspill.Chat) -> None:
    model.generate("x", max_tokens=3, temperature=0.5, stop="y", json_schema={"type": "string"})
    model.astream([1, 2], logprobs=True, special=False)
    model.chat("x", max_tokens=3, tools=[print], thinking=False)
    model.ask("x", system="y", reasoning_effort="low", top_k=3).text.upper()
    (await model.aask("x", seed=1)).stats
    async for token in model.achat("x", on_full="shift"):
        token.channel
    overspill.Chat(model, system="x", max_tokens=3).send("x", min_p=0.1)
    chat.ask("x", logit_bias={1: -1.0}).tool_calls
"""
WRONG = """
import overspill

async def wrong(model: overspill.Model, chat: overspill.Chat) -> None:
    model.generate("x", max_token=3)
    model.generate("x", temperature="hot")
    model.astream("x", stops=["y"])
    model.chat("x", thinkin=False)
    model.ask("x", sytem="y")
    await model.aask("x", max_tokens="many")
    model.achat("x", on_full="wrap")
    overspill.Chat(model, temprature=1.0)
    chat.send("x", top_k=0.5)
    chat.ask("x", special=True)
"""


def found_by(checker: str, file: Path) -> tuple[int, str]:
    """Return how many errors a type checker reports, and all that it says."""
    command = {
        "mypy": ["-m", "mypy", "--no-error-summary", "--cache-dir", str(file.parent / "cache")],
        "pyright": ["-m", "pyright"],
    }[checker]
    done = subprocess.run([sys.executable, *command, str(file)], capture_output=True, text=True, cwd=file.parent)
    said = done.stdout + done.stderr
    return sum(" error: " in line for line in said.splitlines()), said


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_wrong_calls_are_found(tmp_path: Path, checker: str) -> None:
    """Ten of ten, and none in calls that are right."""
    if find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    for name, source, n_expected in (("right", RIGHT, 0), ("wrong", WRONG, 10)):
        file = tmp_path / f"{name}.py"
        file.write_text(source)
        n_found, said = found_by(checker, file)
        assert n_found == n_expected, said


def test_keywords_are_those_of_the_methods() -> None:
    """The types of keywords name what :meth:`Model.stream` and :meth:`Model.chat` take, with the same types."""
    of_stream = keywords_of(Model.stream) | SAMPLING_KEYWORDS
    # Only a plain stream has experts to read; the form is a chat's.
    assert of_stream - {"form", "experts"} == STREAM_KEYWORDS
    # A chat's prompt is made of tokens, and its stream is asked to reuse what it can.
    assert keywords_of(Model.chat) | (STREAM_KEYWORDS - {"reuse", "special"}) == CHAT_KEYWORDS
    for keywords, method in ((StreamKeywords, Model.stream), (ReplyKeywords, Model.stream), (ChatKeywords, Model.chat)):
        named = get_type_hints(method)
        for name, kind in get_type_hints(keywords).items():
            assert name not in named or named[name] == kind, name
