"""Our products of weights in RAM against llama.cpp's, in whole models on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import overspill
from quantities.measuring import N_THREADS, Round, Timed, in_turn

Layout: TypeAlias = Literal["plain", "repacked"]
"""How llama.cpp's products have the weights: as the file has them, or as copies in an order that suits them."""


def _load(path: Path, **options: Any) -> overspill.Model:
    return overspill.Model(path, offload="cpu", n_ctx=1024, n_threads=N_THREADS, **options)


def _both_are_numbers(ours: float, rivals: float) -> None:
    # Products round otherwise, so the tokens may part; the tests compare them.
    assert ours == ours
    assert rivals == rivals


@contextmanager
def tokens(path: Path, layout: Layout, n_together: int, *, n: int = 24) -> Iterator[Round]:
    """Decode ``n`` times ``n_together`` tokens at once: the prompts, drafts and replies of one stream."""
    rival_options: dict[str, Any] = {"kernels": "llama.cpp", "repack": "on" if layout == "repacked" else "off"}
    with _load(path, kernels="auto") as ours, _load(path, **rival_options) as rival:

        def take(model: overspill.Model) -> Timed:
            model.reset()
            model.eval(range(5, 21))
            seconds = []
            for i in range(n):
                start = time.perf_counter()
                logits = model.eval(range(30 + i, 30 + i + n_together))
                seconds.append(time.perf_counter() - start)
            return Timed(seconds, float(logits[0]))

        yield in_turn(lambda: take(ours), lambda: take(rival), _both_are_numbers)
