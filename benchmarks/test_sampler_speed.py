"""Measure the sampler next to llama.cpp's chain and to one vectorised maximum scan, numpy's, of the same logits.

All three run in turn on one thread. Theirs is timed inside of C++, ours and the scan from Python, call and all.
Ratios are of medians, and are stored with ``--benchmark-json``.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from overspill import Model, Sampler, SamplingOptions
from ratios import PLAIN, time_s
from upstream_tools import UpstreamChain

SIZES = [32_000, 201_088, 262_144]

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
    random = np.random.default_rng(n)
    if shape == "model":
        # The most likely ones stay, the rest is a sample.
        order = np.sort(model_logits)[::-1]
        head = order[:64]
        values = np.concatenate([head, random.choice(order[64:], n - 64, replace=n - 64 > len(order) - 64)])
        return np.ascontiguousarray(random.permutation(values), np.float32)
    return random.normal(0, 3, n).astype(np.float32)


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
    options = SamplingOptions(**{**PLAIN, **keywords}, seed=1)
    logits = logits_of(shape, n, model_logits)
    sampler = Sampler(options)
    upstream = UpstreamChain(upstream_tools, options, n)
    ids, p = sampler.distribution(logits)
    if options.temperature > 0:
        their_ids, their_p, _ = upstream.sample(logits)
        assert abs(len(ids) - len(their_ids)) <= 0.02 * len(ids), "the two disagree"
        # llama.cpp adds up the whole row in floats, one by one.
        assert np.allclose(p[:50], np.sort(their_p)[::-1][:50], atol=1e-5, rtol=2e-3)
    benchmark.group = f"{chain}, {n:,} logits ({shape})"
    ours: list[float] = []
    theirs: list[float] = []
    scans: list[float] = []

    def all_three() -> None:
        scans.append(time_s(logits.max, 30) * 1e6)
        ours.append(time_s(lambda: sampler.sample(logits), 30) * 1e6)
        theirs.append(upstream.time_us(logits, 3))

    benchmark.pedantic(all_three, rounds=7, warmup_rounds=1)  # type: ignore[no-untyped-call]
    sample, upstream_us, scan = (statistics.median(times) for times in (ours, theirs, scans))
    benchmark.extra_info.update(
        sample_us=sample, llama_cpp_us=upstream_us, scan_us=scan, speedup=upstream_us / sample, scans=sample / scan
    )
    print(
        f"\n{chain:>24} {n:>8,} {shape:>7}: {sample:7.1f} us, {sample / scan:5.2f} scans of {scan:5.1f} us; "
        f"llama.cpp {upstream_us:8.1f} us, {upstream_us / sample:6.1f} times"
    )
    if (chain, shape) != ("top-p 0.95", "normal"):
        assert sample / scan <= most
    if n == 201_088 and (chain, shape) != ("top-p 0.95", "model"):
        assert upstream_us / sample >= least
