"""One model, several threads; models and streams that outlive each other."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

import overspill
from overspill import Model, StopReason, Token
from programs import WITHOUT_GPU, python_environment
from rounding import is_same

# A step that is to be ended takes long on a CPU, and not on a GPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

PROMPTS = ["Once upon a time", "The capital of France is", "def main():", "1, 2, 3,"]


OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 32, "logprobs": 5}


def greedy(model: Model, prompt: str) -> list[Token]:
    """Return a reply that is the same each time, but for the rounding of batches."""
    return model.generate(prompt, **OPTIONS).tokens


def check_same(alone: list[list[Token]], together: list[list[Token]]) -> None:
    """Where a reply parts from that which a stream has alone, both tokens are about as likely."""
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        is_same(one, other)


@pytest.mark.slow
def test_streams_in_threads_do_not_mix(smollm2: Model) -> None:
    """Each stream has a KV cache of its own: what each thread gets is what it gets alone."""
    alone = [greedy(smollm2, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        check_same(alone, list(threads.map(lambda prompt: greedy(smollm2, prompt), PROMPTS)))


def test_streams_interleave_in_one_thread(smollm2: Model) -> None:
    """Two open streams take turns, step by step."""
    alone = [greedy(smollm2, prompt) for prompt in PROMPTS[:2]]
    streams = [smollm2.stream(prompt, **OPTIONS) for prompt in PROMPTS[:2]]
    replies: list[list[Token]] = [[], []]
    for tokens in zip_longest(*streams):
        for reply, token in zip(replies, tokens, strict=True):
            reply.extend([] if token is None else [token])
    check_same(alone, replies)


def test_streams_take_turns(smollm2: Model) -> None:
    """A stream in a tight loop does not starve another."""
    order: list[int] = []
    barrier = threading.Barrier(2)

    def pull(number: int) -> None:
        stream = smollm2.stream(PROMPTS[number], temperature=0, max_tokens=64)
        next(stream)
        barrier.wait()
        for _ in stream:
            order.append(number)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(pull, range(2)))
    order = order[: min(max(i for i, number in enumerate(order) if number == one) for one in range(2)) + 1]
    assert len(order) > 32  # while both went on
    # Starved, one would be 63 steps behind; a busy machine may hold a thread back for a few.
    lead = [order[: i + 1].count(0) - order[: i + 1].count(1) for i in range(len(order))]
    assert max(map(abs, lead)) <= 32


def test_next_in_two_threads_on_one_stream(smollm2: Model) -> None:
    """Each token goes to one of the threads, and none is lost."""
    expected = [token.id for token in smollm2.generate(PROMPTS[0], temperature=0, max_tokens=40).tokens]
    stream = smollm2.stream(PROMPTS[0], temperature=0, max_tokens=40)
    with ThreadPoolExecutor(2) as threads:
        parts = list(threads.map(lambda _: [token.id for token in stream], range(2)))
    assert sorted(parts[0] + parts[1]) == sorted(expected)


@pytest.mark.parametrize("what", ["stream", "model"])
def test_close_from_another_thread(gemma_path: Path, what: str) -> None:
    """Closing ends the step that runs, in its middle, and the loop ends without an exception."""
    model = Model(gemma_path, n_ctx=8192, n_batch=4096, n_threads=2)
    stream = model.stream("word " * 4000)
    timer = threading.Timer(0.2, stream.close if what == "stream" else model.close)
    timer.start()
    assert list(stream) == []
    timer.join()
    assert stream.stats.stop_reason is StopReason.CLOSED
    if what == "stream":
        assert greedy(model, PROMPTS[0]) == greedy(model, PROMPTS[0])
    model.close()


def test_a_stream_outlives_its_model(smollm2_path: Path) -> None:
    """Deleting the model while a stream is open takes nothing away from the stream."""
    model = Model(smollm2_path, n_ctx=256, n_threads=2)
    expected = greedy(model, PROMPTS[1])
    stream = model.stream(PROMPTS[1], **OPTIONS)
    first = next(stream)
    del model
    gc.collect()
    assert [first, *stream] == expected


def test_close(smollm2_path: Path) -> None:
    """Closing ends open streams; it may be repeated; later use is an error that says so."""
    with Model(smollm2_path, n_ctx=256, n_threads=2) as model:
        streams = [model.stream(prompt) for prompt in PROMPTS]
        for stream in streams[:2]:
            next(stream)
        assert "closed" not in repr(model)
    assert model.closed
    assert "closed" in repr(model)
    model.close()
    for stream in streams:
        assert list(stream) == []
        assert stream.stats.stop_reason is StopReason.CLOSED
    uses: list[Callable[[], object]] = [
        lambda: model.stream("x"),
        lambda: model.stream([1]),
        lambda: model.generate("x"),
        lambda: model.tokenize("x"),
        lambda: model.detokenize([1]),
        lambda: model.token_bytes(1),
        lambda: model.special_tokens,
        lambda: model.is_end_of_generation(1),
    ]
    for use in uses:
        with pytest.raises(overspill.ClosedError, match="closed"):
            use()


LOCK_LEFT_TAKEN = """
import logging, os, sys, threading
from overspill import Model

def use():
    with Model(sys.argv[1], offload="cpu", n_ctx=64, n_threads=1) as model:
        list(model.stream([1, 2, 3], max_tokens=3))
        list(model.generate_many([[1], [2]], max_tokens=2))
        model.eval([1, 2])

use()
taken = threading.Event()
threading.Thread(target=lambda: (logging._lock.acquire(), taken.set(), threading.Event().wait()), daemon=True).start()
taken.wait()
use()
print("done", flush=True)
os._exit(0)  # at exit logging takes it itself
"""


def test_a_lock_of_logging_that_nobody_gives_back(tiny_gpt_oss_path: Path) -> None:
    """As Ctrl-C within ``logging.getLogger`` leaves it: what writes nothing to the log does not wait for it."""
    done = subprocess.run(
        [sys.executable, "-c", LOCK_LEFT_TAKEN, str(tiny_gpt_oss_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=python_environment(**WITHOUT_GPU),
    )
    assert done.stdout == "done\n", done.stderr
