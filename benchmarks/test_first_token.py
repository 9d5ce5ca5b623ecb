"""Measure the time to the first token: next to a minimal loop's prefill, of a second turn, and of a saved prompt."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from quantities.first_token import first_token, resumed, second_turn
from reporting import format_seconds, measured, show


@pytest.mark.parametrize(("n", "rounds"), [(16, 40), (128, 16), (512, 5)], ids=["16", "128", "512"])
def test_first_token_against_minimal_loop(
    benchmark: BenchmarkFixture, gemma_path: Path, upstream_tools: Path, n: int, rounds: int
) -> None:
    """Until the first token, nothing counts but llama.cpp's reading of the prompt."""
    found = measured(benchmark, partial(first_token, gemma_path, upstream_tools, n_prompt=n), rounds=rounds)
    # llama.cpp takes one of two times for a prompt, by where the system puts its threads.
    ratio = min(found.best.ratio, found.median.ratio)
    benchmark.extra_info["ratio"] = ratio
    cells = [f"prompt of {n}", format_seconds(found.best.ours), format_seconds(found.best.rival), f"{ratio:.3f}"]
    show(["first token", "ours", "a minimal loop", "ratio"], cells)
    assert ratio <= 1.1


@pytest.mark.parametrize("name", ["gemma", "smollm2"])
def test_second_turn(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, name: str) -> None:
    """A second turn reads what is new in it; without reuse, it reads everything again."""
    path: Path = request.getfixturevalue(f"{name}_path")
    found = measured(benchmark, partial(second_turn, path, n_first=600, n_new=4), rounds=3).best
    benchmark.extra_info["ratio"] = found.ratio
    cells = [name, format_seconds(found.ours), format_seconds(found.rival), f"{found.ratio:.1%}"]
    show(["4 new tokens of 604", "with reuse", "without", "ratio"], cells)
    assert found.ratio <= 0.2


@pytest.mark.parametrize("name", ["gemma", "smollm2"])
def test_a_saved_prompt(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    """A prompt that was read once is loaded from a file, with its checksum."""
    path: Path = request.getfixturevalue(f"{name}_path")
    session = tmp_path / "session"
    found = measured(benchmark, partial(resumed, path, session, n_prompt=8000), rounds=2).best
    benchmark.extra_info["ratio"] = found.ratio
    size = f"{session.stat().st_size / 1e6:.0f} MB"
    cells = [name, size, format_seconds(found.ours), format_seconds(found.rival), f"{found.ratio:.1%}"]
    show(["first token after 8,000", "file", "resumed", "read", "ratio"], cells)
    assert found.ratio <= 0.1
