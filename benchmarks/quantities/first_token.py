"""The time to the first token: next to a minimal loop's, of a second turn, and of a prompt that a file has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import overspill
from quantities import rivals
from quantities.measuring import N_THREADS, Round, Timed, in_turn, llama_cpps_products
from quantities.stream import GREEDY, loop_over, timed_stream

TEXT = "It was a dark and stormy night, and the rain fell in torrents on the roofs of the old town. "


def tokens_of_text(model: overspill.Model, n: int) -> list[int]:
    """Return ``n`` tokens that make sense."""
    tokens = list(model.tokenize(TEXT))
    return (tokens * (n // len(tokens) + 1))[:n]


@contextmanager
def first_token(path: Path, tools: Path | None = None, *, n_prompt: int) -> Iterator[Round]:
    """Yield rounds of the first token after ``n_prompt``; the rival, if llama.cpp's tools are given, a minimal loop."""
    with ExitStack() as opened:
        if tools is not None:
            opened.enter_context(llama_cpps_products())
        model = opened.enter_context(overspill.Model(path, n_ctx=1024, n_threads=N_THREADS))
        prompt = tokens_of_text(model, n_prompt)
        minimal_loop = None
        if tools is not None:
            minimal_loop = loop_over(opened.enter_context(rivals.minimal_loop(tools, path)), prompt, 1, slice(0, 1))
        yield in_turn(lambda: timed_stream(model, prompt, max_tokens=1, **GREEDY), minimal_loop)


@contextmanager
def second_turn(path: Path, *, n_first: int, n_new: int) -> Iterator[Round]:
    """Yield rounds of the first token of a turn that reuses the one before; the rival is our own, which reads all.

    The first turn has ``n_first`` tokens, the second ``n_new`` more.
    """
    with overspill.Model(path, n_ctx=1024, n_threads=N_THREADS) as model:
        first = tokens_of_text(model, n_first)
        second = tokens_of_text(model, n_first + n_new)

        def turn(reuse: bool) -> Timed:
            timed = timed_stream(model, second, max_tokens=1, reuse=reuse, **GREEDY)
            (stats,) = timed.stats
            assert (stats.cached_tokens >= n_first - 1) == reuse, stats
            return timed

        def with_reuse() -> Timed:
            model.generate(first, max_tokens=1, reuse=True, **GREEDY)
            return turn(True)

        yield in_turn(with_reuse, lambda: turn(False))


@contextmanager
def resumed(path: Path, session: Path, *, n_prompt: int) -> Iterator[Round]:
    """Yield rounds of opening a stream and its first token, with its prompt in a file; the rival reads the prompt."""
    with overspill.Model(path, n_ctx=n_prompt + 64, n_threads=N_THREADS) as model:
        prompt = tokens_of_text(model, n_prompt)
        model.generate(prompt, max_tokens=2, session=session, **GREEDY)
        kept = session.read_bytes()

        def turn(**options: Any) -> Timed:
            model.generate(prompt[:1], max_tokens=1)  # in place of what there is
            begun = time.perf_counter()
            with model.stream([*prompt, prompt[0]], max_tokens=2, **options, **GREEDY) as stream:
                next(stream)
                seconds = time.perf_counter() - begun
                stats = stream.stats
            session.write_bytes(kept)
            assert (stats.cached_tokens >= n_prompt - 16) == bool(options), stats
            return Timed([seconds], stats=[stats])

        yield in_turn(lambda: turn(session=session), turn)
