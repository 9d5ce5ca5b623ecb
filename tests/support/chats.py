"""What tests of chats share: a tool, templates of other models, and the answer of a stream."""

from __future__ import annotations

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
