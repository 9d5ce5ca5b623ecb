"""HTML for notebooks: tables, bars and lines without style sheets, readable on light grounds and on dark ones.

Text has the notebook's colour. What has a ground of its own has a pale one, and dark text on it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from overspill.base.text import printable

__all__ = ["Segment", "bar", "box", "cell", "escape", "facts", "from_rich", "heading", "lines", "passage", "table"]

_BORDER = "1px solid rgba(128,128,128,.4)"
_CELL = f"padding:.25em .7em;text-align:{{}};vertical-align:top;border:{_BORDER}"


def escape(text: str) -> str:
    """Return text for an element or an attribute, without control characters."""
    return html.escape(printable(text))


def _on(ground: str) -> str:
    return f"background:{ground};color:#1b1b1b" if ground else ""


def cell(content: str, *, span: int = 1, align: Literal["left", "right"] = "left", ground: str = "") -> str:
    """Return a cell of HTML that is as wide as ``span`` columns; ``ground`` is a pale colour."""
    style = ";".join(filter(None, (_CELL.format(align), _on(ground))))
    return f'<td colspan="{span}" style="{style}">{content}</td>'


def heading(text: str, align: Literal["left", "right"] = "left") -> str:
    """Return a cell of plain text that names a row or a column."""
    return f'<th style="{_CELL.format(align)}">{escape(text)}</th>'


def table(rows: Iterable[str], title: str = "") -> str:
    """Return a table of rows, each the HTML of its cells, below a title of plain text; a wide one is scrolled."""
    caption = (
        f'<caption style="padding:.25em .7em;text-align:left;font-weight:bold;color:inherit">{escape(title)}</caption>'
        if title
        else ""
    )
    body = "".join(f'<tr style="background:none">{row}</tr>' for row in rows)
    style = "border-collapse:collapse;color:inherit;font-variant-numeric:tabular-nums;margin:.4em 0"
    return f'<div style="overflow-x:auto"><table style="{style}">{caption}{body}</table></div>'


def facts(named: Iterable[tuple[str, str]], title: str = "") -> str:
    """Return a table of names and values, both plain text."""
    return table((heading(name) + cell(escape(value)) for name, value in named), title)


def box(text: str, ground: str = "") -> str:
    """Return plain text in a box within a line."""
    style = f"{_on(ground) or f'border:{_BORDER}'};display:inline-block;padding:0 .4em"
    return f'<span style="{style}">{escape(text)}</span>'


def lines(texts: Sequence[str]) -> str:
    """Return a paragraph with a line for each plain text; nothing if there is none."""
    return f'<p style="margin:.4em 0;max-width:44em">{"<br>".join(map(escape, texts))}</p>' if texts else ""


def passage(text: str) -> str:
    """Return plain text whose line breaks and spaces are kept."""
    return f'<div style="white-space:pre-wrap;max-width:44em">{escape(text)}</div>'


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar."""

    label: str
    share: float
    """Of the bar's whole length, 0 to 1."""
    ground: str = ""
    """A pale colour; none: what is left empty."""
    n_bytes: int | None = None
    """What the length stands for, if that is memory."""


def bar(segments: Iterable[Segment], width: str = "44em") -> str:
    """Return a bar, so wide where there is room; segments that are long enough have their label in them."""
    style = f"display:flex;box-sizing:border-box;height:1.7em;width:{width};max-width:100%;border:{_BORDER}"
    return f'<div style="{style}">{"".join(map(_segment, segments))}</div>'


def _segment(one: Segment) -> str:
    style = (
        f"box-sizing:border-box;width:{100 * one.share:.4f}%;line-height:1.6em;overflow:hidden;white-space:nowrap;"
        f"text-align:center;font-size:90%;{_on(one.ground)}"
    )
    # Of the 44 em that a bar is long, a character takes about half of one.
    text = escape(one.label) if one.share > 0.014 * len(one.label) else ""
    data = "" if one.n_bytes is None else f' data-bytes="{one.n_bytes}"'
    return f'<div title="{escape(one.label)}"{data} style="{style}">{text}</div>'


def from_rich(parts: Iterable[object]) -> str:
    """Return texts and tables that are made for a terminal; what else is among them is left out."""
    made = []
    for part in parts:
        if isinstance(part, Text):
            made.append(_text(part))
        elif isinstance(part, Table):
            made.append(_table(part))
    return "".join(made)


def _text(text: Text) -> str:
    said = escape(text.plain)
    return f'<p style="margin:.4em 0">{f"<strong>{said}</strong>" if text.style == "bold" else said}</p>'


def _table(shown: Table) -> str:
    sides: list[Literal["left", "right"]] = [
        "right" if column.justify == "right" else "left" for column in shown.columns
    ]
    rows = ["".join(heading(str(column.header), side) for column, side in zip(shown.columns, sides, strict=True))]
    for number, cells in enumerate(zip(*(column.cells for column in shown.columns), strict=True)):
        texts = [escape(str(one)) for one in cells]
        if shown.rows[number].style == "bold":
            texts = [f"<strong>{text}</strong>" for text in texts]
        rows.append("".join(cell(text, align=side) for text, side in zip(texts, sides, strict=True)))
    return table(rows)
