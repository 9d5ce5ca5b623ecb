"""Measure how long it takes until a model can be used, next to llama.cpp alone, and until a plan is there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from overspill import Hardware, Model, ModelInfo, plan
from upstream_tools import MinimalLoop, upstream_fit

GIB = 1 << 30


@pytest.mark.parametrize(("name", "rounds"), [("gemma", 5), ("smollm2", 20)], ids=["gemma", "smollm2"])
def test_loading_against_minimal_loop(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, upstream_tools: Path, name: str, rounds: int
) -> None:
    """A file in the page cache loads as fast as with llama.cpp, header, plan and read-back included."""
    path: Path = request.getfixturevalue(f"{name}_path")
    ours: list[float] = []
    theirs: list[float] = []

    def both() -> None:
        start = time.perf_counter()
        with Model(path, n_ctx=1024, n_threads=2):
            ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        loop = MinimalLoop(upstream_tools, path, n_ctx=1024, n_threads=2)
        theirs.append(time.perf_counter() - start)
        loop.close()

    benchmark.pedantic(both, rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
    ratio = min(ours) / min(theirs)
    benchmark.extra_info.update(ours_s=min(ours), minimal_loop_s=min(theirs), ratio=ratio)
    print(f"\n{name}: loaded in {min(ours):.3f} s, llama.cpp alone {min(theirs):.3f} s, ratio {ratio:.2f}")
    assert ratio <= 1.5


def test_importing(benchmark: BenchmarkFixture) -> None:
    """Importing costs what numpy, jinja2 and rich cost, and a little."""
    times: dict[str, list[float]] = {"overspill": [], "numpy, jinja2, rich.console": []}

    def both() -> None:
        for modules, found in times.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
            found.append(time.perf_counter() - start)

    benchmark.pedantic(both, rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]
    ours, others = (min(found) for found in times.values())
    benchmark.extra_info.update(ours_s=ours, numpy_jinja2_rich_s=others)
    print(f"\nimport overspill {ours:.2f} s, numpy, jinja2 and rich alone {others:.2f} s")
    assert ours <= 3 * others


@pytest.mark.parametrize("vram", [8, 24])
def test_planning_against_llama_cpp_fit(
    benchmark: BenchmarkFixture, gpt_oss_120b_header: Path, upstream_tools: Path, vram: int
) -> None:
    """A plan, from the file's header on, takes less than llama.cpp's fit, and expects to be as fast or faster."""
    hardware = Hardware.given(ram=128 * GIB, vram=vram * GIB)
    ours: list[float] = []
    theirs: list[float] = []

    def both() -> None:
        start = time.perf_counter()
        plan(ModelInfo.from_file(gpt_oss_120b_header), hardware=hardware, n_ctx=8192)
        ours.append(time.perf_counter() - start)
        theirs.append(upstream_fit(upstream_tools, gpt_oss_120b_header, {"GPU0": vram * GIB}).seconds)

    benchmark.pedantic(both, rounds=2)  # type: ignore[no-untyped-call]
    ratio = min(ours) / min(theirs)
    benchmark.extra_info.update(ours_s=min(ours), llama_cpp_fit_s=min(theirs), ratio=ratio)
    print(f"\ngpt-oss-120b, {vram} GiB: planned in {min(ours):.2f} s, llama.cpp's fit {min(theirs):.2f} s")
    assert ratio <= 1.0
