"""A draw of the sampler, next to llama.cpp's chain and to numpy's vectorised scan of the same logits.

All run on one thread. llama.cpp's is timed within C++, ours and the scan from Python, call and all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import overspill
from quantities.measuring import Round, Take, Timed, call_time, in_turn

N_VOCAB = 201_088  # gpt-oss's
PLAIN: Mapping[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
N_DRAWS = 30


def normal_logits(n: int = N_VOCAB) -> NDArray[np.float32]:
    """Return ``n`` logits of no model, normally distributed."""
    return np.random.default_rng(n).normal(0, 3, n).astype(np.float32)


Sampling: TypeAlias = Mapping[str, Any]
Rival: TypeAlias = Callable[[Sampling, NDArray[np.float32]], Take]


def scan(sampling: Sampling, logits: NDArray[np.float32]) -> Take:
    """Return what takes the time of a scan for the largest logit; the answer is where that is, for a greedy sampler."""
    answer = int(logits.argmax()) if sampling["temperature"] == 0 else None
    return lambda: Timed([call_time(logits.max, N_DRAWS)], answer)


def llama_cpp_chain(tools: Path) -> Rival:
    """Return the rival that draws with llama.cpp's samplers, from the same distribution."""
    from upstream_tools import UpstreamChain

    def rival(sampling: Sampling, logits: NDArray[np.float32]) -> Take:
        options = overspill.SamplingOptions(**sampling)
        chain = UpstreamChain(tools, options, len(logits))
        ids, p = overspill.Sampler(options).distribution(logits)
        their_ids, their_p, chosen = chain.sample(logits)
        if options.temperature > 0:
            assert abs(len(ids) - len(their_ids)) <= 0.02 * len(ids), "the two disagree"
            # llama.cpp adds up the whole row in floats, one by one.
            assert np.allclose(p[:50], np.sort(their_p)[::-1][:50], atol=1e-5, rtol=2e-3)
        answer = chosen if options.temperature == 0 else None
        return lambda: Timed([chain.time_us(logits, 3) / 1e6], answer)

    return rival


@contextmanager
def draw(sampling: Sampling, logits: NDArray[np.float32], rival: Rival | None = None) -> Iterator[Round]:
    """Yield rounds of draws from the same logits; ``sampling`` are options of :class:`overspill.Sampler`."""
    sampler = overspill.Sampler(**sampling)

    def draws() -> Timed:
        ids: list[int] = []
        seconds = call_time(lambda: ids.append(sampler.sample(logits)), N_DRAWS)
        return Timed([seconds], ids)

    def check(ids: list[int], theirs: int | None) -> None:
        assert theirs is None or set(ids) == {theirs}, "the two disagree"

    yield in_turn(draws, rival and rival(sampling, logits), check)
