"""Measure ``for tok in model.stream()`` next to others' loops.

A minimal loop in C++, llama-bench's and llama-cpp-python's run over the same libraries; xllamacpp brings a build of its
own. All take turns, with the same threads and context depth.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from overspill import Model
from quantities import logits, rivals, stream
from quantities.measuring import Change, Quantity, Timed, measure
from reporting import format_seconds, measured, show


def outside_s(rounds: Sequence[Timed]) -> list[float]:
    """Return the seconds of a token outside of llama.cpp, the caller's included, in each round."""
    return [float(np.mean(timed.seconds)) - timed.in_llama_s for timed in rounds]


@pytest.mark.parametrize(
    ("name", "n", "loads", "most"),
    [("tiny_gpt_oss", 256, 8, 15e-6), ("gemma", 24, 10, 0.01)],
    ids=["tiny gpt-oss", "Gemma 3 270M"],
)
def test_greedy_stream_against_minimal_loop(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    upstream_tools: Path,
    name: str,
    n: int,
    loads: int,
    most: float,
) -> None:
    """The whole of the stream costs at most 15 us a token, on a tiny model, or a percent, on a small one."""
    path: Path = request.getfixturevalue(f"{name}_path")
    found = measured(benchmark, partial(stream.token, path, upstream_tools, n_tokens=n), rounds=3, loads=loads)
    # A pair of medians for each load, since the place of its memory makes two percent, for either side.
    pairs = found.medians_by_load
    costs = [pair.ours - pair.rival for pair in pairs]
    loop_s, low_s, cost_s, high_s = statistics.median(pair.rival for pair in pairs), *statistics.quantiles(costs, n=4)
    counted_s = float(np.median(np.reshape(outside_s(found.ours), (loads, -1)), axis=1).min())
    benchmark.extra_info.update(cost_s=cost_s, minimal_loop_s=loop_s, counted_s=counted_s, share=cost_s / loop_s)
    show(
        ["a token", "a minimal loop", "the stream", "quartiles", "", "outside of llama.cpp"],
        [name, format_seconds(loop_s), *(f"{s * 1e6:+.1f} µs" for s in (cost_s, low_s, high_s, counted_s))],
    )
    limit_s = most if most < 1e-3 else most * loop_s
    # What the stream does beside llama_decode is known to a microsecond; the difference of both sides' times is not, so
    # that only one that is more than chance counts.
    assert counted_s <= limit_s
    assert Change.of([pair.ratio for pair in pairs]).low <= 1 + limit_s / loop_s


def check_share(benchmark: BenchmarkFixture, quantity: Quantity, rival: str, *, rounds: int, least: float) -> None:
    """Our tokens per second are at least this share of a rival's."""
    found = measured(benchmark, quantity, rounds=rounds).best
    share = 1 / found.ratio
    benchmark.extra_info["ratio"] = share
    show(["tokens/s", "ours", "theirs", "ratio"], [rival, *(f"{1 / seconds:.1f}" for seconds in found), f"{share:.3f}"])
    assert share >= least


@pytest.mark.parametrize(
    ("name", "n", "rounds", "least"),
    [("tiny_gpt_oss", 1024, 10, 0.85), ("gemma", 128, 4, 0.93)],
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
    """The whole stack keeps at least this share of upstream's decode speed.

    On Gemma the same minimal loop in C++ comes to 0.97 in a Python process, of what it does in one without.
    """
    path: Path = request.getfixturevalue(f"{name}_path")
    rival = partial(rivals.llama_bench, upstream_tools, path, n)
    quantity = partial(stream.token_in_own_process, path, rival, n_tokens=n)
    check_share(benchmark, quantity, "llama-bench", rounds=rounds, least=least)


def test_greedy_stream_against_xllamacpp(benchmark: BenchmarkFixture, gemma_path: Path) -> None:
    """The wheel brings a llama.cpp of its own, another version built for any CPU, so more than a loop differs."""
    try:
        python = rivals.python_with_xllamacpp()
    except rivals.NotInstallableError as error:
        pytest.skip(f"no wheel of xllamacpp for this machine: {error}")
    texts: set[str] = set()
    prompt = "Once upon a time"
    rival = partial(rivals.xllamacpp, python, gemma_path, prompt, 128)
    keep = lambda ours, theirs: texts.add(theirs)  # noqa: E731
    quantity = partial(stream.token_in_own_process, gemma_path, rival, n_tokens=128, check=keep)
    check_share(benchmark, quantity, "xllamacpp", rounds=3, least=0.9)
    # It rounds otherwise.
    with Model(gemma_path, n_ctx=512, n_threads=2) as model:
        for text in texts:
            stream.assert_likely(model, prompt, model.tokenize(text, add_special=False)[:24])


@pytest.mark.parametrize(
    ("sampling", "least"),
    [
        ({"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.0}, 1.25),
        ({"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.05}, 1.05),
    ],
    ids=["top-p alone", "top-k 40"],
)
def test_sampled_stream_against_llama_cpp_python(
    benchmark: BenchmarkFixture, gemma_path: Path, sampling: dict[str, float], least: float
) -> None:
    """The same libraries, model and options: what is between them is loop and sampler."""
    python = rivals.python_with_llama_cpp_python()
    rival = partial(rivals.llama_cpp_python, python, gemma_path, 128, sampling)
    quantity = partial(stream.token_in_own_process, gemma_path, rival, n_tokens=128, sampling=sampling)
    check_share(benchmark, quantity, "llama-cpp-python", rounds=3, least=least)


def test_python_sampler_against_greedy(benchmark: BenchmarkFixture, gemma_path: Path) -> None:
    """An argmax in Python costs little more than its own time."""
    most_s = 60e-6
    found = measured(benchmark, partial(stream.python_sampler, gemma_path, n_tokens=96), rounds=12, warm_up=False)
    # Seconds by round and step.
    ours, greedy = (np.array([timed.seconds for timed in side]) for side in (found.ours, found.rival))
    costs_s, greedies_s = np.median(ours - greedy, axis=1), np.median(greedy, axis=1)
    cost_s, greedy_s = float(np.median(costs_s)), float(np.median(greedies_s))
    counted_s = float(np.median(np.subtract(outside_s(found.ours), outside_s(found.rival))))
    benchmark.extra_info.update(greedy_s=greedy_s, cost_s=cost_s, counted_s=counted_s)
    show(
        ["a token", "greedy", "argmax in Python", "of it outside of llama.cpp"],
        [gemma_path.stem, format_seconds(greedy_s), *(f"{s * 1e6:+.0f} µs" for s in (cost_s, counted_s))],
    )
    # As with the minimal loop: what is counted is known, and the difference only as far as it is more than chance.
    assert counted_s <= most_s
    assert Change.of(list(1 + costs_s / greedies_s)).low <= 1 + most_s / greedy_s


@pytest.mark.parametrize(
    ("name", "n", "rounds"),
    [("tiny_gpt_oss_path", 256, 24), ("gpt_oss_20b_of_6_layers", 32, 12)],
    ids=["tiny gpt-oss", "six layers of gpt-oss-20b"],
)
def test_recording_of_experts(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, name: str, n: int, rounds: int
) -> None:
    """A trace of the experts costs at most a hundredth of a token."""
    quantity = partial(stream.traced_experts, request.getfixturevalue(name), n_tokens=n)
    found = measured(benchmark, quantity, rounds=rounds)
    traced, plain = (np.array([timed.seconds for timed in side]) for side in (found.ours, found.rival))
    change = Change.of(list(np.median(traced, axis=1) / np.median(plain, axis=1)))
    token_s = float(np.median(plain))
    benchmark.extra_info.update(ratio=change.ratio, token_s=token_s)
    show(
        ["a token", "", "with its experts recorded", "99 % interval"],
        [name, format_seconds(token_s), f"{change.ratio - 1:+.2%}", f"{change.low - 1:+.2%} to {change.high - 1:+.2%}"],
    )
    assert change.low <= 1.01


def test_code_between_tokens_costs_nothing(benchmark: BenchmarkFixture, gemma_path: Path) -> None:
    """Work of half a step's time is hidden by the next step; without looking ahead it adds up."""
    quantity = partial(stream.token_beside_a_busy_caller, gemma_path, n_tokens=96)
    ratio = measured(benchmark, quantity, rounds=3).best.ratio
    waiting = measure(partial(quantity, logits=True), rounds=3).best.ratio
    benchmark.extra_info.update(ratio=ratio, ratio_without_look_ahead=waiting)
    show(
        ["a pause of half a step", "of the time without", "if the stream waits"],
        [gemma_path.stem, f"{ratio:.2f}", f"{waiting:.2f}"],
    )
    assert ratio <= 1.1


@pytest.mark.parametrize("name", ["tiny_gpt_oss", "gemma"])
def test_view_of_logits(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, name: str) -> None:
    """A view costs the same at any vocabulary, and less than two microseconds."""
    path: Path = request.getfixturevalue(f"{name}_path")
    found = measured(benchmark, partial(logits.view, path), rounds=3).median
    show(["logits", "a view", "a copy"], [name, format_seconds(found.ours), format_seconds(found.rival)])
    assert found.ours <= 2e-6
