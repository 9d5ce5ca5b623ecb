"""Many sequences in one batch, next to one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import overspill
from quantities.measuring import N_THREADS, Round, Timed, call_time, in_turn
from quantities.stream import assert_likely, ends_of

WORDS = [
    *("the sea", "a dog", "love", "music", "rain", "Paris", "a book", "light"),
    *("time", "gold", "fire", "war", "peace", "bread", "snow", "wind"),
]
PROMPTS = [f"What is {word}?" for word in WORDS]
N_TOKENS = 32


@contextmanager
def sixteen_prompts(path: Path, *, n_alone: int = len(PROMPTS)) -> Iterator[Round]:
    """Yield rounds of a token of sixteen prompts together; the rival is our own for ``n_alone`` of them one by one."""
    with overspill.Model(path, n_ctx=512, n_threads=N_THREADS) as model:
        banned = dict.fromkeys(ends_of(model), -100.0)
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": N_TOKENS, "logit_bias": banned}

        def together() -> Timed:
            start = time.perf_counter()
            replies = dict(model.generate_many(PROMPTS, **options))
            seconds = time.perf_counter() - start
            return of([replies[i] for i in range(len(PROMPTS))], seconds)

        def one_by_one() -> Timed:
            start = time.perf_counter()
            replies = [model.generate(prompt, **options) for prompt in PROMPTS[:n_alone]]
            return of(replies, time.perf_counter() - start)

        def of(replies: list[overspill.Completion], seconds: float) -> Timed:
            ids = [[token.id for token in reply.tokens] for reply in replies]
            assert {len(reply) for reply in ids} == {N_TOKENS}
            return Timed([seconds / (len(ids) * N_TOKENS)], ids)

        def check(ours: list[list[int]], alone: list[list[int]]) -> None:
            # Batches round differently, so where replies part, both have to be likely.
            parted = (i for i in range(n_alone) if ours[i] != alone[i])
            for i in list(parted)[:1]:
                for ids in (ours[i], alone[i]):
                    assert_likely(model, PROMPTS[i], ids, banned)

        yield in_turn(together, one_by_one, check)


@contextmanager
def step_of_many(path: Path, n: int) -> Iterator[Round]:
    """Yield rounds of a decode of ``n`` tokens, each with its logits; the rival is our own of one token."""
    with overspill.Model(path, n_ctx=512, n_threads=N_THREADS) as model:

        def step(n: int) -> Timed:
            model.reset()
            model.eval(model.tokenize("Once upon a time"))
            return Timed([call_time(lambda: model.eval(list(range(100, 100 + n)), logits="all"), 12)])

        yield in_turn(lambda: step(n), lambda: step(1))


@contextmanager
def step_of_sequences(path: Path, n: int) -> Iterator[Round]:
    """Yield rounds of a step of ``n`` replies that are decoded together, by their own counters."""
    with overspill.Model(path, n_ctx=256, n_threads=N_THREADS) as model:
        prompts = [f"The number {i} is" for i in range(n)]
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
        options["logit_bias"] = dict.fromkeys(ends_of(model), -100.0)

        def steps() -> Timed:
            replies = [reply for _, reply in model.generate_many(prompts, parallel=n, **options)]
            assert all(len(reply.tokens) == options["max_tokens"] for reply in replies)
            stats = [reply.stats for reply in replies]
            return Timed([statistics.median(one.decode_s / one.breakdown.tokens for one in stats)], stats=stats)

        yield in_turn(steps)
