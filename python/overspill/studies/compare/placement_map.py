"""A map of a model's placement: layers to the right, parts down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from overspill.base.units import format_bytes
from overspill.header.tensor_names import layer_of, part_of
from overspill.placement.outline import PARTS
from overspill.studies.compare.answers import ComparedModel

__all__ = ["PlacementMap", "Rectangle", "placement_map"]

_PART_NAMES = {"kv": "KV cache"}


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A rectangle of the map: x and width in layers, y and height in rows."""

    x: float
    y: float
    width: float
    height: float
    device: str
    title: str


@dataclass(frozen=True, slots=True)
class PlacementMap:
    """A map of a placement: a row for each part of the model, a column for each layer."""

    rows: list[tuple[str, str]]
    """Labels and sizes."""
    rectangles: list[Rectangle]
    n_layers: int
    description: str
    totals: list[tuple[str, str]]
    """Devices and the bytes on each, in words."""


def _runs(devices: Sequence[str]) -> str:
    """Return the layers on each device in words: ``0-9 on CUDA0, 10-35 on CPU``."""
    texts = []
    for device, run in groupby(enumerate(devices), key=lambda entry: entry[1]):
        numbers = [number for number, _ in run]
        texts.append(f"{numbers[0]}-{numbers[-1]} on {device}")
    return ", ".join(texts)


def placement_map(one: ComparedModel) -> PlacementMap:
    """Return the map of a model's placement."""
    placement, info = one.placement, one.info
    located = placement.tensors()
    layers: dict[str, list[Counter[str]]] = {part: [Counter() for _ in range(placement.n_layers)] for part in PARTS}
    whole: dict[str, Counter[str]] = {"embedding": Counter(), "output": Counter()}
    for name, _, _, n_bytes in info.tensors:
        part, layer = part_of(name), layer_of(name)
        if layer is not None and layer < placement.n_layers and part in layers:
            layers[part][layer][located[name]] += n_bytes
        elif part in whole:
            whole[part][located[name]] += n_bytes
    shared = info.tied_embedding and placement.output_matrix == placement.embedding
    if info.tied_embedding and not shared:
        whole["output"][placement.output_matrix] += sum(whole["embedding"].values())  # a copy
    for layer, device in enumerate(placement.kv):
        sizes = placement.kv_bytes_by_layer
        layers["kv"][layer][device] = 0 if sizes is None else sizes[layer]
    width = placement.n_layers
    rows: list[tuple[str, list[tuple[float, float, str, Counter[str]]]]] = [
        ("embedding, output" if shared else "embedding", [(0, width, "embedding", whole["embedding"])])
    ]
    for kind, cells in layers.items():
        if any(cells):
            label = _PART_NAMES.get(kind, kind)
            rows.append((label, [(i, 0.88, f"layer {i}, {label}", cell) for i, cell in enumerate(cells) if cell]))
    if not shared:
        rows.append(("output", [(0, width, "output", whole["output"])]))
    rectangles = [
        piece
        for y, (_, cells) in enumerate(rows)
        for x, cell_width, title, sizes in cells
        for piece in _pieces(x, y, cell_width, title, sizes)
    ]
    said = [
        f"{label}: {_runs([' and '.join(sizes) for *_, sizes in cells])}"
        if len(cells) > 1
        else f"{label} on {' and '.join(cells[0][3])}"
        for label, cells in rows
    ]
    labels = [(label, format_bytes(sum(sum(sizes.values()) for *_, sizes in cells))) for label, cells in rows]
    totals = [(device, format_bytes(n_bytes)) for device, n_bytes in placement.bytes_by_device().items() if n_bytes]
    return PlacementMap(labels, rectangles, width, "; ".join(said), totals)


def _pieces(x: float, y: float, width: float, title: str, sizes: Mapping[str, int]) -> Iterable[Rectangle]:
    """Yield a cell's rectangles: one for each device, as high as its share of the bytes."""
    total, top = sum(sizes.values()), y + 0.08
    for device, n_bytes in sizes.items():
        height = 0.84 * (n_bytes / total if total else 1 / len(sizes))
        text = f"{title}: {device}" + (f", {format_bytes(n_bytes)}" if n_bytes else "")
        yield Rectangle(x, round(top, 4), width, round(height, 4), device, text)
        top += height
