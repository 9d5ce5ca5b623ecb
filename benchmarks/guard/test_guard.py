"""The guard against slow-downs, and that it sees them."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

import ratios
from overspill import LogitsProcessor
from quantities.measuring import Models

# What a slow-down of the loop changes.
OF_THE_LOOP = [
    "stream / minimal loop, tiny gpt-oss",
    "stream / minimal loop, Gemma",
    "logits to text / a greedy draw, Gemma",
]


@pytest.fixture(scope="module")
def bench(tiny_gpt_oss_path: Path, gemma_path: Path, gpt_oss_120b_header: Path, upstream_tools: Path) -> ratios.Bench:
    """Return what ratios are measured with."""
    return ratios.Bench(Models(gemma_path, tiny_gpt_oss_path, gpt_oss_120b_header), upstream_tools)


def show(found: list[ratios.Guarded]) -> str:
    """Return the table as text."""
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(ratios.as_table(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_ratios(bench: ratios.Bench) -> None:
    """No ratio is over its limit."""
    found = list(ratios.measure_ratios(bench))
    print(f"\n{show(found)}")
    if any(one.is_over for one in found):
        pytest.fail(f"slower than benchmarks/guard/limits.toml allows:\n{show(found)}", pytrace=False)


def copying() -> LogitsProcessor:
    """Return what copies the logits of each token."""
    kept = np.empty(0, np.float32)

    def process(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        nonlocal kept
        kept = logits.copy()

    return process


def sleeping(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
    """Sleep for 300 microseconds."""
    time.sleep(300e-6)


def nothing(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
    """Be called, and that is all."""


@pytest.mark.parametrize(
    ("process", "caught"), [(nothing, False), (copying(), True), (sleeping, True)], ids=["nothing", "copy", "sleep"]
)
def test_slow_downs_are_caught(bench: ratios.Bench, process: LogitsProcessor, caught: bool) -> None:
    """A copy of the logits or a sleep for each token is over a limit; a function that does neither is not."""
    slowed = replace(bench, slower={"logits_processors": [process]})
    found = list(ratios.measure_ratios(slowed, OF_THE_LOOP, attempts=1 if caught else 3))
    print(f"\n{show(found)}")
    assert any(one.is_over for one in found) == caught
    assert show(found).count("SLOWER") == sum(one.is_over for one in found)
