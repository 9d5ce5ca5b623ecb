"""Measure the sampler next to llama.cpp's chain and to one vectorised maximum scan, numpy's, of the same logits.

Ratios are of medians.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from overspill import Model
from quantities import sampler
from quantities.measuring import N_THREADS, measure
from reporting import format_seconds, measured, show

SIZES = [32_000, 201_088, 262_144]
ROUNDS = 7

# Chain, how many times as fast as llama.cpp it has to be at 201,088 logits, and how many scans it may take. With
# normally distributed logits, top-p leaves tens of thousands of tokens, which is where llama.cpp is at its slowest,
# and where we need a second sum: there it has to be that much faster; at a model's logits it has to keep to the scans.
CHAINS: dict[str, tuple[dict[str, Any], float, float]] = {
    "greedy": ({"temperature": 0.0}, 0, 1.5),
    "temperature": ({}, 10, 5),
    "temperature 0.8": ({"temperature": 0.8}, 10, 5),
    "top-k 40": ({"top_k": 40}, 0, 2),
    "top-k 1000": ({"top_k": 1000}, 0, 20),
    "top-p 0.95": ({"top_p": 0.95}, 50, 5),
    "min-p 0.05": ({"min_p": 0.05}, 10, 2),
    "top-k 40, top-p, min-p": ({"top_k": 40, "top_p": 0.95, "min_p": 0.05}, 6, 5),
}


@pytest.fixture(scope="module")
def model_logits(gemma_path: Path) -> NDArray[np.float32]:
    """Return Gemma's logits in the middle of a story, 262,144 of them."""
    with Model(gemma_path, n_ctx=256, n_batch=256) as model:
        return model.eval(model.tokenize("Once upon a time there was a little girl who")).copy()


def logits_of(shape: str, n: int, model_logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a model's logits, drawn anew for a vocabulary of this size; or those of no model, normally distributed."""
    if shape == "normal":
        return sampler.normal_logits(n)
    # The most likely ones stay, the rest is a sample.
    random = np.random.default_rng(n)
    order = np.sort(model_logits)[::-1]
    head = order[:64]
    values = np.concatenate([head, random.choice(order[64:], n - 64, replace=n - 64 > len(order) - 64)])
    return np.ascontiguousarray(random.permutation(values), np.float32)


@pytest.mark.parametrize("shape", ["model", "normal"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("chain", CHAINS)
def test_sampler_against_llama_cpp(
    benchmark: BenchmarkFixture,
    upstream_tools: Path,
    model_logits: NDArray[np.float32],
    chain: str,
    n: int,
    shape: str,
) -> None:
    """At a model's logits, the sampler keeps its distance from llama.cpp and to the scan."""
    keywords, least, most = CHAINS[chain]
    draw = partial(sampler.draw, {**sampler.PLAIN, **keywords}, logits_of(shape, n, model_logits))
    benchmark.group = f"{chain}, {n:,} logits ({shape})"
    beside_llama_cpp = measured(benchmark, partial(draw, sampler.llama_cpp_chain(upstream_tools)), rounds=ROUNDS).median
    beside_scan = measure(partial(draw, sampler.scan), rounds=ROUNDS).median
    speedup, scans = 1 / beside_llama_cpp.ratio, beside_scan.ratio
    benchmark.extra_info.update(scan_s=beside_scan.rival, speedup=speedup, scans=scans)
    show(
        ["chain", "logits", "", "a draw", "a scan", "scans", "llama.cpp", "times as fast"],
        [
            *(chain, f"{n:,}", shape, format_seconds(beside_llama_cpp.ours), format_seconds(beside_scan.rival)),
            *(f"{scans:.2f}", format_seconds(beside_llama_cpp.rival), f"{speedup:.1f}"),
        ],
    )
    if (chain, shape) != ("top-p 0.95", "normal"):
        assert scans <= most
    if n == sampler.N_VOCAB and (chain, shape) != ("top-p 0.95", "model"):
        assert speedup >= least


def test_draws_of_a_stream(benchmark: BenchmarkFixture, gemma_path: Path) -> None:
    """Draws from rows that both threads have just written, after they have read 250 MB of weights."""
    names = ("greedy", "temperature", "top-p 0.95", "top-k 40, top-p, min-p")

    def measured_draws() -> dict[str, list[float]]:
        draws_s: dict[str, list[float]] = {name: [] for name in names}
        with Model(gemma_path, n_ctx=512, n_threads=N_THREADS) as model:
            for name in names * ROUNDS:
                options = {**sampler.PLAIN, **CHAINS[name][0]}
                with model.stream("Once upon a time", max_tokens=200, **options) as stream:
                    for _token in stream:
                        pass
                spent = stream.stats.breakdown
                draws_s[name].append(spent.sample_s / spent.tokens)
        return draws_s

    found: dict[str, list[float]] = benchmark.pedantic(measured_draws, rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(found)
    rows = [[name, format_seconds(float(np.median(draws_s)))] for name, draws_s in found.items()]
    show(["of 262,144 logits, in a stream", "a draw"], *rows)
