"""Attributes that are computed: once, and absent where that fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from overspill._core import Error

__all__ = ["absent_on_error", "cached_property"]

S = TypeVar("S")
T = TypeVar("T")


def absent_on_error(getter: Callable[[S], T]) -> Callable[[S], T]:
    """Make each :class:`overspill.Error` of a property's function an AttributeError as well.

    With other errors than that, ``hasattr(thing, name)`` and ``getattr(thing, name, None)`` raise.
    """

    @functools.wraps(getter)
    def get(thing: S) -> T:
        try:
            return getter(thing)
        except Error as error:
            if isinstance(error, AttributeError):
                raise
            absent = _as_attribute_error(type(error))(*error.args)  # type: ignore[arg-type]
            vars(absent).update(vars(error))
            raise absent.with_traceback(error.__traceback__) from error.__cause__

    return get


@functools.cache
def _as_attribute_error(kind: type[Error]) -> type[Error]:
    """Return a class of that kind's name that is an AttributeError, too; what pickle makes of it is of that kind."""
    return type(
        kind.__name__,
        (kind, AttributeError),
        {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce__": lambda error: (kind, error.args)},
    )


class cached_property(functools.cached_property[T]):  # noqa: N801
    """The standard library's, as it is from Python 3.12 on: without a lock; and absent where it fails.

    Before, all instances of a class share one, and a process that is forked while a thread holds it waits for ever.
    """

    def __init__(self, func: Callable[[Any], T]) -> None:
        super().__init__(absent_on_error(func))
        self.lock = nullcontext()
