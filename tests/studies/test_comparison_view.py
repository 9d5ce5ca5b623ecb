"""A comparison in a terminal while it runs: lines, columns, and text that cannot control the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from comparisons import places, shown
from overspill.studies.compare.view import Columns, Sections, _wrapped


@pytest.mark.parametrize("view", [lambda console: Columns(console, 2), Sections], ids=["columns", "sections"])
def test_output_does_not_control_the_terminal(
    tiny_gpt_oss_path: Path, view: Callable[[Console], Columns | Sections]
) -> None:
    """Escape sequences, a cursor that goes back, and text that turns around come out as replacement characters."""
    out = shown(tiny_gpt_oss_path, "a\x1b[2Jb\x07c\rd\u202ee [red]f[/red]\n", view, 100)
    assert "a�[2Jb�c�d�e [red]f[/red]" in out
    # What is left of the sequences is the view's own: they move the cursor up, erase lines, and hide it.
    assert {sequence[-1] for sequence in re.findall(r"\x1b\[[\d;?]*.", out)} <= {"A", "K", "l", "h"}
    assert "\x07" not in out
    assert "\u202e" not in out


@pytest.mark.parametrize("width", [1, 10, 24, 41])
@pytest.mark.parametrize(
    "text",
    [
        "1. 太陽光は、赤から紫までのさまざまな色の光が混ざったものです。（「レイリー」散乱）",
        "one two  three\n\n    def f(x):\n\treturn x  # 返す\n" + "x" * 50,
        "日本語とEnglishのmixed、テキスト。" * 5,
        "",
    ],
)
def test_lines_are_broken_where_a_reader_expects_it(text: str, width: int) -> None:
    """Nothing is lost or too wide; Japanese fills lines, and none begins with a mark that ends something."""
    lines = _wrapped(text, width)
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert all(len(place.rstrip()) <= width for place in places(lines)) or width == 1
    assert len(lines) > text.count("\n")
    if width >= 10:
        assert not [line for line in lines if re.match("[、。）」ーョ]", line)]
    if text.startswith("1.") and width >= 24:
        assert lines[0].startswith("1. 太陽光は、赤")
        assert all(len(places([line])[0]) >= width - 6 for line in lines[:-1])
