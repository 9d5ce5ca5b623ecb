"""Measure streams that are open together: threads that share a batch, and a long prompt among them."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from expert_routes import SHAPE, in_memory, placements_beside_stand_in, stream_together_beside_stand_in
from header_files import gpt_oss
from overspill import Model
from quantities.measuring import in_own_process
from quantities.stream import ends_of
from reporting import show
from routed_models import markov_routes

N_TOKENS = 96
ROUNDS = 3


@pytest.mark.parametrize("n", [4, 16, 64])
def test_threads_share_a_batch(benchmark: BenchmarkFixture, smollm2_path: Path, n: int) -> None:
    """Beside one thread that decodes all of them in one batch (0.9 of it), and streams in turn (1.5 times that)."""
    with Model(smollm2_path, n_ctx=256, n_parallel=n, offload="cpu") as model:
        prompts = [f"The number {i} is" for i in range(n)]
        bias = dict.fromkeys(ends_of(model), -100.0)

        def reply(prompt: str) -> None:
            assert len(model.generate(prompt, max_tokens=N_TOKENS, temperature=0, logit_bias=bias).tokens) == N_TOKENS

        def threads() -> int:
            with ThreadPoolExecutor(n) as pool:
                list(pool.map(reply, prompts))
            return n

        def batch() -> int:
            replies = model.generate_many(prompts, parallel=n, max_tokens=N_TOKENS, temperature=0, logit_bias=bias)
            return len(list(replies))

        def turns() -> int:
            for prompt in prompts[:4]:
                reply(prompt)
            return 4

        ways = {"threads": threads, "one batch": batch, "in turn": turns}
        speeds: dict[str, list[float]] = {name: [] for name in ways}

        def measure() -> None:
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    began = time.perf_counter()
                    speeds[name].append(way() * N_TOKENS / (time.perf_counter() - began))

        benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]
    best = {name: statistics.median(values) for name, values in speeds.items()}
    of_batch, of_turns = best["threads"] / best["one batch"], best["threads"] / best["in turn"]
    benchmark.extra_info.update(tokens_per_s=speeds, of_batch=of_batch, of_turns=of_turns)
    show(
        ["streams", *(f"{name}, tok/s" for name in ways), "of one batch", "of turns"],
        [str(n), *(f"{speed:.0f}" for speed in best.values()), f"{of_batch:.2f}", f"{of_turns:.2f}"],
    )
    assert of_batch >= 0.9
    assert of_turns >= 1.5


@pytest.mark.parametrize("max_pause_s", [0.5, 0.1])
def test_a_long_prompt_holds_nobody_up(
    benchmark: BenchmarkFixture, tiny_gpt_oss_path: Path, max_pause_s: float
) -> None:
    """Four streams decode while a prompt of 30,000 tokens is read; no token waits longer than the limit."""
    n_prompt = 30000
    gaps: list[list[float]] = [[] for _ in range(4)]
    with Model(tiny_gpt_oss_path, n_ctx=32768, n_parallel=5, max_pause_s=max_pause_s, offload="cpu") as model:
        over = threading.Event()

        def pull(number: int) -> None:
            with model.stream([10 + number, 20, 30], temperature=0) as stream:
                last = time.perf_counter()
                for _ in stream:
                    now = time.perf_counter()
                    gaps[number].append(now - last)
                    last = now
                    if over.is_set():
                        break

        threads = [threading.Thread(target=pull, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        before = [len(of_one) for of_one in gaps]

        def read() -> None:
            next(model.stream([5 + 7 * i % 2000 for i in range(n_prompt)]))

        began = time.perf_counter()
        benchmark.pedantic(read, rounds=1)  # type: ignore[no-untyped-call]
        seconds = time.perf_counter() - began
        after = [len(of_one) for of_one in gaps]
        over.set()
        for thread in threads:
            thread.join()
    alone = statistics.median(gap for of_one, n in zip(gaps, before, strict=True) for gap in of_one[1:n])
    meanwhile = [gap for of_one, first, last in zip(gaps, before, after, strict=True) for gap in of_one[first:last]]
    show(
        ["limit, ms", "a token before, ms", "meanwhile, median", "the longest", "prompt, tok/s"],
        [
            *(f"{1e3 * value:.1f}" for value in (max_pause_s, alone, statistics.median(meanwhile), max(meanwhile))),
            f"{n_prompt / seconds:.0f}",
        ],
    )
    assert max(meanwhile) <= max_pause_s + alone


def show_places(speeds: dict[int, float], n: int) -> float:
    """Print the tokens per second with each number of places, and return those of all over the best of fewer."""
    of_best = speeds[n] / max(speed for places, speed in speeds.items() if places < n)
    names = ("one at a time" if places == 1 else f"{places} places" for places in speeds)
    show(
        ["streams", *(f"{name}, tok/s" for name in names), "all places over fewer"],
        [str(n), *(f"{speed:.1f}" for speed in speeds.values()), f"{of_best:.2f}"],
    )
    return of_best


def test_a_mixture_in_ram(benchmark: BenchmarkFixture, gpt_oss_20b_of_6_layers: Path) -> None:
    """Eight threads on the CPU, with fewer places than streams, and with a place for each."""
    n, n_tokens = 8, 48
    prompts = [[1000 + 97 * number + 13 * i for i in range(8)] for number in range(n)]
    speeds: dict[int, list[float]] = {1: [], 2: [], 4: [], n: []}

    def measure() -> None:
        for _ in range(ROUNDS):
            for places, found in speeds.items():
                with (
                    Model(gpt_oss_20b_of_6_layers, n_ctx=256, n_parallel=places, offload="cpu") as model,
                    ThreadPoolExecutor(n) as pool,
                ):
                    how: dict[str, Any] = {"max_tokens": n_tokens, "temperature": 1.0, "seed": 1}
                    how["logit_bias"] = dict.fromkeys(ends_of(model), -100.0)
                    model.generate(prompts[0], **how)  # the pages are mapped, and the threads have been counted
                    began = time.perf_counter()
                    done = list(pool.map(lambda prompt: model.generate(prompt, **how), prompts))  # noqa: B023
                    assert all(len(reply.tokens) == n_tokens for reply in done)
                    found.append(n * n_tokens / (time.perf_counter() - began))

    benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info["tokens_per_s"] = speeds
    assert show_places({places: statistics.median(found) for places, found in speeds.items()}, n) >= 0.95


def test_an_expert_cache_that_answers_one_stream(
    benchmark: BenchmarkFixture, upstream_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four threads beside a stand-in GPU, as in ``test_expert_speed``: the cache is of no use to a batch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    n, n_tokens, n_passes = 4, 48, 7
    routes = markov_routes(256, SHAPE["n_layers"], SHAPE["n_experts"], 4)
    speeds: dict[str, list[float]] = {}
    with in_memory("routed gpt-oss", gpt_oss(**SHAPE), Console(stderr=True), routes) as path:
        placed = in_own_process(placements_beside_stand_in, upstream_tools, path, 0.31, 256)

        def measure() -> None:
            for one in placed:
                for n_parallel in (1, n):
                    name = f"{one.experts}, {n_parallel}"
                    how: dict[str, Any] = {"n": n, "n_parallel": n_parallel, "n_tokens": n_tokens, "n_passes": n_passes}
                    speeds[name] = in_own_process(
                        stream_together_beside_stand_in, upstream_tools, path, one.planned, routes, **how
                    )

        benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info["tokens_per_s"] = speeds
    # The first passes measure, and the cache fills.
    found = {name: statistics.median(of_one[2:]) for name, of_one in speeds.items()}
    of_best = found[f"cached, {n}"] / max(found.values())
    show(
        ["tok/s, streams", *(f"{name} in a batch" for name in found), "the last over the best"],
        [str(n), *(f"{speed:.1f}" for speed in found.values()), f"{of_best:.2f}"],
    )
    assert of_best >= 0.9
