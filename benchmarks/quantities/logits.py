"""What happens to logits after a decode: a view of them, and the way to text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import overspill
from quantities.measuring import N_THREADS, Round, Timed, call_time, in_turn
from quantities.stream import PROMPT, timed_stream


@contextmanager
def view(path: Path) -> Iterator[Round]:
    """Yield rounds of a view of a token's logits; the rival is a copy of them, into memory that is there already."""
    with (
        overspill.Model(path, n_ctx=64, n_batch=64, n_threads=N_THREADS) as model,
        model.stream([1, 2, 3], logits=True, temperature=0) as stream,
    ):
        token = next(stream)
        copy = token.logits.copy()
        yield in_turn(
            lambda: Timed([call_time(lambda: token.logits, 20, calls=1000)], token.id),
            lambda: Timed([call_time(lambda: np.copyto(copy, token.logits), 20, calls=10)], token.id),
        )


@contextmanager
def logits_to_text(path: Path, slower: Mapping[str, Any]) -> Iterator[Round]:
    """Yield rounds of the way from logits to text, by a stream's counters; the rival is a greedy draw from logits.

    A decode has just made these logits, so the draw waits for memory as the stream's does; one of logits that are in
    the cache takes half as long. ``slower`` are options of the stream.
    """
    greedy = overspill.Sampler(temperature=0)
    with overspill.Model(path, n_ctx=512, n_threads=N_THREADS) as model:
        prompt = model.tokenize(PROMPT)
        ids = timed_stream(model, prompt, max_tokens=12, temperature=0).answer

        def stream() -> Timed:
            timed = timed_stream(model, prompt, max_tokens=25, temperature=0, **slower)
            spent = timed.stats[0].breakdown
            seconds = (spent.logits_s + spent.sample_s + spent.python_s + spent.text_s) / spent.tokens
            return Timed([seconds], timed.answer[:12])

        def draws() -> Timed:
            model.reset()
            logits = model.eval(prompt)
            seconds, drawn = [], []
            for token in ids:
                start = time.perf_counter()
                drawn.append(greedy.sample(logits))
                seconds.append(time.perf_counter() - start)
                logits = model.eval([token])
            return Timed(seconds, drawn)

        yield in_turn(stream, draws)
