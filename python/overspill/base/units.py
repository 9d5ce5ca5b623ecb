"""Sizes, rates and counts: parsed from text, and written as text."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from overspill.base.checks import as_mapping, as_real, shown

__all__ = [
    "BinaryUnit",
    "Rate",
    "Size",
    "format_bytes",
    "format_count",
    "format_rate",
    "parse_bytes",
    "parse_memory",
    "parse_rate",
]

Size: TypeAlias = int | str
"""Bytes: an integer, or a text with a unit, such as ``"24GiB"``."""
Rate: TypeAlias = float | str
"""Bytes per second: a number, or a text with a unit, such as ``"936GB/s"``."""
BinaryUnit: TypeAlias = Literal["B", "KiB", "MiB", "GiB"]

_BINARY_UNITS: Final[dict[BinaryUnit, int]] = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}
_LARGEST: Final = 2**50
_UNITS: Final = {"B": 1.0} | {
    f"{prefix}{suffix}": float(base**power)
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_NUMBER: Final = re.compile(r"\s*([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)\s*(.*?)\s*")


def _checked(name: str, value: float, given: Size | Rate, unit: str, low: float) -> float:
    if not low <= value <= _LARGEST:
        raise ValueError(f"{name} must be {'over 0' if low else '0'} to 2**50 {unit}, not {_quoted(given)}")
    return value


def _quoted(given: Size | Rate) -> str:
    return f'"{given:.80}"' if isinstance(given, str) else shown(given)


def parse_bytes(name: str, value: Size) -> int:
    """Return a size in bytes, 0 to 2**50.

    Parameters
    ----------
    name
        The argument's name, for errors.
    value
        An integer, or a text with a unit: B, kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024),
        in any case.

    Raises
    ------
    ValueError
        The unit is missing or unknown, or the size is negative or over 2**50 bytes.
    TypeError
        The value is neither an integer nor a text.
    """
    if not isinstance(value, str):
        try:
            return int(_checked(name, operator.index(value), value, "bytes", 0))
        except TypeError:
            raise TypeError(
                f'{name} must be bytes as an integer, or a text such as "24GiB", not {shown(value)}'
            ) from None
    found = _NUMBER.fullmatch(value)
    if found is None:
        raise ValueError(f'{name} must be a size such as "24GiB", not {_quoted(value)}')
    number, unit = found.groups()
    if unit.upper() not in _UNITS:
        raise ValueError(f'{name} must have a unit: "{number}GiB" or "{number}GB", not {_quoted(value)}')
    return int(_checked(name, float(number) * _UNITS[unit.upper()], value, "bytes", 0))


def parse_rate(name: str, value: Rate) -> float:
    """Return a rate in bytes per second, 1 to 2**50.

    Parameters
    ----------
    name
        The argument's name, for errors.
    value
        A number, or a text with a unit: those of :func:`parse_bytes` or Mbit, Gbit, each with ``/s``.

    Raises
    ------
    ValueError
        The unit is missing or unknown, or the rate is not over 0, or over 2**50 bytes per second.
    TypeError
        The value is neither a number nor a text.
    """
    smallest = 1.0
    if not isinstance(value, str):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f'{name} must be bytes per second, or a text such as "936GB/s", not {shown(value)}')
        return _checked(name, as_real(name, value), value, "bytes per second", smallest)
    found = _NUMBER.fullmatch(value)
    if found is None:
        raise ValueError(f'{name} must be a rate such as "936GB/s", not {_quoted(value)}')
    number, unit = found.groups()
    size, slash, second = (part.strip() for part in unit.partition("/"))
    scale = {"MBIT": 1e6 / 8, "GBIT": 1e9 / 8}.get(size.upper()) or _UNITS.get(size.upper())
    if scale is None or slash != "/" or second.lower() != "s":
        raise ValueError(f'{name} must have a unit: "{number}GB/s" or "{number}Gbit/s", not {_quoted(value)}')
    if size.endswith("b"):
        raise ValueError(f'{name}: write "{number}GB/s" for bytes or "{number}Gbit/s" for bits, not {_quoted(value)}')
    return _checked(name, float(number) * scale, value, "bytes per second", smallest)


def parse_memory(memory: Mapping[str, Size] | None, argument: str = "memory") -> dict[str, int]:
    """Return the argument of that name in bytes: sizes by the names of devices; empty for None.

    Raises
    ------
    ValueError, TypeError
        It is no such mapping, or a size is wrong as for :func:`parse_bytes`.
    """
    if memory is None:
        return {}
    sizes = as_mapping(argument, memory, 'a mapping from devices to sizes, such as {"gpu": "20GiB"}')
    return {name: parse_bytes(f"{argument}[{name!r:.40}]", size) for name, size in sizes.items()}


def format_bytes(n_bytes: int, *, digits: int | None = None, unit: BinaryUnit | None = None) -> str:
    """Return bytes as text, such as ``1.7 GiB``.

    Parameters
    ----------
    n_bytes
        The bytes, at least 0.
    digits
        Digits after the point, of which plain bytes have none. Default: 1, or none from 100 units on.
    unit
        The unit. Default: the largest of GiB, MiB, KiB and B of which there is at least one.
    """
    unit = unit or _largest_unit(n_bytes)
    size = _BINARY_UNITS[unit]
    if unit == "B":
        digits = 0
    elif digits is None:
        digits = 0 if n_bytes >= 100 * size else 1
    return f"{n_bytes / size:.{digits}f} {unit}"


def _largest_unit(n_bytes: int) -> BinaryUnit:
    return next((unit for unit, size in _BINARY_UNITS.items() if n_bytes >= size), "B")


def format_rate(bytes_per_s: float) -> str:
    """Return bytes per second as text, such as ``46.9 GB/s``; the unit is always 10^9 bytes."""
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def format_count(n: int, thing: str) -> str:
    """Return a number of things as text, such as ``1 layer`` or ``2 layers``; ``thing`` is the singular."""
    return f"{n} {thing}{'' if n == 1 else 's'}"
