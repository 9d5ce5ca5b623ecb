"""Numbers of layers: chosen, written as text, read from text, and grouped into runs."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Hashable, Iterable
from itertools import groupby
from typing import SupportsIndex, TypeAlias

from overspill.base.checks import shown

__all__ = ["Layers", "format_numbers", "layer_runs", "parse_numbers", "selected_layers"]

Layers: TypeAlias = SupportsIndex | slice | Iterable[SupportsIndex] | None
"""A number, a slice, or several numbers; negative ones count from the end. None: all layers."""


def selected_layers(layers: Layers, n_layers: int) -> list[int]:
    """Return the numbers, 0 to ``n_layers - 1``, of the layers that are meant.

    Raises
    ------
    ValueError
        There is no such layer, or none is chosen.
    TypeError
        Something is no number.
    """
    if layers is None:
        return list(range(n_layers))
    if isinstance(layers, slice):
        try:
            selected = list(range(n_layers))[layers]
        except (TypeError, ValueError) as error:
            raise TypeError(f"layers: {error}") from None
        if not selected:
            raise ValueError(f"layers: {layers} selects none of the {n_layers} layers")
        return selected
    if isinstance(layers, bool):
        raise TypeError("layers must be numbers, not a bool")
    selected = []
    is_one = getattr(layers, "ndim", 1) == 0  # of an array, which can be iterated over for all that
    for layer in layers if isinstance(layers, Iterable) and not is_one else [layers]:
        try:
            index = operator.index(layer)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"layers must be numbers, not {shown(layer)}") from None
        if not -n_layers <= index < n_layers:
            last = n_layers - 1
            raise ValueError(f"layers must be 0 to {last}, or -{n_layers} to -1 from the end, not {shown(index)}")
        selected.append(index % n_layers)
    if not selected:
        raise ValueError("layers: none are given")
    return selected


def format_numbers(numbers: Iterable[int]) -> str:
    """Return numbers as text, such as ``0-3,7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_numbers(key: str, text: str, n_layers: int) -> list[int]:
    """Return the numbers in a text such as ``0-3,7``; errors call it ``key``.

    Raises
    ------
    ValueError
        The text has another form, or names a layer from ``n_layers`` on.
    """
    numbers: list[int] = []
    items = str(text).split(",")
    if len(items) > max(1, n_layers):
        raise ValueError(f"{key}: there are {n_layers} layers, and {len(items)} numbers or ranges of them")
    for item in items:
        found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", item)
        if not found:
            raise ValueError(f"{key}: {item.strip()!r} is no layer and no range of layers such as 0-9")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < n_layers:
            raise ValueError(f"{key}: layers must be 0 to {n_layers - 1}, from low to high, not {item.strip()}")
        numbers += range(first, last + 1)
    return numbers


def layer_runs(n_layers: int, key: Callable[[int], Hashable]) -> list[list[int]]:
    """Return the numbers of all layers, in runs of neighbours with equal keys."""
    return [list(run) for _, run in groupby(range(n_layers), key)]
