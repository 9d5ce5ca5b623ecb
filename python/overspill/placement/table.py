"""A placement as a table, in a terminal and in a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from overspill.base import html
from overspill.base.units import format_bytes
from overspill.placement.assignment import Assignment
from overspill.placement.layer_numbers import format_numbers, layer_runs
from overspill.placement.outline import PARTS, LayerPart

__all__ = ["Cell", "PlacementTable", "placement_table"]

Cell: TypeAlias = Mapping[str, int | None]
"""Devices, and the bytes on each, if known."""

# Readable on dark and on light: a terminal has its own colours, HTML gets dark text on a pale ground.
_CPU_COLOURS = ("yellow", "#ffe2b0")
_GPU_COLOURS = (("green", "#b9e6c9"), ("cyan", "#b5e1f2"), ("magenta", "#e6cbf2"), ("blue", "#ccd6f8"))


@dataclass(frozen=True, slots=True)
class PlacementTable:
    """The content of a table."""

    title: str
    devices: Sequence[str]
    """All devices, the CPU last."""
    parts: Sequence[str]
    """The columns."""
    rows: Sequence[tuple[str, Sequence[Cell]]]
    """For each run of equal layers, a label and a cell for every part."""
    totals: Sequence[tuple[str, Cell]]
    """The lines below the layers."""
    overrides: Sequence[tuple[str, str]]
    """Regular expressions, and their devices."""

    def _colours(self, device: str) -> tuple[str, str]:
        gpu = self.devices.index(device)
        return _CPU_COLOURS if gpu == len(self.devices) - 1 else _GPU_COLOURS[gpu % len(_GPU_COLOURS)]

    def for_terminal(self) -> Group:
        """Return the table for rich to print."""

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
        """Return an HTML ``<table>`` that needs no style sheet."""

        def td(cell: Cell, span: int = 1) -> str:
            entries = [(_entry(device, n_bytes), self._colours(device)[1]) for device, n_bytes in cell.items()]
            if len(entries) == 1:
                text, ground = entries[0]
                return html.cell(html.escape(text), span=span, ground=ground)
            boxes = [html.box(*entry) for entry in entries]
            return html.cell(
                " ".join(boxes) if span > 1 else "<br>".join(["mixed", *boxes] if boxes else ["–"]), span=span
            )

        rows = [html.heading("layers") + "".join(map(html.heading, self.parts))]
        rows += [html.heading(label) + "".join(map(td, cells)) for label, cells in self.rows]
        rows += [html.heading(label) + td(cell, len(self.parts)) for label, cell in self.totals]
        for pattern, device in self.overrides:
            override = f"<code>{html.escape(pattern)}</code> → {html.escape(device)}"
            rows.append(html.heading("override") + html.cell(override, span=len(self.parts)))
        return html.table(rows, self.title)


def _entry(device: str, n_bytes: int | None) -> str:
    # The size stays with its device where a narrow terminal breaks lines.
    return device if n_bytes is None else f"{device} {format_bytes(n_bytes)}".replace(" ", "\N{NO-BREAK SPACE}")


def placement_table(assignment: Assignment) -> PlacementTable:
    """Return the table of an assignment."""
    model = assignment.model
    runs = layer_runs(model.n_layers, lambda layer: _devices_in(assignment, layer))
    rows = [(format_numbers(run), [_cell(assignment, run, part) for part in model.layer_parts]) for run in runs]
    return PlacementTable(
        str(model), assignment.devices, model.layer_parts, rows, _totals(assignment), assignment.overrides
    )


def _devices_in(assignment: Assignment, layer: int) -> Hashable:
    """Return a value that is equal for layers that one row can show."""
    parts = [assignment.device_of_part(layer, part) for part in PARTS]
    if "mixed" not in parts:
        return tuple(parts)
    # Layers that are mixed differently get different rows.
    names = [name for of_part in assignment.model.layers[layer].values() for name in of_part]
    stems = sorted((name.partition(f"blk.{layer}.")[2], assignment.tensors[name]) for name in names)
    return (assignment.kv[layer], *stems)


def _cell(assignment: Assignment, layers: Sequence[int], part: LayerPart) -> Cell:
    """Return the devices of a part of equal layers, and the bytes there."""
    if part == "kv":
        sizes = assignment.kv_bytes_by_layer
        return {assignment.kv[layers[0]]: None if sizes is None else sum(sizes[layer] for layer in layers)}
    names = [name for layer in layers for name in assignment.model.layers[layer].get(part, ())]
    return _in_order(assignment, _bytes_by_device(assignment, names))


def _totals(assignment: Assignment) -> list[tuple[str, Cell]]:
    """Return the lines below the layers: a label, and bytes by device."""
    model = assignment.model
    output, embedding, other = (
        _bytes_by_device(assignment, (name for name, found in model.parts.items() if found == part))
        for part in ("output", "embedding", "other")
    )
    label = "output"
    if assignment.copies_embedding:
        label = "output (copy of embedding)"
        output[assignment.output_matrix] += model.tensors["token_embd.weight"]
    weights = Counter({device: n_bytes for device, n_bytes in assignment.bytes_by_device().items() if n_bytes})
    lines = [(label, output), ("embedding", embedding), ("other tensors", other), ("all weights", weights)]
    if assignment.kv_bytes_by_layer is not None:
        caches: Counter[str] = Counter()
        for device, n_bytes in zip(assignment.kv, assignment.kv_bytes_by_layer, strict=True):
            caches[device] += n_bytes
        lines.append(("all KV caches", caches))
    lines.append(("cache of experts", Counter(assignment.expert_cache)))
    return [(label, _in_order(assignment, sizes)) for label, sizes in lines if sizes]


def _bytes_by_device(assignment: Assignment, names: Iterable[str]) -> Counter[str]:
    """Return the bytes of the tensors of these names on each device that has any."""
    sizes: Counter[str] = Counter()
    for name in names:
        sizes[assignment.tensors[name]] += assignment.model.tensors[name]
    return sizes


def _in_order(assignment: Assignment, sizes: Mapping[str, int]) -> Cell:
    return {device: sizes[device] for device in assignment.devices if device in sizes}
