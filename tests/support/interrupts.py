"""Ctrl-C in tests, also where pytest itself ignores it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """Have SIGINT interrupt this process and those that it starts.

    A shell has it ignored in what it runs in the background, and children inherit that; a handler is not inherited,
    so that they begin with the default.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
