"""A comparison in a terminal while it runs: lines, columns, and text that cannot control the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from comparisons import shown
from overspill.studies.compare.view import Columns, Sections


@pytest.mark.parametrize("view", [lambda console: Columns(console, 2), Sections], ids=["columns", "sections"])
def test_output_does_not_control_the_terminal(
    tiny_gpt_oss_path: Path, view: Callable[[Console], Columns | Sections]
) -> None:
    """Escape sequences, a cursor that goes back, and text that turns around are left out."""
    out = shown(tiny_gpt_oss_path, "a\x1b[2Jb\x07c\rd\u202ee [red]f[/red]\n", view, 100)
    assert "a[2Jbcde [red]f[/red]" in out
    # What is left of the sequences is the view's own: they move the cursor up, erase lines, and hide it.
    assert {sequence[-1] for sequence in re.findall(r"\x1b\[[\d;?]*.", out)} <= {"A", "K", "l", "h"}
    assert "\x07" not in out
    assert "\u202e" not in out
