"""Prompts that lose their place, kept in RAM: what comes back, what goes first, and how much there is at most."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_fixtures import N_THREADS
from overspill import Error, Model

pytestmark = pytest.mark.usefixtures("no_gpu")

N, LENGTH = 20, 120
GREEDY: dict[str, Any] = {"temperature": 0, "reuse": True}


def conversations() -> list[list[int]]:
    """Return prompts that have nothing in common."""
    random = np.random.default_rng(4)
    return [[i + 10, *map(int, random.integers(50, 500, LENGTH - 1))] for i in range(N)]


def turn(model: Model, tokens: list[int]) -> int:
    """Read a prompt and reply to it, both added to the conversation; return how many tokens were not read again."""
    reply = model.generate(tokens, max_tokens=6, **GREEDY)
    tokens += [token.id for token in reply.tokens]
    tokens.append(7)
    return reply.stats.cached_tokens


@pytest.mark.parametrize("n_parallel", [None, 1, 3])
@pytest.mark.parametrize("name", ["smollm2", "tiny_gpt_oss"])
def test_nothing_in_the_budget_is_read_again(request: pytest.FixtureRequest, name: str, n_parallel: int | None) -> None:
    """Twenty conversations in turn: each begins where it had ended, with windows too."""
    path: Path = request.getfixturevalue(f"{name}_path")
    with Model(path, n_ctx=512, n_parallel=n_parallel, n_threads=N_THREADS, prompt_cache="256MiB") as model:
        talks = conversations()
        assert [turn(model, tokens) for tokens in talks] == [0] * N
        for _ in range(2):
            lengths = [len(tokens) for tokens in talks]
            # All but the last token, which was not decoded, and the one that was added.
            assert [turn(model, tokens) for tokens in talks] == [length - 2 for length in lengths]
        n_kept = N - (n_parallel or 1)
        one = model.prompt_cache_bytes / n_kept
        assert one > 4 * LENGTH


def test_the_budget_holds_and_the_oldest_goes(smollm2_path: Path) -> None:
    """With room for seven: these come back, in whatever order they are asked for."""
    with Model(smollm2_path, n_ctx=512, n_parallel=1, n_threads=N_THREADS, prompt_cache="1GiB") as model:
        talks = conversations()
        turn(model, talks[0])
        turn(model, talks[1])
        size = model.prompt_cache_bytes
    budget = size * 15 // 2
    with Model(smollm2_path, n_ctx=512, n_parallel=1, n_threads=N_THREADS, prompt_cache=budget) as model:
        talks = conversations()
        for tokens in talks:
            turn(model, tokens)
            assert model.prompt_cache_bytes <= budget
        # The last has its place still, and the seven before it are kept.
        found = {i: turn(model, list(talks[i])) for i in (13, 19, 12)}
        assert found[13] > LENGTH
        assert found[19] > LENGTH
        assert found[12] > LENGTH or found[12] == 0
        assert turn(model, list(talks[2])) == 0
        assert model.prompt_cache_bytes <= budget


def test_without_a_budget_nothing_is_kept(smollm2_path: Path) -> None:
    """Nor is anything that does not fit into it, nor what no prompt was to begin with."""
    for budget, options in ((0, {}), (1000, {}), ("1GiB", {"reuse": False})):
        with Model(smollm2_path, n_ctx=512, n_parallel=1, n_threads=N_THREADS, prompt_cache=budget) as model:
            for tokens in conversations()[:3]:
                model.generate(tokens, max_tokens=2, **GREEDY | options)
            assert model.prompt_cache_bytes == 0
            assert model.generate(conversations()[0], max_tokens=2, **GREEDY).stats.cached_tokens == 0


def test_a_common_beginning_serves_all(smollm2_path: Path) -> None:
    """New conversations take over the beginning that a kept one has, which stays for others."""
    with Model(smollm2_path, n_ctx=512, n_parallel=1, n_threads=N_THREADS, prompt_cache="256MiB") as model:
        first, *others = conversations()
        turn(model, list(first))
        for other in others[:4]:
            turn(model, list(other))
            assert turn(model, [*first[:100], *other[:20]]) == 100


def test_places_that_go_with_their_context(smollm2_path: Path) -> None:
    """Streams together get places of their own, which are freed at the end; what they held comes back."""
    with Model(smollm2_path, n_ctx=512, n_threads=N_THREADS, prompt_cache="1GiB") as model:
        talks = conversations()[:6]
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(lambda tokens: turn(model, tokens), talks))
        assert [turn(model, tokens) >= LENGTH for tokens in talks] == [True] * 6
        model.close()
        assert model.prompt_cache_bytes == 0


def test_the_budget_counts_as_memory(smollm2_path: Path) -> None:
    """RAM that has no room for it is told of before the model is loaded."""
    with pytest.raises(Error, match=r"and the prompt cache would take .* a smaller prompt_cache"):
        Model(smollm2_path, prompt_cache="500TiB")
    with pytest.raises(ValueError, match="prompt_cache"):
        Model(smollm2_path, prompt_cache="much")
