"""Measure how long it takes until a model can be used, next to llama.cpp alone, and until a plan is there."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from quantities.load import importing, loading, planning
from quantities.measuring import Pair
from reporting import format_seconds, measured, show


def check(benchmark: BenchmarkFixture, found: Pair, what: str, rival: str, most: float) -> None:
    """Show both times; their ratio is at most ``most``."""
    benchmark.extra_info["ratio"] = found.ratio
    cells = [what, format_seconds(found.ours), format_seconds(found.rival), f"{found.ratio:.2f}"]
    show(["", "ours", rival, "ratio"], cells)
    assert found.ratio <= most


@pytest.mark.parametrize(("name", "rounds"), [("gemma", 5), ("smollm2", 20)], ids=["gemma", "smollm2"])
def test_loading_against_minimal_loop(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, upstream_tools: Path, name: str, rounds: int
) -> None:
    """A file in the page cache loads as fast as with llama.cpp, header, plan and read-back included."""
    path: Path = request.getfixturevalue(f"{name}_path")
    found = measured(benchmark, partial(loading, path, upstream_tools), rounds=rounds)
    check(benchmark, found.best, f"loading {name}", "llama.cpp alone", 1.5)


def test_importing(benchmark: BenchmarkFixture) -> None:
    """Importing costs what numpy, jinja2 and rich cost, and a little."""
    found = measured(benchmark, partial(importing, "numpy,jinja2,rich.console"), rounds=5)
    check(benchmark, found.best, "import overspill", "numpy, jinja2 and rich", 3)


@pytest.mark.parametrize("vram", [8, 24])
def test_planning_against_llama_cpp_fit(
    benchmark: BenchmarkFixture, gpt_oss_120b_header: Path, upstream_tools: Path, vram: int
) -> None:
    """A plan, from the file's header on, takes less than llama.cpp's fit, and expects to be as fast or faster."""
    quantity = partial(planning, gpt_oss_120b_header, upstream_tools, vram_gib=vram)
    found = measured(benchmark, quantity, rounds=2, warm_up=False)
    check(benchmark, found.best, f"a plan of gpt-oss-120b, {vram} GiB", "llama.cpp's fit", 1.0)
