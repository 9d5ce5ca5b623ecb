"""How fast our products of weights in RAM are, beside llama.cpp's plain and repacked ones and beside reading alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from overspill._core import DeviceMeter, cpu_features, cpu_kernels
from quantities.kernels import Layout, tokens
from quantities.measuring import N_THREADS, measure
from reporting import show

pytestmark = pytest.mark.skipif(cpu_kernels() == "llama.cpp", reason="this CPU has no kernels of ours")

# gpt-oss has rows of 2880 weights, which blocks of 256 do not divide.
ROWS = {"mxfp4": 2880, "q8_0": 2880, "q4_K": 2816, "q5_K": 2816, "q6_K": 2816, "q4_0": 2880, "q4_1": 2880}
ROWS |= {"q5_0": 2880, "q5_1": 2880, "iq4_xs": 2816, "iq4_nl": 2880}
"""Weights in a row, by each type that we have products for."""

Side: TypeAlias = Literal["ours", "ours, AVX2", "llama.cpp", "repacked"]
SIDES: dict[Side, tuple[str, bool]] = {
    "ours": ("auto", False),
    "ours, AVX2": ("avx2", False),
    "llama.cpp": ("llama.cpp", False),
    "repacked": ("llama.cpp", True),
}
"""The kernels of each side, and whether it has llama.cpp's repacked layouts."""


def sides_here() -> list[Side]:
    """Return the sides that this CPU has; AVX2 only where ours are of another instruction set."""
    has_avx2 = "AVX2" in cpu_features() and cpu_kernels() != "avx2"
    return [side for side in SIDES if side != "ours, AVX2" or has_avx2]


@dataclass(frozen=True, slots=True)
class Passes:
    """Bytes per second of passes over the same memory, a number for each round."""

    plain_reads: list[float] = field(default_factory=list)
    sides: dict[Side, list[float]] = field(default_factory=dict)
    """Without llama.cpp's repacked products where it has no such layout for the type."""
    kernels: dict[Side, str] = field(default_factory=dict)
    """What multiplied."""


def product_meter(n_bytes: int) -> DeviceMeter:
    """Return what measures products of so many bytes of weights; with repacked ones, it takes twice the memory."""
    return DeviceMeter("CPU", n_threads=N_THREADS, working_set_bytes=n_bytes, gpus=[], budget_s=0)


def passes(
    meter: DeviceMeter, weights: str, sides: Sequence[Side], *, n_tokens: int = 1, rounds: int, reads: bool = True
) -> Passes:
    """Multiply all the meter's memory, as matrices of 2880 rows, with ``n_tokens`` vectors, the sides in turn.

    With ``reads``, it is also read without computing. Before each pass that counts there is one that does not.
    """
    found = Passes()
    takers: list[Side | None] = [*sides, *([None] if reads else [])]
    for number in range(rounds):
        first = number % len(takers)
        for side in [*takers[first:], *takers[:first]]:
            if side is None:
                found.plain_reads.append(meter.memory_bytes_per_s())
                continue
            if number and side not in found.sides:
                continue
            kernels, repacked = SIDES[side]
            meter.use_products(kernels, repacked)
            rate = meter.weight_rate(weights, ROWS[weights], 2880, 0, 0, n_tokens)
            if repacked and rate.buffer_type == "CPU":
                continue
            found.sides.setdefault(side, []).append(rate.bytes_per_s)
            found.kernels[side] = rate.kernels
    return found


def best_and_median(of: Sequence[float], beside: Sequence[float]) -> tuple[float, float]:
    """Return how many times as fast one is as the other: the best passes of each, and the median of the rounds."""
    return max(of) / max(beside), float(np.median(np.divide(of, beside)))


def test_products_beside_plain_reads(benchmark: BenchmarkFixture) -> None:
    """Each type's products with one vector, 1.6 GB of them, as shares of reading the same memory."""
    sides = sides_here()

    def measured() -> dict[str, Passes]:
        meter = product_meter(1_600_000_000)
        return {weights: passes(meter, weights, sides, rounds=15) for weights in ROWS}

    found: dict[str, Passes] = benchmark.pedantic(measured, rounds=1)  # type: ignore[no-untyped-call]
    rows = []
    for weights, rates in found.items():
        assert rates.kernels["ours"] == cpu_kernels()
        benchmark.extra_info[weights] = asdict(rates)
        row = [weights.upper(), f"{max(rates.plain_reads) / 1e9:.1f}", f"{np.median(rates.plain_reads) / 1e9:.1f}"]
        for side in sides:
            of = rates.sides.get(side)
            row += ["–", "–"] if of is None else [f"{share:.2f}" for share in best_and_median(of, rates.plain_reads)]
        rows.append(row)
    heads = [head for side in ("reads, GB/s", *sides) for head in (f"{side}: best", "median")]
    show(["weights", *heads], *rows)


def test_products_of_batches(benchmark: BenchmarkFixture) -> None:
    """Each type's products with 2 to 16 vectors: times as fast as llama.cpp's faster ones, best and median.

    A star marks what we leave to llama.cpp, since it is faster there.
    """
    sides: list[Side] = [side for side in sides_here() if side != "ours, AVX2"]
    batches = (2, 4, 8, 16)

    def measured() -> dict[str, list[Passes]]:
        meter = product_meter(400_000_000)
        return {
            weights: [passes(meter, weights, sides, n_tokens=n, rounds=7, reads=False) for n in batches]
            for weights in ROWS
        }

    found: dict[str, list[Passes]] = benchmark.pedantic(measured, rounds=1)  # type: ignore[no-untyped-call]
    rows = []
    for weights, batch_rates in found.items():
        row = [weights.upper()]
        for n, rates in zip(batches, batch_rates, strict=True):
            benchmark.extra_info[f"{weights}, {n}"] = asdict(rates)
            rivals = [of for side, of in rates.sides.items() if side != "ours"]
            best, median = (
                min(of) for of in zip(*(best_and_median(rates.sides["ours"], of) for of in rivals), strict=True)
            )
            row += [f"{best:.2f}", f"{median:.2f}{'*' if rates.kernels['ours'] == 'llama.cpp' else ''}"]
        rows.append(row)
    show(["weights", *(head for n in batches for head in (f"{n} at once: best", "median"))], *rows)


@pytest.mark.parametrize("model", ["smollm2_path", "gemma_path", "gpt_oss_20b_of_6_layers", "llama_3_8b_of_18_layers"])
def test_whole_models(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, model: str) -> None:
    """Tokens one by one and 2 to 16 at once, both sides in turn: at none of them are ours slower."""
    path: Path = request.getfixturevalue(model)
    n_tokens, rounds = (12, 3) if model.endswith("_layers") else (24, 5)
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
