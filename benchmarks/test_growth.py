"""Measure how the time of a token grows: with the depth of the context, the vocabulary, the layers, and the sequences.

Each is fitted by a straight line, fixed cost and slope, which is printed; none may bend upwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from model_files import write_tiny_gpt_oss
from model_fixtures import written_once
from overspill import ModelInfo
from quantities.batch import step_of_sequences
from quantities.measuring import Measured, Quantity, measure
from quantities.stream import token
from reporting import show


def tiny_gpt_oss(*, n_layers: int = 4, n_vocab: int = 8192) -> Path:
    """Return the tiny gpt-oss with other numbers of layers or tokens."""
    write = partial(write_tiny_gpt_oss, n_layers=n_layers, n_vocab=n_vocab)
    return written_once(f"tiny-gpt-oss-{n_layers}-layers-{n_vocab}-tokens", write, "model_files.py")


def token_after(path: Path, prompt: Sequence[int]) -> Quantity:
    """Return the quantity of a token of a greedy reply that does not end."""
    sampling = {"temperature": 0, "reuse": True, "logit_bias": {ModelInfo.from_file(path).n_vocab - 1: -100.0}}
    return partial(token, path, n_tokens=64, prompt=prompt, sampling=sampling)


def check_growth(benchmark: BenchmarkFixture, unit: str, quantities: Mapping[int, Quantity]) -> None:
    """Show what was measured and the lines that fit it; the largest is at most half as much again as on its line."""

    def measure_all() -> dict[int, Measured]:
        return {size: measure(quantity, rounds=3, warm_up=False) for size, quantity in quantities.items()}

    measured = benchmark.pedantic(measure_all, rounds=1)  # type: ignore[no-untyped-call]
    sizes = np.array(list(quantities), float)
    token_us = np.array([found.median.ours * 1e6 for found in measured.values()])
    outside_us = np.array([min(t.in_stream_s - t.in_llama_s for t in found.ours) * 1e6 for found in measured.values()])
    rows = zip(quantities, token_us, outside_us, strict=True)
    show([unit, "µs a token", "not llama_decode"], *([f"{n:,}", f"{a:.1f}", f"{b:.2f}"] for n, a, b in rows))
    lines = []
    for name, values in (("a token", token_us), ("not llama_decode", outside_us)):
        slope, fixed = np.polyfit(sizes, values, 1)
        exponent = np.polyfit(np.log(np.maximum(sizes, 1)), np.log(np.maximum(values, 1e-3)), 1)[0]
        lines.append([name, f"{fixed:.1f} µs", f"{slope * 1000:.2f} ns", f"{exponent:.2f}"])
        benchmark.extra_info[name] = {"fixed_us": fixed, "slope_ns": slope * 1000, "exponent": exponent}
    show(["line", "fixed", f"for each of {unit}", "as a power, its exponent"], *lines)
    benchmark.extra_info["measured"] = {
        str(size): pair for size, pair in zip(quantities, zip(token_us, outside_us, strict=True), strict=True)
    }
    for name, values in (("a token", token_us), ("not llama_decode", outside_us)):
        line = np.polyval(np.polyfit(sizes[:-1], values[:-1], 1), sizes[-1])
        assert values[-1] <= 1.5 * max(line, values[:-1].max()) + 5, f"{name} grows more than in proportion to {unit}"


def test_depth(benchmark: BenchmarkFixture, tiny_gpt_oss_path: Path) -> None:
    """Attention reads the context before, of which every other layer looks at 128 tokens only."""
    prompt = [int(token) for token in np.random.default_rng(1).integers(0, 8000, 32768)]
    depths = (1, 2048, 8192, 16384, 32768)
    quantities = {depth: token_after(tiny_gpt_oss_path, prompt[:depth]) for depth in depths}
    check_growth(benchmark, "tokens", quantities)


def test_vocabulary(benchmark: BenchmarkFixture) -> None:
    """The output matrix grows, and what the sampler looks through."""
    files = {n: tiny_gpt_oss(n_vocab=n) for n in (32_768, 65_536, 131_072, 262_144)}
    assert all(ModelInfo.from_file(path).n_vocab == n for n, path in files.items())
    check_growth(benchmark, "logits", {n: token_after(path, [1, 2, 3]) for n, path in files.items()})


def test_layers(benchmark: BenchmarkFixture) -> None:
    """Each layer costs what it reads and about thirty operations; the loop around them costs the same."""
    files = {n: tiny_gpt_oss(n_layers=n) for n in (4, 12, 24, 36)}
    check_growth(benchmark, "layers", {n: token_after(path, [1, 2, 3]) for n, path in files.items()})


def test_sequences(benchmark: BenchmarkFixture, smollm2_path: Path) -> None:
    """A step of many sequences reads the weights once, and computes for each."""
    quantities = {n: partial(step_of_sequences, smollm2_path, n) for n in (1, 4, 8, 16, 32)}
    check_growth(benchmark, "sequences", quantities)
