"""Numbers of layers: chosen, written as text, and read from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import SupportsIndex, TypeAlias

Layers: TypeAlias = SupportsIndex | slice | Iterable[SupportsIndex] | None


def _format_numbers(numbers: Iterable[int]) -> str:
    """Return numbers as ``0-3,7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _parse_numbers(key: str, text: str, n_layers: int) -> list[int]:
    """Return what :func:`_format_numbers` was given."""
    numbers: list[int] = []
    for item in str(text).split(","):
        found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", item)
        if not found:
            raise ValueError(f"{key}: {item.strip()!r} is no layer and no range of layers such as 0-9")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < n_layers:
            raise ValueError(f"{key}: layers must be 0 to {n_layers - 1}, from low to high, not {item.strip()}")
        numbers += range(first, last + 1)
    return numbers
