"""A target whose third input does harm, each name in its own way, to try the runner on."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from random import Random

from fuzz.runner import serve

__all__ = ["HARMS"]


def _raise() -> None:
    raise KeyError("the third")


def _spin() -> None:
    while True:
        pass


def _grow() -> None:
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1 << 20)))


HARMS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "an exception": _raise,
    "a bad address": lambda: ctypes.string_at(0),
    "an abort": os.abort,
    "an exit": lambda: os._exit(3),
    "no end": _spin,
    "a long wait": lambda: time.sleep(1000),
    "too much memory": _grow,
}


class Harmful:
    """See the module."""

    def __init__(self, name: str) -> None:
        """Do harm as the name says."""
        self._harm, self._n = HARMS[name], 0

    def make(self, random: Random) -> int:
        """Return anything."""
        return random.getrandbits(32)

    def check(self, case: int) -> None:
        """Do harm the third time."""
        self._n += 1
        if self._n == 3:
            self._harm()


if __name__ == "__main__":
    _, _, name, *numbers = sys.argv
    serve(name, Harmful(name), *map(int, numbers))
