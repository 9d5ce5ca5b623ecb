"""What tests of chats share: a tool, templates of other models, and the answer of a stream."""

from __future__ import annotations

import re
from itertools import permutations
from typing import Any

from model_files import llama_cpp_folder
from overspill import (
    Channel,
    ChatStream,
)

ALL_TEMPLATES = sorted(path.stem for path in (llama_cpp_folder() / "models" / "templates").glob("*.jinja"))
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


def template(name: str) -> str:
    """Return one of the templates in llama.cpp's folder, in Jinja."""
    return (llama_cpp_folder() / "models" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def cuts(source: str) -> list[str]:
    """Return what a template may cut out of texts: what it looks for, and what is between two of these."""
    quoted = r"""(?:"((?:[^"\\\n]|\\.)+)"|'((?:[^'\\\n]|\\.)+)')"""
    looked_for = rf"(?:split|replace|strip|startswith|endswith|find|partition|removeprefix|removesuffix)\({quoted}"
    found = {text for match in re.findall(rf"{looked_for}|{quoted} (?:not )?in ", source) for text in match}
    marks = sorted(text for text in found if re.search(r"[^\w\s]", text))
    pairs = [f"{a}x{b}" for a, b in permutations(marks, 2) if re.sub(r"\W", "", a) == re.sub(r"\W", "", b)]
    return [*marks, *pairs]


def text_of(stream: ChatStream) -> str:
    """Return the answer of a stream that is read to its end."""
    return "".join(token.text for token in stream if token.channel == Channel.FINAL)


WEATHER = {
    "name": "get_weather",
    "description": "Get the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
