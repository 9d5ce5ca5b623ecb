"""Measure ``for tok in model.stream()`` next to others' loops.

A minimal loop in C++, llama-bench's and llama-cpp-python's run over the same libraries; xllamacpp brings a build of its
own. All take turns, with the same threads and context depth.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import timeit
import venv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import ratios
from compare import Change
from overspill import Model, Stream, _core
from rounding import NATS
from upstream_tools import decode_rate

N_THREADS = 2


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
    bench = ratios.Bench(path, path, path, upstream_tools)
    costs: list[float] = []
    theirs: list[float] = []
    counted: list[float] = []

    def both() -> None:
        # A pair of medians for each load, since where memory lies makes two percent, for either side.
        stream_s, loop_s = ratios.step_times(bench, path, n=n, rounds=3, loads=1)
        costs.append(stream_s - loop_s)
        theirs.append(loop_s)
        with Model(path, n_ctx=1024, n_threads=N_THREADS) as model:
            with model.stream("Once upon a time", temperature=0, max_tokens=n) as stream:
                next(stream)
                start = time.perf_counter()
                n_tokens = sum(1 for _ in stream)
                seconds = time.perf_counter() - start
            spent = stream.stats.breakdown
            counted.append((seconds - spent.decode_s - spent.sync_s) / n_tokens)

    benchmark.pedantic(both, rounds=loads)  # type: ignore[no-untyped-call]
    loop_s, low_s, cost_s, high_s = statistics.median(theirs), *statistics.quantiles(costs, n=4)
    benchmark.extra_info.update(
        cost_us=cost_s * 1e6, minimal_loop_us=loop_s * 1e6, counted_us=min(counted) * 1e6, share=cost_s / loop_s
    )
    print(
        f"\n{name}: a minimal loop takes {loop_s * 1e6:.1f} us a token, the stream {cost_s * 1e6:+.1f} us "
        f"(quartiles {low_s * 1e6:+.1f} and {high_s * 1e6:+.1f}), {min(counted) * 1e6:.1f} us outside of llama.cpp"
    )
    limit_s = most if most < 1e-3 else most * loop_s
    # What the stream does beside llama_decode is known to a microsecond; the difference of both sides' times is not, so
    # that only one that is more than chance counts.
    assert min(counted) <= limit_s
    assert Change.of(list(1 + np.divide(costs, theirs))).low <= 1 + limit_s / loop_s


OURS = """
import sys, time
from overspill import Model

path, n, n_threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Model(path, n_ctx=2048, n_threads=n_threads) as model:
    with model.stream("Once upon a time", temperature=0, max_tokens=n + 1) as stream:
        next(stream)
        start = time.perf_counter()
        n_tokens = sum(1 for _ in stream)
        print(n_tokens / (time.perf_counter() - start))
assert n_tokens == n, f"the model ended early, after {n_tokens} tokens"
"""


def stream_rate(path: Path, n: int) -> float:
    """Return tokens per second of the loop, by the clock outside of it."""
    # In a process of its own, as llama-bench: where the kernel puts threads and memory makes a factor of two on a tiny
    # model, and some percent on others.
    command = [sys.executable, "-c", OURS, str(path), str(n), str(N_THREADS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


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
    """The whole stack keeps at least this share of upstream's decode speed, each in a process of its own.

    On Gemma the same minimal loop in C++ comes to 0.97 in a Python process, of what it does in one without.
    """
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


RIVAL = """
import json, sys, time
from llama_cpp import Llama

n_threads = int(sys.argv[3])
model = Llama(sys.argv[1], n_ctx=512, n_threads=n_threads, n_threads_batch=n_threads, seed=1, verbose=False)
prompt = model.tokenize(b"Once upon a time")
n = int(sys.argv[2])
stream = model.generate(prompt, repeat_penalty=1.0, reset=True, **json.loads(sys.argv[4]))
next(stream)
start = time.perf_counter()
for _ in range(n):
    next(stream)
print(n / (time.perf_counter() - start))
"""


@pytest.fixture(scope="module")
def rival_python() -> Path:
    """Return a Python with llama-cpp-python of the same llama.cpp, without a build of its own."""
    environment = Path(__file__).parent.parent / "build" / "rival"
    python = environment / "bin" / "python"
    done = environment / "installed"
    if not done.is_file():
        venv.create(environment, with_pip=True, clear=True)
        pin = (Path(__file__).parent.parent / "vendor" / "llama.cpp.txt").read_text()
        version = re.search(r"llama-cpp-python==\S+", pin)
        assert version is not None
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python", version[0]]
        subprocess.run(command, check=True, env={**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"})
        done.touch()
    return python


XLLAMACPP = """
import json, sys
import xllamacpp

path, n, n_threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel = 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
server = xllamacpp.Server(params)
request = {"prompt": "Once upon a time", "n_predict": n + 1, "temperature": 0, "ignore_eos": True}
reply = server.handle_completions(request)
reply = reply if isinstance(reply, dict) else json.loads(reply)
print(json.dumps([reply["timings"]["predicted_per_second"], reply["choices"][0]["text"]]))
"""


def test_greedy_stream_against_xllamacpp(benchmark: BenchmarkFixture, gemma_path: Path) -> None:
    """The wheel brings a llama.cpp of its own, another version built for any CPU, so more than a loop differs."""
    environment = Path(__file__).parent.parent / "build" / "xllamacpp"
    python = environment / "bin" / "python"
    if not (environment / "installed").is_file():
        venv.create(environment, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "xllamacpp"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no wheel of xllamacpp for this machine: {done.stderr.strip()[-200:]}")
        (environment / "installed").touch()
    ours: list[float] = []
    theirs: list[float] = []
    texts: set[str] = set()

    def both() -> None:
        ours.append(stream_rate(gemma_path, 128))
        command = [str(python), "-c", XLLAMACPP, str(gemma_path), "128", str(N_THREADS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        rate, text = json.loads(done.stdout.splitlines()[-1])
        theirs.append(rate)
        texts.add(text)

    benchmark.pedantic(both, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]
    # It rounds otherwise, so each of its tokens has to be about as likely as the likeliest.
    with Model(gemma_path, n_ctx=512, n_threads=N_THREADS) as model:
        prompt = model.tokenize("Once upon a time")
        for text in texts:
            model.reset()
            logits = model.eval(prompt)
            for token in model.tokenize(text, add_special=False)[:24]:
                assert logits[token] > logits.max() - NATS, text
                logits = model.eval([token])
    ratio = max(ours) / max(theirs)
    benchmark.extra_info.update(ours_tok_s=max(ours), xllamacpp_tok_s=max(theirs), ratio=ratio)
    print(f"\nstream {max(ours):.1f} tok/s, xllamacpp's own build {max(theirs):.1f}: {ratio:.2f} times")
    assert ratio >= 0.9


def rival_rate(python: Path, path: Path, n: int, sampling: dict[str, float]) -> float:
    """Return llama-cpp-python's tokens per second, with the libraries that overspill uses."""
    libraries = Path(_core.__file__).parent / "lib"
    names = {"temperature": "temp"}
    options = json.dumps({names.get(name, name): value for name, value in sampling.items()})
    command = [str(python), "-c", RIVAL, str(path), str(n), str(N_THREADS), options]
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def sampled_rate(path: Path, n: int, options: dict[str, Any]) -> float:
    """Return tokens per second of our loop; a token that would end the text is banned."""
    with Model(path, n_ctx=512, n_threads=N_THREADS) as model:
        ends = {token: -math.inf for token in range(model.n_vocab) if model.is_end_of_generation(token)}
        banned: dict[str, Any] = {} if callable(options.get("sampler")) else {"logit_bias": ends}
        with model.stream("Once upon a time", max_tokens=n + 1, **options, **banned) as stream:
            next(stream)
            start = time.perf_counter()
            n_tokens = sum(1 for _ in stream)
            assert n_tokens == n
            return n_tokens / (time.perf_counter() - start)


@pytest.mark.parametrize(
    ("sampling", "least"),
    [
        ({"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.0}, 1.25),
        ({"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.05}, 1.05),
    ],
    ids=["top-p alone", "top-k 40"],
)
def test_sampled_stream_against_llama_cpp_python(
    benchmark: BenchmarkFixture, gemma_path: Path, rival_python: Path, sampling: dict[str, float], least: float
) -> None:
    """The same libraries, model and options: what is between them is loop and sampler."""
    ours: list[float] = []
    theirs: list[float] = []

    def both() -> None:
        ours.append(sampled_rate(gemma_path, 128, sampling))
        theirs.append(rival_rate(rival_python, gemma_path, 128, sampling))

    benchmark.pedantic(both, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]
    ratio = max(ours) / max(theirs)
    benchmark.extra_info.update(ours_tok_s=max(ours), llama_cpp_python_tok_s=max(theirs), ratio=ratio)
    print(f"\n{sampling}: {max(ours):.1f} tok/s, llama-cpp-python {max(theirs):.1f}: {ratio:.2f} times")
    assert ratio >= least


def test_python_sampler_against_greedy(benchmark: BenchmarkFixture, gemma_path: Path) -> None:
    """An argmax in Python costs little more than its own time."""
    most_us = 60.0
    n = 96
    greedy: dict[str, Any] = {"temperature": 0}
    in_python: dict[str, Any] = {"sampler": lambda logits, tokens: int(logits.argmax())}
    # Two streams step in turn, since the machine's speed drifts by more than what is looked for; each of them is
    # the first in half of the rounds, since it matters where a context lies.
    orders = itertools.cycle([(0, 1), (1, 0)])
    greedy_us: list[float] = []
    costs_us: list[float] = []
    counted_us: list[float] = []
    with Model(gemma_path, n_ctx=512, n_threads=N_THREADS) as model:

        def both() -> None:
            times_us: tuple[list[float], list[float]] = ([], [])
            ids: tuple[list[int], list[int]] = ([], [])
            order = next(orders)
            streams: dict[int, Stream] = {}
            with ExitStack() as opened:
                for side in order:
                    # Without looking ahead on either side, so that a step is all of its work.
                    options = {"max_tokens": n + 1, "logits": True, **(greedy, in_python)[side]}
                    streams[side] = opened.enter_context(model.stream("Once upon a time", **options))
                    next(streams[side])
                for _ in range(n):
                    for side in order:
                        start = time.perf_counter_ns()
                        token = next(streams[side])
                        times_us[side].append((time.perf_counter_ns() - start) / 1000)
                        ids[side].append(token.id)
            assert ids[0] == ids[1]
            greedy_us.append(statistics.median(times_us[0]))
            costs_us.append(statistics.median(np.subtract(times_us[1], times_us[0])))
            spent = [streams[side].stats.breakdown for side in (0, 1)]
            in_llama_us = [(parts.decode_s + parts.sync_s) / parts.tokens * 1e6 for parts in spent]
            outside_us = np.mean(times_us, axis=1) - in_llama_us
            counted_us.append(float(outside_us[1] - outside_us[0]))

        benchmark.pedantic(both, rounds=12)  # type: ignore[no-untyped-call]
    cost_us, count_us = statistics.median(costs_us), statistics.median(counted_us)
    benchmark.extra_info.update(greedy_us=statistics.median(greedy_us), cost_us=cost_us, counted_us=count_us)
    print(f"\nargmax in Python costs {cost_us:.0f} us a token more than greedy, {count_us:.0f} us outside of llama.cpp")
    # As with the minimal loop: what is counted is known, and the difference only as far as it is more than chance.
    assert count_us <= most_us
    change = Change.of(list(1 + np.divide(costs_us, greedy_us)))
    assert change.low <= 1 + most_us / statistics.median(greedy_us)


def test_code_between_tokens_costs_nothing(benchmark: BenchmarkFixture, gemma_path: Path) -> None:
    """Work of half a step's time is hidden by the next step; without looking ahead it adds up."""
    n = 96

    def seconds(model: Model, pause_s: float, **options: Any) -> float:
        with model.stream("Once upon a time", max_tokens=n + 1, temperature=0, **options) as stream:
            next(stream)
            start = time.perf_counter()
            for _ in stream:
                time.sleep(pause_s)
            return time.perf_counter() - start

    ratios: list[float] = []
    without: list[float] = []
    with Model(gemma_path, n_ctx=512, n_threads=N_THREADS) as model:

        def all_three() -> None:
            alone = seconds(model, 0.0)
            pause = 0.5 * alone / n
            ratios.append(seconds(model, pause) / alone)
            without.append(seconds(model, pause, logits=True) / alone)

        benchmark.pedantic(all_three, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]
    print(f"\nwith a pause of half a step: {min(ratios):.2f} of the time without, {min(without):.2f} if it waits")
    benchmark.extra_info.update(ratio=min(ratios), ratio_without_look_ahead=min(without))
    assert min(ratios) <= 1.1


def test_view_of_logits(benchmark: BenchmarkFixture, tiny_gpt_oss_path: Path, gemma_path: Path) -> None:
    """A view costs the same at any vocabulary, and less than two microseconds."""
    most_us = 2.0
    for path in (tiny_gpt_oss_path, gemma_path):
        with Model(path, n_ctx=64, n_batch=64) as model, model.stream([1, 2, 3], logits=True, temperature=0) as stream:
            token = next(stream)
            times = []
            for _ in range(2000):
                start = time.perf_counter_ns()
                token.logits  # noqa: B018
                times.append((time.perf_counter_ns() - start) / 1000)
            copy = min(timeit.repeat(token.logits.copy, number=10, repeat=50)) / 10 * 1e6
            print(f"\nview of {model.n_vocab:,} logits: {statistics.median(times):.2f} us, a copy {copy:.1f} us")
            assert statistics.median(times) <= most_us
            if path == gemma_path:
                benchmark(getattr, token, "logits")
