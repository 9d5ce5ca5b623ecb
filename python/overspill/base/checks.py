"""Checks of arguments; their errors name the argument and its range or choices."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import SupportsFloat, SupportsIndex

__all__ = ["as_integer", "as_real", "check_choice", "device_index"]

# The largest integers of the core; errors do not show them as the end of a range.
_LARGEST = (2**31 - 1, 2**63 - 1)


def as_integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """Return ``value`` as an integer of ``low`` to ``high``.

    Raises
    ------
    TypeError
        The value is no integer.
    ValueError
        The value is out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number <= high:
        expected = f"at least {low}" if low > number and high in _LARGEST else f"{low} to {high}"
        raise ValueError(f"{name} must be {expected}, not {number}")
    return number


def as_real(name: str, value: float) -> float:
    """Return ``value`` as a float; the core checks the range.

    Raises
    ------
    TypeError
        The value is no number.
    """
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ValueError if ``value`` is none of ``choices``."""
    known = tuple(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def device_index(names: Sequence[str], wanted: str) -> int | None:
    """Return the index in ``names`` of the device called ``wanted``, or None.

    Parameters
    ----------
    names
        The names of GPUs, then the CPU's.
    wanted
        A name in any case; ``"cpu"`` is the last device, ``"gpu"`` the first GPU.
    """
    folded = [name.casefold() for name in names]
    if (name := wanted.casefold()) in folded:
        return folded.index(name)
    if name == "cpu":
        return len(names) - 1
    return 0 if name == "gpu" and len(names) > 1 else None
