"""Compare a cache of experts with the planner's static placement of the same memory, along routes, on a stand-in GPU.

The model has gpt-oss-20b's experts in 24 layers, of 10.2 GB, and little else: the stand-in computes attention with the
CPU, as fast as that is. Experts there are not computed, but their time passes beside what the CPU does: they are read
at 1 TB/s, 10 to 20 times the CPU's rate, copies go at 25 GB/s, and each step of a visit takes 13 µs, 40 in all. What a
copy takes of the RAM's bandwidth is not in it. The router follows the token, so that a trace decides which experts are
used: OVERSPILL_ROUTES names a file of one (arrays of tokens, layers, experts of a token), otherwise it is made up, and
stays with an expert of the token before by 44 %.

What is measured is fixed beforehand: in a process of its own, each placement decodes the trace three times, of which
the last one counts; all that twice in turn, of which the better one counts. The hardware is measured again after each
time, and the median of predicted over measured speed counts.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from expert_routes import SHAPE, Row, decode_beside_stand_in, in_memory, placements_beside_stand_in, print_rows
from header_files import Routes, gpt_oss
from overspill.base.values import Experts
from quantities.measuring import in_own_process
from routed_models import markov_routes

N_TOKENS = 256
N_ROUNDS, N_PASSES = 2, 3
# By the share of experts that are resident: so much faster than static placements the cache is to be.
GAINS = {0.31: 1.6, 0.125: 1.2}
# Where nothing is used again it may be so much slower.
UNIFORM_LOSS = 0.98
WITHIN = 0.15


def real_or_made_up() -> Routes:
    """Return the routes of OVERSPILL_ROUTES, or made up ones."""
    if file := os.environ.get("OVERSPILL_ROUTES"):
        with np.load(file) as arrays:
            routes = np.concatenate([arrays[name] for name in sorted(arrays.files)])
        return routes[:N_TOKENS].astype(np.uint16)
    return markov_routes(N_TOKENS, SHAPE["n_layers"], SHAPE["n_experts"], 4)


def uniform() -> Routes:
    """Return routes that have nothing to do with each other."""
    return markov_routes(N_TOKENS, SHAPE["n_layers"], SHAPE["n_experts"], 4, kept=0.0, zipf=0.0)


def compare(tools: Path, path: Path, resident: float, routes: Routes) -> dict[Experts, Row]:
    """Return what came of each placement: the last passes of all rounds."""
    both = in_own_process(placements_beside_stand_in, tools, path, resident, N_TOKENS)
    found: dict[Experts, list[Row]] = {one.experts: [] for one in both}
    for _ in range(N_ROUNDS):
        for one in both:
            found[one.experts].append(in_own_process(decode_beside_stand_in, tools, path, one, routes, N_PASSES))
    return {
        name: replace(
            rows[-1],
            tokens_per_s=tuple(row.tokens_per_s[-1] for row in rows),
            hit_share=tuple(share for row in rows for share in row.hit_share[-1:]),
            insertions_per_token=tuple(n for row in rows for n in row.insertions_per_token[-1:]),
            predicted_over_measured=statistics.median(
                [(row.predicted_with_hits or 0) / row.tokens_per_s[-1] for row in rows]
            ),
        )
        for name, rows in found.items()
    }


@pytest.fixture
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep nothing for the user of what is measured here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("resident", GAINS)
def test_a_cache_against_static_placements(
    benchmark: BenchmarkFixture, upstream_tools: Path, resident: float, nothing_kept: None
) -> None:
    """Faster by what the share of resident experts allows, and as fast as is predicted for its hits."""
    routes = real_or_made_up()
    with in_memory("routed gpt-oss", gpt_oss(**SHAPE), Console(stderr=True), routes) as path:
        arguments = (upstream_tools, path, resident, routes)
        found: dict[Experts, Row] = benchmark.pedantic(compare, arguments, rounds=1)  # type: ignore[no-untyped-call]
    print_rows([*found.values()], f"{resident:.1%} resident, {len(routes)} tokens", Console(width=120, highlight=False))
    static, cached = (max(found[name].tokens_per_s) for name in ("static", "cached"))
    benchmark.extra_info |= {"static_tokens_per_s": static, "cached_tokens_per_s": cached}
    assert cached >= GAINS[resident] * static
    for row in found.values():
        assert row.predicted_over_measured is not None
        assert abs(row.predicted_over_measured - 1) < WITHIN, row.name


def test_a_cache_that_is_of_no_use(benchmark: BenchmarkFixture, upstream_tools: Path, nothing_kept: None) -> None:
    """Routes that have nothing to do with each other are hardly slower than with a static placement."""
    routes = uniform()
    with in_memory("routed gpt-oss", gpt_oss(**SHAPE), Console(stderr=True), routes) as path:
        arguments = (upstream_tools, path, 0.31, routes)
        found: dict[Experts, Row] = benchmark.pedantic(compare, arguments, rounds=1)  # type: ignore[no-untyped-call]
    print_rows([*found.values()], f"31 % resident, {len(routes)} tokens", Console(width=120, highlight=False))
    static, cached = (max(found[name].tokens_per_s) for name in ("static", "cached"))
    benchmark.extra_info |= {"static_tokens_per_s": static, "cached_tokens_per_s": cached}
    assert cached >= UNIFORM_LOSS * static
