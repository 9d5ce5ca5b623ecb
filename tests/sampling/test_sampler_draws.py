"""Draws are as likely as float64 arithmetic says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chi_square import Z_OF_1_IN_10_000, deviation
from overspill import Model, Sampler
from sampling_cases import PLAIN, mask_of, masked
from sampling_reference import edited, mirostat_survivors, survivors
from sweeps import sweep


def check_draws(
    sampler: Sampler,
    x: NDArray[np.float32],
    history: list[int],
    allowed: NDArray[np.uint32] | None = None,
    n_draws: int = 20_000,
) -> None:
    """Compare draws with float64's probabilities: chi-square at 1 in 10,000."""
    options = sampler.options
    y = edited(masked(x, allowed), options, history)
    if options.mirostat:
        ids, p, _ = mirostat_survivors(y, options)
    else:
        ids, p = survivors(y, options)
    counts = Counter(sampler.sample(x, allowed=allowed) for _ in range(n_draws))
    assert set(counts) <= set(ids.tolist())
    expected = p * n_draws
    observed = np.array([counts[int(token)] for token in ids], np.float64)
    # What is unlikely is pooled, by likelihood: tokens alike would be wronged alike.
    pool = np.where(expected >= 10, np.arange(len(ids)), len(ids) + (np.cumsum(expected) // 50).astype(np.int64))
    _, cell = np.unique(pool, return_inverse=True)
    assert deviation(np.bincount(cell, observed), np.bincount(cell, expected)) < Z_OF_1_IN_10_000


DRAWS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.9, "temperature": 0.7},
    {"top_k": 20},
    {"min_p": 0.1},
    {"temperature": 1.7},
    {"typical_p": 0.8},
    {"logit_bias": {1: 2.0}},
    {"xtc_probability": 1.0, "xtc_threshold": 0.02},
    {"top_p": 0.95, "xtc_probability": 1.0, "xtc_threshold": 0.005},
    {"mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.0},
    {"dynamic_temperature_range": 0.8},
    {"repeat_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.2},
]


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("keywords", DRAWS, ids=str)
@pytest.mark.parametrize("n", [50, 5000])
def test_draws_are_as_likely_as_they_should_be(keywords: dict[str, Any], n: int, with_mask: bool) -> None:
    """Each sampler alone, also among a part of the tokens."""
    random = np.random.default_rng(8)
    x = random.normal(0, 2, n).astype(np.float32)
    history = random.integers(0, n, 30).tolist()
    sampler = Sampler(replace(PLAIN, **keywords))
    for token in history:
        sampler.accept(token)
    check_draws(sampler, x, history, mask_of(np.random.default_rng(1), n) if with_mask else None)


@pytest.mark.parametrize("temperature", sweep([0.7, 1.0], always=[1]))
@pytest.mark.parametrize("keywords", sweep([{}, {"top_p": 0.6}, {"top_p": 0.95}, {"min_p": 0.01}], always=[2]), ids=str)
def test_draws_from_large_rows(gemma: Model, keywords: dict[str, Any], temperature: float) -> None:
    """Two hundred thousand tokens nearly alike, and what a model says."""
    flat = np.random.default_rng(2).normal(0, 1, 201_088).astype(np.float32)
    gemma.reset()
    says = gemma.eval(gemma.tokenize("Once upon a")).copy()
    for x in (flat, says):
        check_draws(Sampler(replace(PLAIN, temperature=temperature, **keywords)), x, [], n_draws=8_000)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_wide_nucleus_is_drawn_from_evenly(temperature: float) -> None:
    """No token gets what rejected ones had: chi-square over tokens by their place in a block, at 1 in 10,000."""
    n, n_draws = 8192, 60_000
    x = np.random.default_rng(0).normal(0, 1, n).astype(np.float32)
    sampler = Sampler(replace(PLAIN, temperature=temperature, top_p=0.7))
    ids, p = sampler.distribution(x)
    # Cells: the last kept token of each block, the one before it, and so on.
    order = np.sort(ids)
    from_the_end = np.concatenate(
        [np.arange(len(block))[::-1] for block in np.split(order, np.flatnonzero(np.diff(order // 256)) + 1)]
    )
    cell = dict(zip(order.tolist(), np.minimum(from_the_end, 20).tolist(), strict=True))
    expected, observed = np.zeros(21), np.zeros(21)
    np.add.at(expected, [cell[token] for token in ids.tolist()], p.astype(np.float64) * n_draws)
    np.add.at(observed, [cell[sampler.sample(x)] for _ in range(n_draws)], 1)
    assert ((observed - expected) ** 2 / expected).sum() < 52.4  # 20 degrees of freedom
