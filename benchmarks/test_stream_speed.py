"""Measure ``for tok in model.stream()`` next to llama-bench's loop over the same libraries.

llama-bench decodes tokens without sampling or text. Both sides run one after the other, in turn,
with the same threads and context depth; their best rates are compared, since noise only slows down.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from overspill import Model
from upstream_tools import decode_rate

N_THREADS = 2


def stream_rate(path: Path, n: int) -> float:
    """Return tokens per second of the loop, by the clock outside of it."""
    # Loaded anew, since where the kernel puts the threads makes a factor of two on a tiny model,
    # and llama-bench has new ones each time.
    with (
        Model(path, n_ctx=2048, n_threads=N_THREADS) as model,
        model.stream("Once upon a time", temperature=0, max_tokens=n + 1) as stream,
    ):
        next(stream)
        start = time.perf_counter()
        n_tokens = sum(1 for _ in stream)
        rate = n_tokens / (time.perf_counter() - start)
    assert n_tokens == n, f"the model ended early, after {n_tokens} tokens"
    return rate


@pytest.mark.parametrize(
    ("name", "n", "rounds", "least"),
    [("tiny_gpt_oss", 1024, 20, 0.85), ("gemma", 128, 5, 0.97)],
    ids=["tiny gpt-oss", "Gemma 3 270M"],
)
def test_greedy_stream_against_llama_bench(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    upstream_tools: Path,
    name: str,
    n: int,
    rounds: int,
    least: float,
) -> None:
    """The whole stack keeps at least this share of upstream's decode speed."""
    path: Path = request.getfixturevalue(f"{name}_path")
    ours: list[float] = []
    theirs: list[float] = []

    def both() -> None:
        ours.append(stream_rate(path, n))
        theirs.append(decode_rate(upstream_tools, path, n, N_THREADS))

    benchmark.pedantic(both, rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
    ratio = max(ours) / max(theirs)
    benchmark.extra_info.update(
        {"stream_tokens_per_s": max(ours), "llama_bench_tokens_per_s": max(theirs), "ratio": ratio}
    )
    print(f"\n{name}: stream {max(ours):.1f} tok/s, llama-bench {max(theirs):.1f} tok/s, ratio {ratio:.3f}")
    assert ratio >= least
