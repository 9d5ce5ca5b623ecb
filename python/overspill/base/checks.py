"""Checks of arguments, whose errors name the argument and its range."""

from __future__ import annotations

import operator
from typing import SupportsFloat, SupportsIndex

__all__ = ["as_integer", "as_real"]


_LARGEST = (2**31 - 1, 2**63 - 1)


def as_integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """Return ``value``, or raise what names the argument and the range."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number <= high:
        # The largest integers are only what the core can hold, no range that anyone would look for.
        expected = f"at least {low}" if low > number and high in _LARGEST else f"{low} to {high}"
        raise ValueError(f"{name} must be {expected}, not {number}")
    return number


def as_real(name: str, value: float) -> float:
    """Return ``value`` as a float; the core checks the range."""
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)
