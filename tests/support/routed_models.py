"""Models whose router is told what to do: a token's id decides on its experts, so that a trace can be replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from header_files import Routes, gpt_oss, write_random_model


def write_routed_model(
    path: Path, routes: Routes, n_experts: int, *, width: int = 1024, expert_width: int = 32, n_heads: int = 2
) -> Path:
    """Write a gpt-oss whose token t uses the experts ``routes[t]``, the one with the largest weight first.

    ``routes`` has the shape (tokens, layers, experts of a token), with no more tokens than the width. Tokens have only
    numbers: a vocabulary of as many, or of 64 if there are fewer.
    """
    _, n_layers, n_used = routes.shape
    header = gpt_oss(
        n_layers,
        n_experts,
        max(64, len(routes)),
        n_used=n_used,
        width=width,
        expert_width=expert_width,
        n_heads=n_heads,
        n_heads_kv=1,
    )
    return write_random_model(path, header, vocabulary=False, routes=routes)


def markov_routes(
    n_tokens: int, n_layers: int, n_experts: int, n_used: int, *, kept: float = 0.44, zipf: float = 1.0, seed: int = 1
) -> npt.NDArray[np.uint16]:
    """Return routes that stay with each expert of the token before by chance, and are else drawn from favourites.

    An expert is kept with the probability ``kept``. The others are drawn from a Zipf distribution, of other favourites
    in each layer: the chance of the n-th is 1 / n to the power of ``zipf``.
    """
    random = np.random.default_rng(seed)
    routes = np.zeros((n_tokens, n_layers, n_used), np.uint16)
    shares = 1.0 / np.arange(1, n_experts + 1) ** zipf
    for layer in range(n_layers):
        by_rank = random.permutation(n_experts)
        used: list[int] = []
        for token in range(n_tokens):
            used = [expert for expert in used if random.random() < kept]
            odds = shares.copy()
            odds[[int(np.flatnonzero(by_rank == expert)[0]) for expert in used]] = 0
            drawn = random.choice(n_experts, n_used - len(used), replace=False, p=odds / odds.sum())
            used += [int(by_rank[rank]) for rank in drawn]
            random.shuffle(used)
            routes[token, layer] = used
    return routes
