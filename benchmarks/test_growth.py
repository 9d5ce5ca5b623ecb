"""Measure how the time of a token grows: with the depth of the context, the vocabulary, the layers, and the sequences.

Each is fitted by a straight line, fixed cost and slope, which is printed; none may bend upwards.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from model_files import write_tiny_gpt_oss
from model_fixtures import written_once
from overspill import Model, ModelInfo

N_THREADS = 2
N_TOKENS = 64

Found = dict[int, tuple[float, float]]  # size, and microseconds of a token


def tiny_gpt_oss(*, n_layers: int = 4, n_vocab: int = 8192) -> Path:
    """Return the tiny gpt-oss with other numbers of layers or tokens."""
    write = partial(write_tiny_gpt_oss, n_layers=n_layers, n_vocab=n_vocab)
    return written_once(f"tiny-gpt-oss-{n_layers}-layers-{n_vocab}-tokens", write, "model_files.py")


def token_us(model: Model, prompt: Sequence[int], **options: Any) -> tuple[float, float]:
    """Return the median microseconds of a token, and what of it is not llama_decode."""
    times, outside = [], []
    for _ in range(3):
        ends = {model.n_vocab - 1: -100.0}
        with model.stream(prompt, temperature=0, max_tokens=N_TOKENS + 1, logit_bias=ends, **options) as stream:
            next(stream)
            before = time.perf_counter()
            for _ in stream:
                after = time.perf_counter()
                times.append(after - before)
                before = after
        spent = stream.stats.breakdown
        outside.append((stream.stats.decode_s - spent.decode_s - spent.sync_s) / spent.tokens)
    return statistics.median(times) * 1e6, min(outside) * 1e6


def check_growth(benchmark: BenchmarkFixture, unit: str, measure: Callable[[], Found]) -> None:
    """Print what was measured and the lines that fit it; the largest is at most half as much again as on its line."""
    found = benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]
    sizes = np.array(list(found), float)
    print(f"\n{unit:>12}  us a token  of it not llama_decode")
    for size, (whole, outside) in found.items():
        print(f"{size:>12,}  {whole:10.1f}  {outside:10.2f}")
    for name, values in zip(("a token", "not llama_decode"), np.array(list(found.values())).T, strict=True):
        slope, fixed = np.polyfit(sizes, values, 1)
        exponent = np.polyfit(np.log(np.maximum(sizes, 1)), np.log(np.maximum(values, 1e-3)), 1)[0]
        print(f"{name}: {fixed:.1f} us + {slope * 1000:.2f} ns for each of {unit}; as a power, {unit}^{exponent:.2f}")
        benchmark.extra_info[name] = {"fixed_us": fixed, "slope_ns": slope * 1000, "exponent": exponent}
        line = np.polyval(np.polyfit(sizes[:-1], values[:-1], 1), sizes[-1])
        assert values[-1] <= 1.5 * max(line, values[:-1].max()) + 5, f"{name} grows more than in proportion to {unit}"
    benchmark.extra_info["measured"] = {str(size): values for size, values in found.items()}


def test_depth(benchmark: BenchmarkFixture, tiny_gpt_oss_path: Path) -> None:
    """Attention reads the context before, of which every other layer looks at 128 tokens only."""

    def measure() -> Found:
        found: Found = {}
        prompt = [int(token) for token in np.random.default_rng(1).integers(0, 8000, 32768)]
        with Model(tiny_gpt_oss_path, n_ctx=32768 + N_TOKENS + 2, n_threads=N_THREADS) as model:
            for depth in (1, 2048, 8192, 16384, 32768):
                found[depth] = token_us(model, prompt[:depth], reuse=True)
        return found

    check_growth(benchmark, "tokens", measure)


def of_each(files: Mapping[int, Path]) -> Found:
    """Return what a token takes in each of some models."""
    found: Found = {}
    for size, path in files.items():
        with Model(path, n_ctx=256, n_threads=N_THREADS) as model:
            found[size] = token_us(model, [1, 2, 3])
    return found


def test_vocabulary(benchmark: BenchmarkFixture) -> None:
    """The output matrix grows, and what the sampler looks through."""
    files = {n: tiny_gpt_oss(n_vocab=n) for n in (32_768, 65_536, 131_072, 262_144)}
    assert all(ModelInfo.from_file(path).n_vocab == n for n, path in files.items())
    check_growth(benchmark, "logits", lambda: of_each(files))


def test_layers(benchmark: BenchmarkFixture) -> None:
    """Each layer costs what it reads and about thirty operations; the loop around them costs the same."""
    files = {n: tiny_gpt_oss(n_layers=n) for n in (4, 12, 24, 36)}
    check_growth(benchmark, "layers", lambda: of_each(files))


def test_sequences(benchmark: BenchmarkFixture, smollm2_path: Path) -> None:
    """A step of many sequences reads the weights once, and computes for each."""

    def measure() -> Found:
        found: Found = {}
        with Model(smollm2_path, n_ctx=256, n_threads=N_THREADS) as model:
            ends = {token: -100.0 for token in range(model.n_vocab) if model.is_end_of_generation(token)}
            for n in (1, 4, 8, 16, 32):
                prompts = [f"The number {i} is" for i in range(n)]
                options: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "logit_bias": ends}
                steps = []
                for _ in range(2):
                    replies = [reply for _, reply in model.generate_many(prompts, parallel=n, **options)]
                    assert all(len(reply.tokens) == 24 for reply in replies)
                    parts = [reply.stats.breakdown for reply in replies]
                    whole = [reply.stats.decode_s / reply.stats.breakdown.tokens for reply in replies]
                    decode = [(spent.decode_s + spent.sync_s) / spent.tokens for spent in parts]
                    steps.append((statistics.median(whole), statistics.median(np.subtract(whole, decode))))
                step_s, outside_s = min(steps)
                found[n] = step_s * 1e6, outside_s * 1e6
        return found

    check_growth(benchmark, "sequences", measure)
