"""Ratios that a change must not make worse. Both sides take turns in one run: what slows the machine, slows both.

``limits.toml`` has the limits. A ratio that is over its limit is measured twice more, and the best counts: noise
passes, a slow-down stays.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from overspill import Hardware, Model, ModelInfo, Sampler, SamplingOptions, plan
from upstream_tools import MinimalLoop, UpstreamChain, stand_in_gpu, upstream_fit

LIMITS: dict[str, dict[str, float]] = tomllib.loads((Path(__file__).parent / "limits.toml").read_text())
N_THREADS = 2
PROMPT = "Once upon a time there was a little girl who"
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
N_VOCAB = 201_088  # gpt-oss's


@dataclass(frozen=True)
class Bench:
    """What ratios are measured with."""

    tiny: Path
    gemma: Path
    header: Path
    """gpt-oss-120b without weights."""
    tools: Path
    slow_down: Mapping[str, Any] = field(default_factory=dict)
    """Options of :meth:`Model.stream` that make it slower: the guard's own test."""


def _greedy_steps(model: Model, tokens: Sequence[int], expected: Sequence[int], **options: Any) -> NDArray[np.float64]:
    """Return the seconds of each token of a greedy stream: the first, and those after it."""
    seconds = []
    ids = []
    with model.stream(tokens, temperature=0, max_tokens=len(expected), **options) as stream:
        before = time.perf_counter()
        for token in stream:
            after = time.perf_counter()
            seconds.append(after - before)
            ids.append(token.id)
            before = time.perf_counter()
    assert ids == list(expected), "the stream and the minimal loop disagree"
    return np.array(seconds)


def step_times(
    bench: Bench, path: Path, *, n: int, rounds: int, loads: int, placed: Mapping[str, Any] | None = None, **ours: Any
) -> tuple[float, float]:
    """Return the median seconds of a token after the first, ours and a minimal loop's."""
    stream_s, loop_s = [], []
    for _ in range(loads):  # where memory lies makes a difference
        options: dict[str, Any] = {"n_ctx": 1024, "n_threads": N_THREADS if placed is None else 1}
        loop = MinimalLoop(bench.tools, path, **options, **(placed or {}))
        with Model(path, **options, **ours) as model:
            prompt = model.tokenize(PROMPT)
            expected = loop.greedy(prompt, n)
            for i in range(rounds + 1):
                pair = (_greedy_steps(model, prompt, expected, **bench.slow_down), loop.seconds(prompt, expected))
                if i > 0:
                    stream_s.append(pair[0][1:])
                    loop_s.append(pair[1][1:])
        loop.close()
    # Of each token the median over the rounds: their depths differ, and so do their times.
    return float(np.median(np.median(stream_s, axis=0))), float(np.median(np.median(loop_s, axis=0)))


def _ratio(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1]


def _tiny(bench: Bench) -> float:
    return _ratio(step_times(bench, bench.tiny, n=256, rounds=4, loads=3))


def _gemma(bench: Bench) -> float:
    return _ratio(step_times(bench, bench.gemma, n=48, rounds=3, loads=2))


def _hybrid(bench: Bench) -> float:
    """Put the tiny model's experts on the CPU, and the rest on a stand-in for a GPU, which computes on the CPU too."""
    # In a process of its own, since a device cannot be taken away again.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        return processes.submit(_hybrid_here, bench).result()


def _hybrid_here(bench: Bench) -> float:
    stand_in_gpu(bench.tools, "GPU0", 1 << 30)
    placed = {"n_gpu_layers": 99, "overrides": [(r"ffn_(gate|up|down)_exps", "CPU")]}
    return _ratio(
        step_times(
            bench, bench.tiny, n=128, rounds=4, loads=2, placed=placed, offload={"default": "GPU0", "experts": "cpu"}
        )
    )


def _after_decoding(bench: Bench) -> float:
    """From logits to text, by the stream's counters, in greedy draws from logits that a decode has just made.

    Such a draw waits for memory, as the stream's does; one of logits that are in the cache takes half as long.
    """
    greedy = Sampler(temperature=0)
    spent, draws = [], []
    with Model(bench.gemma, n_ctx=512, n_threads=N_THREADS) as model:
        for _ in range(8):
            with model.stream(PROMPT, temperature=0, max_tokens=25, **bench.slow_down) as stream:
                ids = [token.id for token in stream]
            parts = stream.stats.breakdown
            spent.append((parts.logits_s + parts.sample_s + parts.python_s + parts.text_s) / parts.tokens)
            model.reset()
            for token in ids[:12]:
                logits = model.eval([token])
                start = time.perf_counter()
                greedy.sample(logits)
                draws.append(time.perf_counter() - start)
    # What else runs makes some of them longer, and none shorter.
    return min(spent) / float(np.quantile(draws, 0.25))


def _first_token(bench: Bench) -> float:
    ours, theirs = [], []
    loop = MinimalLoop(bench.tools, bench.gemma, n_ctx=1024, n_threads=N_THREADS)
    with Model(bench.gemma, n_ctx=1024, n_threads=N_THREADS) as model:
        prompt = (model.tokenize(PROMPT) * 30)[:256]
        expected = loop.greedy(prompt, 1)
        for i in range(7):
            pair = (_greedy_steps(model, prompt, expected)[0], loop.seconds(prompt, expected)[0])
            if i > 0:
                ours.append(pair[0])
                theirs.append(pair[1])
    loop.close()
    return float(min(ours) / min(theirs))


def _second_turn(bench: Bench) -> float:
    first: list[float] = []
    second: list[float] = []
    with Model(bench.gemma, n_ctx=1024, n_threads=N_THREADS) as model:
        prompt = (model.tokenize(PROMPT) * 40)[:400]
        for _ in range(4):
            for times, tokens, reuse in ((first, prompt, False), (second, [*prompt, *prompt[:8]], True)):
                with model.stream(tokens, temperature=0, max_tokens=1, reuse=reuse) as stream:
                    next(stream)
                first_s = stream.stats.time_to_first_token_s
                assert first_s is not None
                times.append(first_s)
            assert stream.stats.cached_tokens >= 399, stream.stats
    return min(second) / min(first)


def _batch(bench: Bench) -> float:
    words = ("sea", "dog", "love", "music", "rain", "Paris", "book", "light")
    prompts = [f"{start} {word}" for word in words for start in ("The", "A")]
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 32, "logit_bias": {1: -100.0, 106: -100.0}}
    alone, together = [], []
    with Model(bench.gemma, n_ctx=256, n_threads=N_THREADS) as model:
        for _ in range(3):
            start = time.perf_counter()
            n = sum(len(model.generate(prompt, **options).tokens) for prompt in prompts[:4])
            alone.append((time.perf_counter() - start) / n)
            start = time.perf_counter()
            n = sum(len(reply.tokens) for _, reply in model.generate_many(prompts, **options))
            together.append((time.perf_counter() - start) / n)
    return min(together) / min(alone)


def _view(bench: Bench) -> float:
    with Model(bench.gemma, n_ctx=64, n_batch=64) as model, model.stream([2, 3], logits=True, temperature=0) as stream:
        token = next(stream)
        copy = token.logits.copy()
        return time_s(lambda: token.logits, 2000) / time_s(lambda: np.copyto(copy, token.logits), 200)


def time_s(work: Callable[[], object], n: int) -> float:
    """Return the median seconds of a call."""
    times = []
    for _ in range(n):
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e9


def _sampler(rival: str, **options: Any) -> Callable[[Bench], float]:
    def measure(bench: Bench) -> float:
        logits = np.random.default_rng(1).normal(0, 3, N_VOCAB).astype(np.float32)
        chosen = SamplingOptions(**{**PLAIN, **options}, seed=1)
        sampler = Sampler(chosen)
        upstream = UpstreamChain(bench.tools, chosen, N_VOCAB)
        ours, theirs = [], []
        for _ in range(5):
            ours.append(time_s(lambda: sampler.sample(logits), 30))
            theirs.append(time_s(logits.max, 30) if rival == "scan" else upstream.time_us(logits, 3) / 1e6)
        return statistics.median(ours) / statistics.median(theirs)

    return measure


def _loading(bench: Bench) -> float:
    ours, theirs = [], []
    for i in range(5):
        start = time.perf_counter()
        with Model(bench.gemma, n_ctx=1024, n_threads=N_THREADS):
            middle = time.perf_counter()
        loop_start = time.perf_counter()
        loop = MinimalLoop(bench.tools, bench.gemma, n_ctx=1024, n_threads=N_THREADS)
        if i > 0:
            theirs.append(time.perf_counter() - loop_start)
            ours.append(middle - start)
        loop.close()
    return min(ours) / min(theirs)


def _plan(bench: Bench) -> float:
    gib = 1 << 30
    hardware = Hardware.given(ram=128 * gib, vram=24 * gib)
    start = time.perf_counter()
    plan(ModelInfo.from_file(bench.header), hardware=hardware, n_ctx=8192)
    seconds = time.perf_counter() - start
    return seconds / upstream_fit(bench.tools, bench.header, {"GPU0": 24 * gib}).seconds


_CHAIN = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}
RATIOS: dict[str, Callable[[Bench], float]] = {
    "stream / minimal loop, tiny gpt-oss": _tiny,
    "stream / minimal loop, Gemma": _gemma,
    "logits to text / a greedy draw, Gemma": _after_decoding,
    "first token / minimal loop, Gemma": _first_token,
    "second turn / first, Gemma": _second_turn,
    "16 prompts together / one by one, Gemma": _batch,
    "view / copy of logits, Gemma": _view,
    "greedy / one scan": _sampler("scan", temperature=0.0),
    "top-k 40, top-p, min-p / one scan": _sampler("scan", **_CHAIN),
    "temperature / one scan": _sampler("scan"),
    "top-p 0.95 / one scan": _sampler("scan", top_p=0.95),
    "top-k 40, top-p, min-p / llama.cpp's": _sampler("llama.cpp", **_CHAIN),
    "temperature / llama.cpp's": _sampler("llama.cpp"),
    "top-p 0.95 / llama.cpp's": _sampler("llama.cpp", top_p=0.95),
    "loading / minimal loop, Gemma": _loading,
    "plan / llama.cpp's fit, gpt-oss-120b": _plan,
    "stream / minimal loop, experts on the CPU": _hybrid,
}
assert RATIOS.keys() == LIMITS.keys(), RATIOS.keys() ^ LIMITS.keys()


@dataclass
class Guarded:
    """A ratio that was measured."""

    name: str
    value: float
    attempts: list[float]

    @property
    def most(self) -> float:
        """Its limit."""
        return LIMITS[self.name]["most"]

    @property
    def is_over(self) -> bool:
        """Whether it is over its limit."""
        return self.value > self.most


def measure(bench: Bench, names: Sequence[str] | None = None, *, attempts: int = 3) -> Iterator[Guarded]:
    """Yield ratios as they are measured; one that is over its limit is measured again."""
    for name in names or RATIOS:
        values: list[float] = []
        while len(values) < attempts and (not values or min(values) > LIMITS[name]["most"]):
            values.append(RATIOS[name](bench))
        yield Guarded(name, min(values), values)


def as_table(found: Sequence[Guarded]) -> Table:
    """Return what was measured against what is allowed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ratio", no_wrap=True)
    for heading in ("measured", "usual", "at most", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        usual = LIMITS[one.name]["usual"]
        verdict = f"SLOWER by {one.value / usual - 1:.0%}, in {len(one.attempts)} attempts" if one.is_over else "ok"
        style = "bold red" if one.is_over else None
        table.add_row(one.name, f"{one.value:.4g}", f"{usual:.4g}", f"{one.most:.4g}", verdict, style=style)
    return table
