"""Markdown on a terminal while it grows: finished blocks stay in the scrollback, the last one is drawn again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console

from overspill.base.text import printable
from overspill.cli.terminal.markdown import markdown_lines, parse_markdown

__all__ = ["StreamedMarkdown"]


def _decided(markup: str) -> int:
    """Return the length of the text whose blocks are certain: a line that has just begun may become any block."""
    begin = markup.rfind("\n") + 1
    line = markup[begin:]
    is_text = line.lstrip(" ")[:1].isalpha() and not line.startswith("    ")
    return len(markup) if is_text else begin


class _LastBlock(NamedTuple):
    """The block that may still change."""

    begin: int
    kind: str
    goes_on: bool
    """Whether it is an item of a list, but not the first."""
    number: int | None
    """The item's number in an ordered list, where it goes on."""


def _last_block(markup: str, number: int | None) -> _LastBlock:
    tokens = parse_markdown(markup[: _decided(markup)], number)
    starts = [i for i, token in enumerate(tokens) if token.level == 0 and token.map is not None]
    if not starts:
        return _LastBlock(0, "", False, None)
    last = tokens[starts[-1]]
    assert last.map is not None
    line, goes_on, number = last.map[0], False, None
    if last.type in ("bullet_list_open", "ordered_list_open"):
        items = [token for token in tokens[starts[-1] :] if token.type == "list_item_open" and token.level == 1]
        if len(items) > 1 and items[-1].map is not None:
            line, goes_on = items[-1].map[0], True
            number = int(last.attrs.get("start", 1)) + len(items) - 1
    begin = 0
    for _ in range(line):
        begin = markup.index("\n", begin) + 1
    return _LastBlock(begin, last.type, goes_on, number)


class StreamedMarkdown:
    """Writes Markdown to a terminal, piece by piece.

    A block is final when the next one begins (of a list, each item), and is printed for good. Only the last block is
    drawn anew as it grows: lines that have not changed are not touched, so that nothing flickers. Of a block that is
    taller than the screen its end is shown, and the whole is printed when it is final; code scrolls as it comes.
    """

    def __init__(self, console: Console, *, frame_s: float = 0.04) -> None:
        """Write to ``console``, which must be a terminal; draw at most every ``frame_s`` seconds, 0 for every piece."""
        self._console, self._frame_s = console, frame_s
        self._pending = ""
        self._is_first = True
        self._in_list = False
        self._number: int | None = None
        self._region = _Region(console)
        self._drawn_at = self._pause_s = 0.0

    def write(self, text: str) -> None:
        """Add a piece, and show it unless the last drawing was too recent."""
        self._pending += printable(text)
        start = time.monotonic()
        if start - self._drawn_at >= self._pause_s:
            self._show()
            self._drawn_at = time.monotonic()
            # Where drawing takes long, it gets a fifth of the time.
            self._pause_s = max(self._frame_s, 4 * (self._drawn_at - start)) if self._frame_s else 0.0

    def note(self, text: str) -> None:
        """Show a line until the answer begins; an empty text removes it."""
        self._region.draw([f"\x1b[2m{printable(text)}\x1b[0m"] if text else [])

    def finish(self) -> None:
        """Print the rest for good."""
        self._show()
        self._settle(_LastBlock(len(self._pending), "", False, None))
        self._region.draw([], is_final=True)

    def _show(self) -> None:
        last = _last_block(self._pending, self._number)
        if last.begin:
            self._settle(last)
        self._region.draw(self._lines(self._pending), only_grows=last.kind == "fence")

    def _settle(self, last: _LastBlock) -> None:
        """Print all blocks before the last one for good."""
        final, self._pending = self._pending[: last.begin], self._pending[last.begin :]
        self._region.draw(self._lines(final), is_final=True)
        self._is_first = self._is_first and not final.strip()
        self._in_list, self._number = last.goes_on, last.number

    def _lines(self, markup: str) -> list[str]:
        """Return the lines of blocks, after an empty one if there were others before."""
        if not markup.strip():
            return []
        lines = markdown_lines(self._console, markup, self._number)
        return lines if self._is_first or self._in_list else ["", *lines]


class _Region:
    """The lines above the cursor that can be drawn again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._drawn: list[str] = []
        self._n_gone = 0  # lines of the block that have been left to the scrollback
        self._width = console.width

    def draw(self, lines: Sequence[str], *, is_final: bool = False, only_grows: bool = False) -> None:
        """Replace the drawn lines by a block's; final ones are not touched again.

        ``only_grows`` promises that lines do not change once others have come after them.
        """
        if self._console.width != self._width:
            # The terminal has wrapped its lines anew: their places are unknown.
            self._width, self._drawn, self._n_gone = self._console.width, [], 0
        lines = lines[self._n_gone :]
        n_room = max(1, self._console.height - 1)
        n_over = 0 if is_final else max(0, len(lines) - n_room)
        if n_over and not only_grows:
            lines, n_over = lines[n_over:], 0
        self._replace(lines, may_wrap=is_final)
        self._n_gone = 0 if is_final else self._n_gone + n_over
        self._drawn = [] if is_final else list(lines[n_over:])

    def _replace(self, lines: Sequence[str], *, may_wrap: bool) -> None:
        n_same = _n_common(self._drawn, lines)
        n_up = len(self._drawn) - n_same
        if n_up == 0 and n_same == len(lines):
            return
        # A terminal may draw a character wider than expected: without wrapping, the count of lines stays right.
        # Mode 2026 has a terminal that knows it show all changes at once.
        parts = ["\x1b[?2026h", "" if may_wrap else "\x1b[?7l", f"\x1b[{n_up}A" if n_up else ""]
        parts += [f"\x1b[2K{line}\n" for line in lines[n_same:]]
        parts += ["\x1b[J" if len(lines) < len(self._drawn) else "", "" if may_wrap else "\x1b[?7h", "\x1b[?2026l"]
        self._console.file.write("".join(parts))
        self._console.file.flush()


def _n_common(one: Iterable[str], other: Iterable[str]) -> int:
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n
