"""Text for people: without control characters, in one short line, and broken into lines."""

from __future__ import annotations

from rich.cells import cell_len

__all__ = ["line_breaks", "printable", "short_repr", "wrap"]

# Commands to the terminal, and characters that turn around the text beside them.
_UNPRINTABLE = dict.fromkeys(
    code
    for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
)
# Characters that a Japanese or Chinese line does not begin with, and those that it does not end with.
_NOT_FIRST = frozenset(
    "、。，．・：；？！゛゜ー」』】〉》〕）］｝”’々ゝゞ…‥％℃ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ,.:;!?)]}"
)
_NOT_LAST = frozenset("「『【〈《〔（［｛“‘￥＄([{")
_ZERO_WIDTH_JOINER = "\u200d"  # between the parts of one emoji


def printable(text: str) -> str:
    """Return ``text`` without control characters, but for line feeds and tabs.

    Controls of the direction of text go as well: with them, a line can show something else than it says.
    """
    return text.translate(_UNPRINTABLE)


def short_repr(thing: object, said: str) -> str:
    """Return ``<overspill.Class said>`` for a ``__repr__``: one line of at most 160 characters of what is said."""
    said = " ".join(printable(said).split())
    return f"<overspill.{type(thing).__name__} {said if len(said) <= 160 else f'{said[:159]}…'}>"


def wrap(text: str, width: int) -> list[str]:
    """Return the lines of ``text``, broken as :func:`line_breaks` says, with tabs expanded and no spaces at their ends.

    Parameters
    ----------
    text
        Any number of lines.
    width
        Cells of a line; of less than 2 as of 2.
    """
    lines = []
    for line in text.expandtabs(4).split("\n"):
        starts = [0, *line_breaks(line, max(2, width))]
        lines += [line[start:end].rstrip() for start, end in zip(starts, [*starts[1:], len(line)], strict=True)]
    return lines


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
    if before == _ZERO_WIDTH_JOINER:
        return False
    return before == " " or _is_breakable_beside(before) or _is_breakable_beside(after)


def _is_breakable_beside(character: str) -> bool:
    # Korean is as wide, and puts spaces between its words.
    return cell_len(character) == 2 and not "\uac00" <= character <= "\ud7a3"
