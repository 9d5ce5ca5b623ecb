"""Measure decoding on a machine whose cores other programs use as well.

The number of threads that adapts takes turns with fixed numbers, beside none, half, one and four busy processes a core.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from overspill import Model
from overspill.base.host import physical_cores
from reporting import show

ROUNDS = 5
# Of each turn: some hundred turns of the system's scheduler.
SECONDS = 2.5


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Keep so many processes busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tokens_per_s(model: Model) -> tuple[float, float]:
    """Return the speed of a stream, and how many threads it left out."""
    with model.stream("Once upon a time", max_tokens=900, temperature=0) as stream:
        began = time.perf_counter()
        for _ in stream:
            if time.perf_counter() - began > SECONDS:
                break
    return stream.stats.tokens_per_second or 0.0, stream.stats.breakdown.threads_left_out


@pytest.mark.parametrize("per_core", [0.0, 0.5, 1.0, 4.0])
def test_threads_beside_busy_processes(benchmark: BenchmarkFixture, smollm2_path: Path, per_core: float) -> None:
    """The number that adapts keeps 0.8 of the best fixed one's speed, and 0.98 where nothing else runs."""
    n_cores = physical_cores()
    counts = sorted({1, (n_cores + 1) // 2, n_cores})
    settings: dict[str, dict[str, Any]] = {str(n): {"n_threads": n, "adapt_threads": False} for n in counts}
    settings["adapts"] = {"n_threads": n_cores}
    speeds: dict[str, list[float]] = {name: [] for name in settings}
    left_out: list[float] = []

    def measure() -> None:
        for _ in range(ROUNDS):
            for name, options in settings.items():
                # Opened anew: the place of its memory makes some percent of a model's speed.
                with Model(smollm2_path, n_ctx=1024, **options) as model:
                    speed, left = tokens_per_s(model)
                speeds[name].append(speed)
                if name == "adapts":
                    left_out.append(left)

    with busy_processes(round(per_core * n_cores)):
        benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    share = medians["adapts"] / max(speed for name, speed in medians.items() if name != "adapts")
    benchmark.extra_info.update(tokens_per_s=speeds, share=share, threads_left_out=left_out)
    show(
        ["busy processes per core", *(f"{n} threads" for n in counts), "adapts", "of the best", "threads left out"],
        [str(per_core), *(f"{speed:.1f}" for speed in medians.values()), f"{share:.2f}", f"{left_out[-1]:.2f}"],
    )
    assert share >= (0.98 if per_core == 0 else 0.8)
