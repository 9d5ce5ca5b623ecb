"""How fast our products of weights in RAM make whole models, beside llama.cpp's plain and repacked ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from overspill._core import cpu_kernels
from quantities.kernels import Layout, tokens
from quantities.measuring import measure
from reporting import show


@pytest.mark.skipif(cpu_kernels() == "llama.cpp", reason="this CPU has no kernels of ours")
@pytest.mark.parametrize("model", ["smollm2_path", "gemma_path", "gpt_oss_20b_of_6_layers"])
def test_whole_models(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, model: str) -> None:
    """Tokens one by one and 2 to 16 at once, both sides in turn: at none of them are ours slower."""
    path: Path = request.getfixturevalue(model)
    n_tokens, rounds = (12, 3) if model == "gpt_oss_20b_of_6_layers" else (24, 5)
    layouts: tuple[Layout, ...] = ("plain", "repacked")

    def measured() -> list[list[str]]:
        rows = []
        for n_together in (1, 2, 4, 8, 16):
            row = [str(n_together)]
            for layout in layouts:
                found = measure(partial(tokens, path, layout, n_together, n=n_tokens), rounds=rounds)
                best, median = found.best, found.median
                row += [f"{median.ours * 1e3:.2f}", f"{median.rival * 1e3:.2f}"]
                row += [f"{1 / best.ratio:.2f}", f"{1 / median.ratio:.2f}"]
                benchmark.extra_info[f"{layout}, {n_together}"] = [*best, *median]
            rows.append(row)
        return rows

    rows: list[list[str]] = benchmark.pedantic(measured, rounds=1)  # type: ignore[no-untyped-call]
    heads = [f"{part} {layout}" for layout in layouts for part in ("ours, ms", "ms", "times, best", "median")]
    show(["tokens at once", *heads], *rows)
