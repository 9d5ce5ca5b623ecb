"""Checks of arguments; their errors name the argument and its range or choices."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex, TypeVar

__all__ = [
    "as_flag",
    "as_function",
    "as_instance",
    "as_integer",
    "as_json",
    "as_list",
    "as_mapping",
    "as_path",
    "as_real",
    "as_real_within",
    "as_text",
    "check_choice",
    "check_keywords",
    "device_index",
    "keywords_of",
    "naming",
    "shown",
]

T = TypeVar("T")

# The largest integers of the core; errors do not show them as the end of a range.
_LARGEST = (2**31 - 1, 2**63 - 1)


def shown(value: object) -> str:
    """Return a value as an error shows it: at most 80 characters, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # a number of too many digits, a list that is nested too deeply, a class with a bug
        return f"<{type(value).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:79]}…"


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
        raise TypeError(f"{name} must be an integer, not {shown(value)}") from None
    if not low <= number <= high:
        expected = f"at least {low}" if low > number and high in _LARGEST else f"{low} to {high}"
        raise ValueError(f"{name} must be {expected}, not {shown(number)}")
    return number


def as_real(name: str, value: float) -> float:
    """Return ``value`` as a float; the core checks the range.

    Raises
    ------
    TypeError
        The value is no number.
    ValueError
        The value is beyond what a float holds.
    """
    given: object = value
    try:
        if isinstance(given, SupportsFloat) and not isinstance(given, str):
            return float(given)
    except (TypeError, ValueError):  # an array of several numbers
        pass
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, not {shown(value)}") from None
    raise TypeError(f"{name} must be a number, not {shown(value)}")


def as_real_within(name: str, value: float, low: float, high: float) -> float:
    """Return a number from ``low`` to ``high``; another one is a ValueError that says so."""
    number = as_real(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be {low:g} to {high:g}, not {number:g}")
    return number


def as_flag(name: str, value: object) -> bool:
    """Return ``value``, which must be True or False, or be equal to one of them as 0 and 1 are."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
        if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
            number = int(bool(value))
    if number not in (0, 1):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")
    return bool(number)


def as_text(name: str, value: object) -> str:
    """Return ``value``, a string that UTF-8 can hold.

    Raises
    ------
    TypeError
        It is no string.
    ValueError
        A character is a surrogate.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 can hold, without surrogates: character {error.start} is "
            f"{value[error.start]!r}"
        ) from None
    return value


def as_path(name: str, value: object) -> Path:
    """Return ``value`` as a path.

    Raises
    ------
    TypeError
        It is neither a string nor a path.
    ValueError
        It is empty, or has a character that no path has.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path, as a string or a Path, not {shown(value)}")
    if not text or "\0" in text:
        raise ValueError(f"{name} must be the path of a file, not {shown(value)}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be the path of a file, not {shown(value)}") from None
    return Path(text)


def as_list(name: str, values: object, what: str) -> list[Any]:
    """Return the items of a sequence or another iterable; a TypeError that says ``what`` it must have in it."""
    if not isinstance(values, str | bytes | bytearray | Mapping | Set | os.PathLike):
        try:
            return list(values)  # type: ignore[call-overload, no-any-return]
        except TypeError:
            pass
    raise TypeError(f"{name} must be a sequence of {what}, not {shown(values)}")


def as_mapping(name: str, value: object, what: str) -> Mapping[str, Any]:
    """Return ``value``, a mapping from strings; a TypeError that says ``what`` it must be."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be {what}, not {shown(value)}")
    return value


def as_function(name: str, value: object) -> Callable[..., Any]:
    """Return ``value``, or raise a TypeError if it cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {shown(value)}")
    return value


def as_json(name: str, value: object) -> str:
    """Return ``value`` in JSON.

    Raises
    ------
    TypeError
        JSON cannot hold it.
    ValueError
        It has a number that is not finite or text that UTF-8 cannot hold, or is nested too deeply.
    """
    try:
        text = json.dumps(value, allow_nan=False)
        if "\\ud" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be text that UTF-8 can hold, without surrogates") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    except ValueError as error:  # an infinite number, or a list in itself
        raise ValueError(f"{name}: {error}") from None
    return text


def as_instance(name: str, value: object, kind: type[T]) -> T:
    """Return ``value``, or raise a TypeError if it is no instance of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of the type overspill.{kind.__name__}, not {shown(value)}")
    return value


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ValueError if ``value`` is none of ``choices``."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {shown(value)}")


def keywords_of(*functions: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters that can be given as keywords alone."""
    parameters = (one for function in functions for one in signature(function).parameters.values())
    return frozenset(one.name for one in parameters if one.kind is one.KEYWORD_ONLY)


def check_keywords(given: Iterable[str], known: Set[str]) -> None:
    """Raise a TypeError for the first of the given names that is not known."""
    for name in given:
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            meant = f": did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(sorted(known))}"
            raise TypeError(f"there is no option {name!r}{meant}")


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


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of an argument before the errors about what is in it."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
