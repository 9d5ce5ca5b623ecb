"""The sampler against llama.cpp's own chain, float64 arithmetic, and itself on every instruction set."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray

from overspill import Error, Model, Sampler, SamplingOptions, _core
from overspill.sampling import SamplingKeywords
from sampling_reference import edited, survivors
from upstream_tools import UpstreamChain

PLAIN = SamplingOptions(temperature=1, top_k=0, top_p=1, min_p=0, seed=1)

# Each sampler on its own; combinations are drawn from all.
ALONE: dict[str, list[dict[str, Any]]] = {
    "temperature": [{"temperature": t} for t in (0.0, 0.1, 0.8, 1.0, 3.0)],
    "dynamic": [
        {"dynamic_temperature_range": r, "dynamic_temperature_exponent": e} for r, e in ((0.5, 1.0), (1.0, 2.0), (2.0, 0.5))
    ],
    "top_k": [{"top_k": k} for k in (1, 2, 40, 1000, 10**6)],
    "top_p": [{"top_p": p} for p in (0.0, 0.1, 0.5, 0.95, 0.999)],
    "min_p": [{"min_p": p} for p in (0.001, 0.05, 0.5, 1.0)],
    "typical": [{"typical_p": p} for p in (0.2, 0.5, 0.95)],
    "sigma": [{"top_n_sigma": n} for n in (0.5, 1.0, 2.5)],
    "xtc": [{"xtc_probability": 1.0, "xtc_threshold": t} for t in (0.01, 0.1, 0.3)],
    "penalties": [
        {"repeat_penalty": 1.3, "repeat_last_n": -1},
        {"frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"repeat_penalty": 0.8, "frequency_penalty": -0.3, "repeat_last_n": 8},
    ],
    "bias": [{"logit_bias": {0: 3.0, 3: -math.inf, 6: -1.5}}, {"logit_bias": {5: 100.0}}],
}
SIZES = [7, 16, 33, 255, 256, 257, 1000, 4097]
LARGE_SIZES = [32000, 201088, 262144]


def rows(random: np.random.Generator, n: int) -> NDArray[np.float32]:
    """Return logits of one of the shapes that make trouble, or of a model's."""
    shape = random.choice(["normal", "flat", "peaked", "ties", "equal", "infinite", "one", "offset", "zipf"])
    x = random.normal(0, 3, n)
    if shape == "flat":
        x = random.normal(0, 0.3, n)
    elif shape == "peaked":
        x[random.integers(n, size=min(n, 5))] += random.uniform(5, 25, min(n, 5))
    elif shape == "ties":
        x = np.round(x)
    elif shape == "equal":
        x[:] = 1.5
    elif shape == "infinite":
        x[random.random(n) < 0.5] = -math.inf
        x[random.integers(n)] = 1.0
    elif shape == "one":
        x[:] = -math.inf
        x[random.integers(n)] = -3.0
    elif shape == "offset":
        x += 500
    elif shape == "zipf":
        x = -np.log(random.permutation(n) + 1.0) * random.uniform(0.8, 2.5)
    return x.astype(np.float32)


def options_of(random: np.random.Generator, n: int) -> SamplingOptions:
    """Return one sampler on its own, or up to five together."""
    names = list(ALONE)
    chosen = random.choice(names, size=int(random.choice([1, 1, 2, 3, 5])), replace=False)
    keywords: dict[str, Any] = {}
    for name in chosen:
        keywords |= ALONE[name][random.integers(len(ALONE[name]))]
    bias = {token: value for token, value in keywords.get("logit_bias", {}).items() if token < n}
    return replace(PLAIN, **{**keywords, "logit_bias": bias})


def compare(case: int, x: NDArray[np.float32], options: SamplingOptions, history: list[int], tools: Path) -> str:
    """Compare with llama.cpp, or fail.

    "rounding": float64 sides with us; llama.cpp adds up to 262,144 floats one by one, and cuts a little off the mark.
    """
    upstream = UpstreamChain(tools, options, len(x))
    sampler = Sampler(options)
    for token in history:
        upstream.accept(token)
        sampler.accept(token)
    what = f"case {case}: n={len(x)}, {options}, {len(history)} tokens of history"
    y = edited(x, options, history)
    if np.isneginf(y).all():
        with pytest.raises(Error, match="no token is left"):
            sampler.sample(x)
        return "nothing left"
    ids, p = sampler.distribution(x)
    their_ids, their_p, chosen = upstream.sample(x)
    if options.temperature == 0 and options.dynamic_temperature_range == 0:
        their_ids, their_p = np.array([chosen], np.int32), np.ones(1, np.float32)
    weighty = their_p > 1e-30  # llama.cpp keeps what is impossible in its list
    their_ids, their_p = their_ids[weighty], their_p[weighty]
    kept = p > 1e-30
    ids, p = ids[kept], p[kept]
    assert abs(float(p.astype(np.float64).sum()) - 1) < 1e-5, what
    assert (np.diff(y[ids]) <= 0).all(), f"{what}: not in order"
    their_order = np.argsort(-y[their_ids], kind="stable")
    # Among equal logits llama.cpp keeps any, we the first: so the logits are compared, and the ids where they tell.
    same_set = len(ids) == len(their_ids) and np.array_equal(y[ids], y[their_ids][their_order])
    if same_set and np.abs(p - their_p[their_order]).max() <= 1e-5:
        ours, theirs = set(ids.tolist()), set(their_ids.tolist())
        for token in ours ^ theirs:
            assert (y == y[token]).sum() > 1, f"{what}: {token} is kept by one side only"
        return "equal"
    right_ids, right_p = survivors(y, options)
    right_ids, right_p = right_ids[right_p > 1e-30], right_p[right_p > 1e-30]
    assert np.array_equal(ids, right_ids), f"{what}: {len(ids)} are left, not {len(right_ids)}; llama.cpp: {len(their_ids)}"
    assert np.abs(p - right_p).max() <= 1e-5, f"{what}: probabilities differ by {np.abs(p - right_p).max()}"
    if options.typical_p < 1 and (np.isinf(y).any() or options.top_n_sigma > 0):
        return "undefined"  # llama.cpp's entropy is NaN then: 0 * log(0)
    return "rounding"


@pytest.mark.parametrize("part", range(10))
def test_same_distribution_as_llama_cpp(upstream_tools: Path, part: int) -> None:
    """10,000 random cases leave the same tokens with the same probabilities, within 1e-5."""
    random = np.random.default_rng(part)
    outcomes: Counter[str] = Counter()
    for case in range(1000):
        n = int(random.choice(LARGE_SIZES) if case % 40 == 0 else random.choice(SIZES))
        options = options_of(random, n)
        history = random.integers(0, n, size=int(random.integers(0, 100))).tolist()
        outcomes[compare(case, rows(random, n), options, history, upstream_tools)] += 1
    print(dict(outcomes))
    assert outcomes["equal"] >= 970
