"""Sizes, rates and counts: from text to numbers, and back."""

from __future__ import annotations

import operator
import re
from typing import TypeAlias

__all__ = ["Rate", "Size", "format_bytes", "format_count", "parse_bytes", "parse_rate"]


Size: TypeAlias = int | str
"""Bytes: an integer, or a text with a unit, such as ``"24GiB"``."""


Rate: TypeAlias = float | str
"""Bytes per second: a number, or a text with a unit, such as ``"936GB/s"``."""


_LARGEST = 2**50


_UNITS = {"B": 1.0} | {
    f"{prefix}{suffix}": float(base**power)
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}


_NUMBER = re.compile(r"\s*([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)\s*(.*?)\s*")


def _checked(name: str, value: float, shown: object, unit: str, low: float) -> float:
    if not low <= value <= _LARGEST:
        raise ValueError(f"{name} must be {'over 0' if low else '0'} to 2**50 {unit}, not {shown}")
    return value


def parse_bytes(name: str, value: Size) -> int:
    """Return a size in bytes.

    Parameters
    ----------
    name
        How errors call it.
    value
        An integer, or a text with a unit: B, kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024),
        in any case.

    Raises
    ------
    ValueError
        There is no unit, or it is none of those; it is negative, or over a pebibyte.
    """
    if not isinstance(value, str):
        try:
            return int(_checked(name, operator.index(value), value, "bytes", 0))
        except TypeError:
            raise TypeError(f'{name} must be bytes as an integer, or a text such as "24GiB", not {value!r}') from None
    found = _NUMBER.fullmatch(value)
    if found is None:
        raise ValueError(f'{name} must be a size such as "24GiB", not "{value}"')
    number, unit = found.groups()
    if unit.upper() not in _UNITS:
        raise ValueError(f'{name} must have a unit: "{number}GiB" or "{number}GB", not "{value}"')
    return int(_checked(name, float(number) * _UNITS[unit.upper()], f'"{value}"', "bytes", 0))


def parse_rate(name: str, value: Rate) -> float:
    """Return a rate in bytes per second.

    Parameters
    ----------
    name
        How errors call it.
    value
        A number, or a text with a unit: those of :func:`parse_bytes` or Mbit, Gbit, each with ``/s``.

    Raises
    ------
    ValueError
        There is no unit, or it is none of those; it is not over 0, or over a pebibyte per second.
    """
    smallest = 1.0
    if not isinstance(value, str):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f'{name} must be bytes per second, or a text such as "936GB/s", not {value!r}')
        return _checked(name, float(value), value, "bytes per second", smallest)
    found = _NUMBER.fullmatch(value)
    if found is None:
        raise ValueError(f'{name} must be a rate such as "936GB/s", not "{value}"')
    number, unit = found.groups()
    size, slash, second = (part.strip() for part in unit.partition("/"))
    scale = {"MBIT": 1e6 / 8, "GBIT": 1e9 / 8}.get(size.upper()) or _UNITS.get(size.upper())
    if scale is None or slash != "/" or second.lower() != "s":
        raise ValueError(f'{name} must have a unit: "{number}GB/s" or "{number}Gbit/s", not "{value}"')
    if size.endswith("b"):
        raise ValueError(f'{name}: write "{number}GB/s" for bytes or "{number}Gbit/s" for bits, not "{value}"')
    return _checked(name, float(number) * scale, f'"{value}"', "bytes per second", smallest)


def format_bytes(n_bytes: int) -> str:
    """Return bytes in the unit that suits them, such as ``1.7 GiB``."""
    for factor, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 1 << factor:
            return f"{n_bytes / (1 << factor):.{0 if n_bytes >= 100 << factor else 1}f} {unit}"
    return f"{n_bytes} B"


def format_count(n: int, what: str) -> str:
    """Return a number of things, such as ``1 layer`` or ``2 layers``."""
    return f"{n} {what}{'' if n == 1 else 's'}"
