"""Tables without lines, for the terminal and for pipes."""

from __future__ import annotations

from collections.abc import Collection

from rich.table import Table

__all__ = ["plain_table"]


def plain_table(*headings: str, left: Collection[str] | None = None) -> Table:
    """Return an empty table without a box, so that a pipe gets plain text.

    Parameters
    ----------
    headings
        Text stands at the left and may be wrapped, numbers stand at the right.
    left
        The headings of text; default: the first one. Columns without a heading are text, too.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        is_text = not heading or heading in (headings[:1] if left is None else left)
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table
