"""Comparisons as tests run and read them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from overspill import compare
from overspill.studies.compare.view import Columns, Sections

QUESTIONS = ["The capital of France is", "昔々、あるところに"]
OPTIONS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "max_tokens": 8}


def saying(text: str) -> str:
    """Return a grammar that leaves a model nothing else to say."""
    return "root ::= " + json.dumps(text, ensure_ascii=False).replace("\\u001b", "\\x1B")


class Page(HTMLParser):
    """What a page consists of, as another parser than ours sees it."""

    def __init__(self, page: str) -> None:
        """Read it."""
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.maps: list[dict[str, Any]] = []
        """Devices by part and, in order, layer: from the titles in each picture."""
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of an element."""
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "svg" and dict(attrs).get("role") == "img":
            self.maps.append({})

    def handle_endtag(self, tag: str) -> None:
        """Go back to what it was in."""
        while self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Keep the text, and what the map says."""
        if self._open and self._open[-1] == "style":
            return
        self.text += data
        if self._open[-2:] == ["rect", "title"]:
            found = re.fullmatch(r"(layer (\d+), )?([\w, ]+): (\w+), .+", data)
            assert found, data
            _, layer, part, device = found.groups()
            if layer is None:
                self.maps[-1].update(dict.fromkeys(part.split(", "), device))
            else:
                devices = self.maps[-1].setdefault("kv" if part == "KV cache" else part, [])
                assert len(devices) == int(layer)
                devices.append(device)


def shown(
    path: Path,
    text: str,
    view: Callable[[Console], Columns | Sections],
    width: int,
    color_system: Literal["standard"] | None = None,
) -> str:
    """Return what a view prints of a model that says something, beside itself."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=color_system, height=20)
    with view(console) as shown_in:
        options = {**OPTIONS, "n_ctx": 1024, "max_tokens": 200}
        compare([path] * 2, "x", grammar=saying(text), report=shown_in.report, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def places(screen: Sequence[str]) -> list[str]:
    """Return lines in which every character takes up as many places as on the screen."""
    import unicodedata

    return ["".join(c + " " * (unicodedata.east_asian_width(c) in "WF") for c in line.rstrip()) for line in screen]
