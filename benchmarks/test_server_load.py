"""Measure the server under the load of 64 clients: the time to the first token, and tokens per second.

``OVERSPILL_LLAMA_SERVER`` is llama-server, to be measured in turn with it. The source that a checkout brings is without
it; linked to the installed libraries, as ``tests/upstream`` links the other tools, both sides compute alike.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from reporting import format_seconds, show
from server_load import N_CLIENTS, load, mixed
from servers import free_port, listening, serving

PLACES, N_CTX, N_THREADS = 8, 512, 2
N_REQUESTS, ROUNDS = 256, 3
ENDS = {"2": -100}
"""No reply of SmolLM2 is shorter than what was asked for."""


@dataclass(frozen=True)
class Round:
    """What a load has shown."""

    first_token_s: Sequence[float]
    seconds: Sequence[float]
    tokens_per_s: float

    @classmethod
    def measured(cls, url: str, seed: int, n_requests: int, n_clients: int) -> Round:
        """Put a load on a server; llama-server closes connections that a client would use again."""
        began = time.perf_counter()
        answers = load(url, mixed(n_requests, seed, leaves=False), n_clients=n_clients, keeps=False, logit_bias=ENDS)
        seconds = time.perf_counter() - began
        assert all(answer.n_tokens == answer.asked.n_tokens for answer in answers)
        n_tokens = sum(answer.n_tokens for answer in answers)
        first, whole = ([getattr(answer, name) for answer in answers] for name in ("first_token_s", "seconds"))
        return cls(first, whole, n_tokens / seconds)


@contextmanager
def llama_server(binary: Path, model: Path) -> Iterator[str]:
    """Run llama-server with as many places and threads, and yield its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command: list[str | Path] = [binary, "--model", model, "--port", str(port), "--parallel", str(PLACES)]
    command += ["--ctx-size", str(PLACES * N_CTX), "--threads", str(N_THREADS), "--log-disable"]
    with listening(command, url):
        yield url


def test_load(benchmark: BenchmarkFixture, smollm2_path: Path) -> None:
    """Nobody waits longer for the first token than the waiting list implies.

    Of the requests that the server takes, all but those in places wait. One that comes last waits for as many turns of
    the places, each of which takes as long as the longest request without a queue.
    """
    rounds: dict[str, list[Round]] = {}
    with ExitStack() as stack:
        options = ("--ctx", N_CTX, "--parallel", PLACES, "--threads", N_THREADS, "--offload", "cpu")
        urls = {"overspill": stack.enter_context(serving(smollm2_path, *options)).url}
        if binary := os.environ.get("OVERSPILL_LLAMA_SERVER"):
            urls["llama-server"] = stack.enter_context(llama_server(Path(binary), smollm2_path))
        without_queue = {name: Round.measured(url, 0, 8 * PLACES, PLACES) for name, url in urls.items()}

        def measure() -> None:
            for number in range(ROUNDS):
                for name, url in urls.items():
                    rounds.setdefault(name, []).append(Round.measured(url, number + 1, N_REQUESTS, N_CLIENTS))

        benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]

    rows = []
    for name, found in rounds.items():
        first = np.concatenate([one.first_token_s for one in found])
        low, high = np.percentile(first, [50, 99])
        turns = math.ceil((N_CLIENTS - PLACES) / PLACES)
        limit = turns * max(without_queue[name].seconds) + max(without_queue[name].first_token_s)
        speed = float(np.median([one.tokens_per_s for one in found]))
        benchmark.extra_info[name] = {"p50_s": low, "p99_s": high, "limit_s": limit, "tokens_per_s": speed}
        rows.append([name, *map(format_seconds, (low, high, limit)), f"{speed:.0f}"])
    show([f"{N_CLIENTS} clients, {PLACES} places", "first token, median", "99 %", "limit", "tokens/s"], *rows)
    ours = benchmark.extra_info["overspill"]
    assert ours["p99_s"] <= ours["limit_s"]
