"""Commands, Python and links that documents have: README.md, and the pages in docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: str
    """The document's path in the repository."""
    line: int
    """The number of its first line, from 1."""
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A line that begins with ``$`` in a block of a console, and what is shown below it."""

    document: str
    line: int
    text: str
    output: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[str]:
    """Return README.md and all pages."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def blocks(document: str) -> Iterator[Block]:
    """Yield a document's fenced blocks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(document, text.count("\n", 0, fence.start(2)) + 1, fence[1], fence[2])


def commands(document: str) -> Iterator[Command]:
    """Yield the commands of a document's consoles."""
    for block in blocks(document):
        if block.language != "console":
            continue
        shown = re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE)
        for command in shown:
            line = block.line + block.text.count("\n", 0, command.start())
            yield Command(document, line, re.sub(r"\s+# .*", "", command[1]), command[2])


def inline_commands(document: str) -> Iterator[str]:
    """Yield what is set as code in a line of text and begins with ``overspill`` and a command's name."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(code.split()) for code in re.findall(r"`(overspill [a-z][^`]*)`", text))


def n_words(document: str) -> int:
    """Return the number of words of a document's text, without its code blocks and the addresses of links."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return len(re.findall(r"\b\w[\w.'-]*", re.sub(r"\]\([^)]*\)", "]", text)))
