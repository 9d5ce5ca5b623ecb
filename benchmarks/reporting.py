"""Show what benchmarks have measured: tables, and the figures in pytest-benchmark's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from overspill.base.tables import plain_table
from quantities.measuring import Measured, Quantity, measure

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def show(headings: Sequence[str], *rows: Sequence[str]) -> None:
    """Print a table; the first of the headings is that of the names."""
    shown = plain_table(*headings)
    for row in rows:
        shown.add_row(*row)
    console = Console(width=140, highlight=False)
    console.print()
    console.print(shown)


def format_seconds(seconds: float) -> str:
    """Return seconds in the unit that suits them, with three digits or all before the point."""
    unit, factor = next(
        ((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if abs(seconds) * f >= 1), ("ns", 1e9)
    )
    value = seconds * factor
    return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"


def measured(benchmark: BenchmarkFixture, quantity: Quantity, **how: Any) -> Measured:
    """Return a quantity, measured in a test of pytest-benchmark, whose JSON gets the seconds of every round.

    ``how`` are the rounds and loads of :func:`quantities.measuring.measure`.
    """
    found: Measured = benchmark.pedantic(measure, (quantity,), how, rounds=1)  # type: ignore[no-untyped-call]
    for side, rounds in (("ours_s", found.ours), ("rival_s", found.rival)):
        benchmark.extra_info[side] = [float(np.mean(timed.seconds)) for timed in rounds]
    return found
