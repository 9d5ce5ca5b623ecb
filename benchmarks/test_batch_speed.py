"""Measure many prompts decoded together against one by one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from quantities.batch import PROMPTS, sixteen_prompts, step_of_many
from quantities.measuring import measure
from reporting import format_seconds, measured, show


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_sixteen_prompts(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, name: str) -> None:
    """Three times the tokens per second, or nearly what a step of sixteen tokens allows on this CPU."""
    path: Path = request.getfixturevalue(f"{name}_path")
    found = measured(benchmark, partial(sixteen_prompts, path), rounds=3).best
    steps = measure(partial(step_of_many, path, len(PROMPTS)), rounds=3, warm_up=False).median
    speedup = 1 / found.ratio
    # Weights are read once for sixteen tokens; what is left is arithmetic, of which each token has as much.
    limit = len(PROMPTS) / steps.ratio
    benchmark.extra_info.update({"ratio": speedup, "limit": limit})
    show(
        ["tokens/s", "alone", "together", "ratio", "at most", "a step of one", "a step of 16"],
        [
            *(name, f"{1 / found.rival:.0f}", f"{1 / found.ours:.0f}", f"{speedup:.2f}", f"{limit:.2f}"),
            *(format_seconds(steps.rival), format_seconds(steps.ours)),
        ],
    )
    assert speedup >= min(3.0, 0.8 * limit)
