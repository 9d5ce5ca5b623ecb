"""Streams and logits of a model on a GPU."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from overspill import Model, StopReason

PROMPT = "Once upon a time"


@pytest.fixture
def model(gpu: str, tiny_gpt_oss_path: Path) -> Iterator[Model]:
    """Return a model that is wholly on the GPU."""
    with Model(tiny_gpt_oss_path, offload="gpu", n_ctx=1024, n_threads=1) as loaded:
        assert set(loaded.placement.kv) == {gpu}
        yield loaded


def test_views_outlive_the_model(model: Model) -> None:
    """They show what they showed, although the memory is the device's, or pinned by it."""
    tokens = model.tokenize(PROMPT)
    with model.stream(tokens, logits=True, temperature=0) as stream:
        of_stream = next(stream).logits
    kept = of_stream.copy()
    of_eval = model.eval(tokens)
    expected = of_eval.copy()
    assert int(of_eval.argmax()) == int(kept.argmax())
    model.close()
    del stream
    gc.collect()
    assert np.array_equal(of_eval, expected)
    assert np.array_equal(of_stream, kept)
    assert expected.std() > 0


def test_the_logits_are_those_of_the_tokens(model: Model) -> None:
    """Each greedy token is the most likely one by the logits that come with it."""
    with model.stream(PROMPT, logits=True, temperature=0, max_tokens=12) as stream:
        for token in stream:
            assert int(token.logits.argmax()) == token.id


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 9}, {"seed": 9, "top_p": 0.9, "repeat_penalty": 1.1}])
def test_the_same_text_whether_it_looks_ahead(model: Model, options: dict[str, float]) -> None:
    """A caller that is slow gets the tokens of one that is not."""
    quick = [token.id for token in model.stream(PROMPT, max_tokens=24, **options)]  # type: ignore[arg-type]
    slow = []
    for token in model.stream(PROMPT, max_tokens=24, **options):  # type: ignore[arg-type]
        slow.append(token.id)
        time.sleep(0.002)
    assert slow == quick


def test_two_streams_do_not_mix(model: Model) -> None:
    """Each has the tokens that it has alone."""
    prompts = ("Once upon a time", "Rain in")
    alone = [[token.id for token in model.stream(prompt, temperature=0, max_tokens=12)] for prompt in prompts]
    streams = [model.stream(prompt, temperature=0, max_tokens=12) for prompt in prompts]
    pairs = zip(*streams, strict=True)
    assert [list(reply) for reply in zip(*([token.id for token in pair] for pair in pairs), strict=True)] == alone


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_in_a_long_prompt(gpu: str, tiny_gpt_oss_path: Path) -> None:
    """It ends the prompt, and the model goes on."""
    n_prompt = 120_000
    with Model(tiny_gpt_oss_path, offload="gpu", n_ctx=n_prompt + 64, n_threads=1) as model:
        before = model.generate(PROMPT, temperature=0, max_tokens=8).tokens
        prompt = np.random.default_rng(0).integers(0, 8000, n_prompt).tolist()
        stream = model.stream(prompt, temperature=0)
        timer = threading.Timer(0.05, lambda: signal.raise_signal(signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        timer.join()
        assert stream.stats.stop_reason == StopReason.INTERRUPTED
        assert stream.stats.tokens == 0
        assert model.generate(PROMPT, temperature=0, max_tokens=8).tokens == before


def test_states_of_other_placements(model: Model, tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """What a GPU has decoded goes on in RAM, and the other way: nothing is read again."""
    session = tmp_path / "session"
    tokens = list(range(10, 200))
    reply = model.generate(tokens, max_tokens=8, temperature=0, session=session)
    tokens += [token.id for token in reply.tokens]
    with Model(tiny_gpt_oss_path, offload="cpu", n_ctx=1024, n_threads=1) as other:
        for one in (other, model):
            reply = one.generate(tokens, max_tokens=8, temperature=0, session=session)
            assert reply.stats.cached_tokens == len(tokens) - 1
            tokens += [token.id for token in reply.tokens]
    with Model(tiny_gpt_oss_path, offload="gpu", n_ctx=1024, n_threads=1, n_parallel=1, prompt_cache="64MiB") as cached:
        for _ in range(2):
            for prompt in (tokens, tokens[50:]):
                reply = cached.generate(prompt, max_tokens=4, temperature=0, reuse=True)
        assert reply.stats.cached_tokens >= len(prompt) - 17
