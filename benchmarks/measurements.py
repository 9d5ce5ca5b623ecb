"""Take one measurement of the overspill that Python finds, and print it: ``measurements.py NAME GEMMA TINY_GPT_OSS``.

``compare.py`` runs this with the packages of two revisions, so it calls only what old ones have, too. The fastest of
some repetitions counts, since other programs only slow down.
"""

from __future__ import annotations

import json
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

N_THREADS = 2
PLAIN: dict[str, Any] = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}


@dataclass(frozen=True, slots=True)
class Models:
    """The files of the models."""

    gemma: str
    tiny_gpt_oss: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What a measurement gives: the seconds of a unit of work, and the tokens that came out."""

    seconds: float
    answer: list[int]


def decode(path: str, n: int, repetitions: int, n_threads: int, **options: Any) -> Measured:
    """Time a token of a stream, after the first."""
    from overspill import Model

    times = []
    with Model(path, n_ctx=2048, n_threads=n_threads) as model:
        for _ in range(repetitions):
            with model.stream("Once upon a time", max_tokens=n + 1, **options) as stream:
                ids = [next(stream).id]
                start = time.perf_counter()
                ids += [token.id for token in stream]
                times.append((time.perf_counter() - start) / (len(ids) - 1))
    return Measured(min(times), ids)


def first_token(path: str) -> Measured:
    """Time a stream of one token, from the call on."""
    from overspill import Model

    times = []
    with Model(path, n_ctx=512, n_threads=N_THREADS) as model:
        for _ in range(3):
            start = time.perf_counter()
            with model.stream(list(range(1000, 1256)), max_tokens=1, temperature=0) as stream:
                ids = [next(stream).id]
                times.append(time.perf_counter() - start)
    return Measured(min(times), ids)


def sample(**options: Any) -> Measured:
    """Time a draw from logits as many as gpt-oss has."""
    import numpy as np

    from overspill import Sampler

    logits = np.random.default_rng(1).normal(0, 3, 201_088).astype(np.float32)
    sampler = Sampler(**{**PLAIN, **options})
    times, ids = [], []
    for _ in range(200):
        start = time.perf_counter_ns()
        ids.append(sampler.sample(logits))
        times.append(time.perf_counter_ns() - start)
    return Measured(min(times) / 1e9, ids)


def view_logits(path: str) -> Measured:
    """Time the opening of a view."""
    from overspill import Model

    with (
        Model(path, n_ctx=64, n_threads=N_THREADS) as model,
        model.stream([1, 2, 3], max_tokens=2, logits=True, temperature=0) as stream,
    ):
        token = next(stream)
        times = timeit.repeat(lambda: token.logits, number=2000, repeat=15)
        return Measured(min(times) / 2000, [token.id])


def load(path: str) -> Measured:
    """Time the loading of a model whose file is in memory already."""
    from overspill import Model

    times = []
    for _ in range(3):
        start = time.perf_counter()
        with Model(path, n_ctx=512, n_threads=N_THREADS) as model:
            times.append(time.perf_counter() - start)
            ids = list(model.tokenize("Once upon a time"))
    return Measured(min(times), ids)


def import_package() -> Measured:
    """Time the import, with what it imports."""
    start = time.perf_counter()
    import overspill  # noqa: F401

    return Measured(time.perf_counter() - start, [])


# The loop's share of a token is large in the tiny model, and small in Gemma. The tiny model has one thread: of two, one
# that another program keeps from its core costs more than all that is to be seen.
MEASUREMENTS: dict[str, tuple[str, Callable[[Models], Measured]]] = {
    "tiny-greedy": ("tiny gpt-oss: a token, greedy", lambda m: decode(m.tiny_gpt_oss, 128, 12, 1, temperature=0)),
    "tiny-python": (
        "tiny gpt-oss: a token, argmax in Python",
        lambda m: decode(m.tiny_gpt_oss, 128, 12, 1, sampler=lambda logits, tokens: int(logits.argmax())),
    ),
    "gemma-greedy": ("Gemma: a token, greedy", lambda m: decode(m.gemma, 32, 4, N_THREADS, temperature=0)),
    "gemma-top-p": (
        "Gemma: a token, top-p 0.95",
        lambda m: decode(m.gemma, 32, 4, N_THREADS, **{**PLAIN, "top_p": 0.95}),
    ),
    "first-token": ("Gemma: the first token, prompt of 256", lambda m: first_token(m.gemma)),
    "load": ("Gemma: loading", lambda m: load(m.gemma)),
    "draw-greedy": ("a draw from 201,088 logits: greedy", lambda m: sample(temperature=0.0)),
    "draw-temperature": ("a draw from 201,088 logits: temperature 0.8", lambda m: sample()),
    "draw-top-k": ("a draw from 201,088 logits: top-k 40", lambda m: sample(top_k=40)),
    "draw-top-p": ("a draw from 201,088 logits: top-p 0.95", lambda m: sample(top_p=0.95)),
    "logits-view": ("a view of the logits", lambda m: view_logits(m.tiny_gpt_oss)),
    "import": ("import overspill", lambda m: import_package()),
}


def main() -> None:
    """Print the measurement, or what this overspill lacks for it."""
    name, gemma, tiny_gpt_oss = sys.argv[1:]
    try:
        measured = MEASUREMENTS[name][1](Models(gemma, tiny_gpt_oss))
    except (AttributeError, ImportError, TypeError) as error:
        print(json.dumps({"missing": str(error)}))
        return
    file = sys.modules["overspill"].__file__
    print(json.dumps({"seconds": measured.seconds, "answer": measured.answer, "file": file}))


if __name__ == "__main__":
    main()
