"""A placement as a table, in a terminal and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from overspill.base.units import format_bytes

__all__ = ["Cell", "PlacementTable"]

Cell: TypeAlias = Mapping[str, int | None]
"""Devices, and the bytes on each, if known."""

# Readable on dark and on light: in a terminal its own colours, in HTML dark text on a pale ground.
_CPU_COLOURS = ("yellow", "#ffe2b0")
_GPU_COLOURS = (("green", "#b9e6c9"), ("cyan", "#b5e1f2"), ("magenta", "#e6cbf2"), ("blue", "#ccd6f8"))


@dataclass(frozen=True, slots=True)
class PlacementTable:
    """What a table shows."""

    title: str
    devices: Sequence[str]
    """The CPU last."""
    parts: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    """Runs of equal layers, with a cell for every part."""
    totals: Sequence[tuple[str, Cell]]
    """What comes below the layers."""
    overrides: Sequence[tuple[str, str]]
    """Regular expressions, and devices."""

    def _colours(self, device: str) -> tuple[str, str]:
        gpu = self.devices.index(device)
        return _CPU_COLOURS if gpu == len(self.devices) - 1 else _GPU_COLOURS[gpu % len(_GPU_COLOURS)]

    def for_terminal(self) -> Group:
        """Return what rich prints."""

        def text(cell: Cell, separator: str) -> Text:
            entries = [Text(_entry(device, n), self._colours(device)[0]) for device, n in cell.items()]
            if separator == "\n" and len(entries) > 1:
                entries.insert(0, Text("mixed"))
            return Text(separator).join(entries) if entries else Text("–")

        layers = Table("layers", *self.parts, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for label, cells in self.rows:
            layers.add_row(label, *(text(cell, "\n") for cell in cells))
        totals = Table.grid(padding=(0, 2))
        for label, cell in self.totals:
            totals.add_row(label, text(cell, " · "))
        for pattern, device in self.overrides:
            totals.add_row("override", Text(f"{pattern} → ").append(device, self._colours(device)[0]))
        return Group(Text(self.title, "bold"), "", layers, "", totals)

    def as_html(self) -> str:
        """Return one ``<table>`` that needs no style sheet."""
        style = "padding:.25em .7em;text-align:left;vertical-align:top;border:1px solid rgba(128,128,128,.4)"

        def td(cell: Cell, span: int = 1) -> str:
            entries = []
            for device, n_bytes in cell.items():
                ground = f"background:{self._colours(device)[1]};color:#1b1b1b"
                entries.append((ground, html.escape(_entry(device, n_bytes))))
            if len(entries) == 1:
                return f'<td colspan="{span}" style="{style};{entries[0][0]}">{entries[0][1]}</td>'
            lines = [f'<span style="{ground};padding:0 .4em">{text}</span>' for ground, text in entries]
            text = " ".join(lines) if span > 1 else "<br>".join(["mixed", *lines] if lines else ["–"])
            return f'<td colspan="{span}" style="{style}">{text}</td>'

        def th(text: str) -> str:
            return f'<th style="{style}">{html.escape(text)}</th>'

        rows = [th("layers") + "".join(map(th, self.parts))]
        rows += [th(label) + "".join(map(td, cells)) for label, cells in self.rows]
        rows += [th(label) + td(cell, len(self.parts)) for label, cell in self.totals]
        rows += [
            f'{th("override")}<td colspan="{len(self.parts)}" style="{style}">'
            f"<code>{html.escape(pattern)}</code> → {html.escape(device)}</td>"
            for pattern, device in self.overrides
        ]
        caption = (
            f'<caption style="padding:.25em .7em;text-align:left;font-weight:bold">{html.escape(self.title)}</caption>'
        )
        whole = "border-collapse:collapse;color:inherit;font-variant-numeric:tabular-nums"
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f'<table style="{whole}">{caption}{body}</table>'


def _entry(device: str, n_bytes: int | None) -> str:
    # The size stays with its device where a narrow terminal breaks lines.
    return device if n_bytes is None else f"{device} {format_bytes(n_bytes)}".replace(" ", "\N{NO-BREAK SPACE}")
