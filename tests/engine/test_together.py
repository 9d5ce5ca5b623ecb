"""Streams that are open at the same time share a batch: each has what it has alone, in its turn."""

from __future__ import annotations

import itertools
import random
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overspill import Model, StopReason, Token
from overspill.base.host import physical_cores
from rounding import is_same

pytestmark = pytest.mark.usefixtures("no_gpu")

PROMPTS = ["Once upon a time", "The capital of France is", "def main():", "1, 2, 3,", "Dear Sir,", "The sea is"]
GREEDY: dict[str, Any] = {"temperature": 0, "logprobs": 5}


@pytest.fixture
def model(smollm2_path: Path) -> Any:
    """Return SmolLM2 with places for three streams."""
    with Model(smollm2_path, n_ctx=512, n_parallel=3, n_threads=physical_cores()) as loaded:
        yield loaded


def check_same(alone: list[list[Token]], together: list[list[Token]]) -> None:
    """Where a reply parts from that which a stream has alone, both tokens are about as likely; few do."""
    same = [is_same(one, other) for one, other in zip(alone, together, strict=True)]
    assert sum(same) >= len(same) // 2


# Ways to stream; each is given to some of those that are open together.
def _chooser(logits: Any, tokens: Any) -> int:
    return int(np.argmax(logits))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampler in Python": {"sampler": _chooser},
    "processor": {"logits_processors": [lambda logits, tokens: logits.__setitem__(slice(0, 3), -np.inf)]},
    "views": {"logits": True},
    "grammar": {"grammar": 'root ::= ("yes" | "no" | "maybe" | " ")+'},
    "penalties": {"repeat_penalty": 1.3, "frequency_penalty": 0.2},
    "reuse": {"reuse": True},
    "stop string": {"stop": ["\n\n"]},
}


@pytest.mark.parametrize("shift", range(3))
def test_streams_that_come_and_go(model: Model, shift: int) -> None:
    """Streams of every kind join in the middle of others and leave before them; none changes another's tokens."""
    kinds = list(KINDS.values())[shift:] + list(KINDS.values())[:shift]
    lengths = [5 + 7 * i % 23 for i in range(len(kinds))]
    jobs = [(PROMPTS[i % len(PROMPTS)], {**GREEDY, "max_tokens": lengths[i], **kind}) for i, kind in enumerate(kinds)]
    alone = [model.generate(prompt, **options).tokens for prompt, options in jobs]

    def run(job: tuple[str, dict[str, Any]]) -> list[Token]:
        tokens = []
        with model.stream(job[0], **job[1]) as stream:
            for token in stream:
                tokens.append(token)
                if job[1].get("logits"):
                    # A view holds until the stream's next token, whatever others decode meanwhile.
                    assert int(np.argmax(token.logits)) == token.id
        return tokens

    with ThreadPoolExecutor(4) as threads:
        check_same(alone, list(threads.map(run, jobs)))


def test_views_outlive_what_others_decode(model: Model) -> None:
    """Logits stay those of their token while other streams go on, until the stream's own next token."""
    with model.stream("One", logits=True, **GREEDY) as first, model.stream("Two", **GREEDY) as second:
        next(second)
        for _ in range(4):
            token = next(first)
            kept = token.logits.copy()
            for _ in range(3):
                next(second)
            np.testing.assert_array_equal(token.logits, kept)
        view = token.logits
        following = next(first)
        assert not np.array_equal(view, kept) or following.id == token.id
        with pytest.raises(Exception, match="overwritten"):
            token.logits  # noqa: B018


def test_an_error_ends_its_own_stream_alone(model: Model) -> None:
    """A sampler that raises, or that gives what there is not, leaves the others as they were."""
    calls = itertools.count()

    def fails(logits: Any, tokens: Any) -> int:
        if next(calls) == 3:
            raise ZeroDivisionError("of mine")
        return 5

    expected = model.generate(PROMPTS[0], max_tokens=20, **GREEDY).tokens
    with model.stream(PROMPTS[0], max_tokens=20, **GREEDY) as good:
        bad, worse = model.stream("x", sampler=fails), model.stream("x", sampler=lambda logits, tokens: 10**6)
        tokens = [next(good)]
        with pytest.raises(ZeroDivisionError, match="of mine"):
            for _ in bad:
                tokens.append(next(good))
        with pytest.raises(ValueError, match="vocabulary"):
            next(worse)
        tokens.extend(good)
    is_same(expected, tokens)
    assert good.stats.stop_reason is StopReason.MAX_TOKENS
    assert bad.stats.stop_reason is StopReason.ERROR


@pytest.mark.parametrize("n_parallel", [None, 1, 2, 5])
def test_more_streams_than_places(smollm2_path: Path, n_parallel: int | None) -> None:
    """Whoever asks gets an answer, with one thread for all as well; a place that is not used goes to who waits."""
    with Model(smollm2_path, n_ctx=256, n_parallel=n_parallel, n_threads=2) as model:
        alone = [model.generate(prompt, max_tokens=4, **GREEDY).tokens for prompt in PROMPTS[:4]]
        streams = [model.stream(prompt, max_tokens=4, **GREEDY) for prompt in PROMPTS[:4]]
        replies: list[list[Token]] = [[] for _ in streams]
        for _ in range(2 if n_parallel == 1 else 4):
            for stream, reply in zip(streams, replies, strict=True):
                reply.extend(itertools.islice(stream._generation, 1))
        for stream, reply in zip(streams, replies, strict=True):
            reply.extend(stream)
        check_same(alone, replies)


class LeastRecentlyUsed:
    """What a cache of the tokens of so many conversations holds."""

    def __init__(self, n: int) -> None:
        self._n, self._held = n, OrderedDict[int, bool]()

    def has(self, conversation: int) -> bool:
        """Return whether it was there, and have it there."""
        was_there = self._held.pop(conversation, False)
        self._held[conversation] = True
        if len(self._held) > self._n:
            self._held.popitem(last=False)
        return was_there


@pytest.mark.parametrize("order", ["in turn", "mixed"])
def test_conversations_find_their_beginnings(smollm2_path: Path, order: str) -> None:
    """Of 20 conversations, the five latest go on where they were; others are read again."""
    draw = random.Random(1)
    rounds = 3 if order == "in turn" else 60
    turns = (
        list(range(20)) * rounds if order == "in turn" else [min(19, int(draw.expovariate(0.3))) for _ in range(rounds)]
    )
    cache = LeastRecentlyUsed(5)
    # Unlike from the first token on.
    texts = {number: [100 + 7 * number, 200 + number, *range(300, 330)] for number in range(20)}
    with Model(smollm2_path, n_ctx=512, n_parallel=5, n_threads=2) as model:
        for turn, number in enumerate(turns):
            prompt = texts[number]
            reply = model.generate(prompt, reuse=True, temperature=0, max_tokens=4)
            assert (reply.stats.cached_tokens > 0) is cache.has(number), turn
            if reply.stats.cached_tokens:
                # All but what came since: the last token of a reply is never decoded.
                assert reply.stats.cached_tokens >= len(prompt) - 8
            texts[number] = [*prompt, *(token.id for token in reply.tokens), 400 + turn % 50, 500, 600]


GRAMMARS = ['root ::= "a"+', 'root ::= "yes" | "no"', "root ::= [0-9]+"]


@pytest.mark.parametrize("n", [pytest.param(1000, marks=pytest.mark.slow), 150])
def test_a_crowd(smollm2_path: Path, n: int) -> None:
    """Streams by 50 threads on four places, a third given up at random, some with errors of their own."""
    n_before = threading.active_count()
    with Model(smollm2_path, n_ctx=128, n_parallel=4, n_threads=2) as model:
        expected = {prompt: model.generate(prompt, max_tokens=6, **GREEDY).tokens for prompt in PROMPTS}
        draws = random.Random(3)
        jobs = [(draws.choice(PROMPTS), draws.randrange(6), draws.randrange(1, 6)) for _ in range(n)]
        same: list[bool] = []

        def run(job: tuple[str, int, int]) -> None:
            prompt, kind, n_tokens = job
            if kind < 2:  # given up
                with model.stream(prompt, max_tokens=6, **GREEDY) as stream:
                    tokens = list(itertools.islice(stream._generation, n_tokens))
                is_same(expected[prompt][: len(tokens)], tokens)
            elif kind == 2:
                reply = model.generate(prompt, max_tokens=4, grammar=GRAMMARS[n_tokens % 3], **GREEDY)
                assert set(reply.text) <= set(("a", "yesno", "0123456789")[n_tokens % 3])
            elif kind == 3:
                with pytest.raises(KeyError, match="mine"):
                    model.generate(prompt, max_tokens=6, sampler=_raise_after(n_tokens))
            else:
                same.append(is_same(expected[prompt], model.generate(prompt, max_tokens=6, **GREEDY).tokens))

        with ThreadPoolExecutor(50) as threads:
            list(threads.map(run, jobs))
        assert sum(same) >= 0.5 * len(same)
    assert threading.active_count() == n_before


def _raise_after(n: int) -> Any:
    calls = itertools.count()

    def choose(logits: Any, tokens: Any) -> int:
        if next(calls) == n:
            raise KeyError("mine")
        return 5  # which ends nothing

    return choose


def test_first_come_first_served(smollm2_path: Path) -> None:
    """Streams that wait for the only place get it in the order in which they asked."""
    order: list[int] = []
    with Model(smollm2_path, n_ctx=128, n_parallel=1, n_threads=2) as model:
        first = model.stream("Once", max_tokens=100)
        next(first)
        started = threading.Event()
        threads = []

        def pull() -> None:
            for _ in first:
                started.set()

        def answer(number: int) -> None:
            next(model.stream(PROMPTS[number], max_tokens=1))
            order.append(number)

        holder = threading.Thread(target=pull)
        holder.start()
        started.wait()
        for number in range(4):
            thread = threading.Thread(target=answer, args=(number,))
            thread.start()
            threads.append(thread)
            threading.Event().wait(0.05)
        for thread in (holder, *threads):
            thread.join()
    assert order == sorted(order)
