"""Text for a terminal: without control characters, and broken into lines."""

from __future__ import annotations

from rich.cells import cell_len

__all__ = ["line_breaks", "printable"]


# Control characters of a reply would be commands to the terminal.
_UNPRINTABLE = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


# What a Japanese or Chinese line does not begin with, and does not end with.
_NOT_FIRST = frozenset(
    "、。，．・：；？！゛゜ー」』】〉》〕）］｝”’々ゝゞ…‥％℃ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ,.:;!?)]}"
)


_NOT_LAST = frozenset("「『【〈《〔（［｛“‘￥＄([{")


def printable(text: str) -> str:
    """Return ``text`` without control characters, but for line feeds and tabs."""
    return text.translate(_UNPRINTABLE)


def line_breaks(text: str, width: int) -> list[int]:
    """Return where the lines after the first begin: at words, and between characters of Japanese and Chinese.

    Parameters
    ----------
    text
        One line.
    width
        Cells of a line, at least 2.
    """
    breaks: list[int] = []
    start = at = 0  # of the unit that cannot be divided, and the cells before it
    cells = spaces = 0  # of the unit, and of these at its end

    def place(end: int) -> None:
        nonlocal start, at, cells, spaces
        if at and at + cells - spaces > width:
            breaks.append(start)
            at = 0
        if cells - spaces > width:  # longer than a line
            used = 0
            for i in range(start, end):
                n = cell_len(text[i])
                if used + n > width and text[i] != " ":
                    breaks.append(i)
                    used = 0
                used += n
            cells = used
        at += cells
        start, cells, spaces = end, 0, 0

    for i, character in enumerate(text):
        if i > start and _is_breakable(text[i - 1], character):
            place(i)
        n = cell_len(character)
        cells += n
        spaces = spaces + n if character == " " else 0
    place(len(text))
    return breaks


def _is_breakable(before: str, after: str) -> bool:
    if after == " " or after in _NOT_FIRST or before in _NOT_LAST or cell_len(after) == 0:
        return False
    return before == " " or cell_len(before) == 2 or cell_len(after) == 2
