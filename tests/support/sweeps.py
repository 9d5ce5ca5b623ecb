"""Sweeps over many cases, of which a run without ``-m slow`` takes a few."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], always: Container[int]) -> list[Any]:
    """Return parameters for ``parametrize``; all are slow but those at the places ``always``."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if place in always else pytest.mark.slow)
        for place, case in enumerate(cases)
    ]
