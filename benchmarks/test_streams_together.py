"""Measure streams that are open together: threads that share a batch, and a long prompt among them."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from overspill import Model
from quantities.stream import ends_of
from reporting import show

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
