"""What comes out of a stream, and how it ends."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import overspill
from overspill import Model, StopReason
from sweeps import sweep

# A step that is to be ended takes long on a CPU, and not on a GPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

PROMPT = "Once upon a time"


def greedy(model: Model, n: int = 24, **options: Any) -> overspill.Completion:
    """Return a reply that is the same each time."""
    return model.generate(PROMPT, temperature=0, max_tokens=n, **options)


def test_generate_is_the_stream_folded(smollm2: Model) -> None:
    """The text is the tokens' texts, and both ways give the same ones."""
    whole = greedy(smollm2)
    with smollm2.stream(PROMPT, temperature=0, max_tokens=24) as stream:
        tokens = list(stream)
    assert whole.tokens == tokens
    assert whole.text == str(whole) == "".join(map(str, tokens))
    assert [repr(token) for token in tokens] == [f"Token(id={token.id}, text={token.text!r})" for token in tokens]


def test_token_ids_are_a_prompt_too(tiny_gpt_oss: Model) -> None:
    """Text is only a way to write token ids."""
    ids = tiny_gpt_oss.tokenize(PROMPT)
    assert tiny_gpt_oss.generate(ids, temperature=0, max_tokens=24).tokens == greedy(tiny_gpt_oss).tokens


def test_text_is_the_bytes_of_the_tokens(tiny_gpt_oss: Model) -> None:
    """Pieces of characters wait for the rest; what never becomes one is replaced as Python does it."""
    n_replaced = n_waited = 0
    for seed in range(60):
        reply = tiny_gpt_oss.generate(PROMPT, temperature=5, top_k=0, top_p=1, min_p=0, seed=seed, max_tokens=40)
        pieces = [tiny_gpt_oss.token_bytes(token.id, special=False) for token in reply.tokens]
        assert reply.text == b"".join(pieces).decode(errors="replace")
        n_replaced += "\ufffd" in reply.text
        n_waited += any(piece and not token.text for piece, token in zip(pieces, reply.tokens, strict=True))
    assert n_replaced > 0, "no seed gave bytes that are no text: the test has tested nothing"
    assert n_waited > 0, "no character was spread over tokens: the test has tested nothing"


def test_max_tokens(tiny_gpt_oss: Model) -> None:
    """As many tokens as were asked for, no step more."""
    for n in (1, 2, 7):
        reply = greedy(tiny_gpt_oss, n)
        assert len(reply.tokens) == reply.stats.tokens == n
        assert reply.stats.stop_reason is StopReason.MAX_TOKENS


def test_end_of_generation(smollm2: Model) -> None:
    """The end token comes out, has no text, and ends the stream."""
    prompt = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    reply = smollm2.generate(prompt, temperature=0)
    assert reply.stats.stop_reason is StopReason.EOS
    assert [smollm2.is_end_of_generation(token.id) for token in reply.tokens[-2:]] == [False, True]
    assert reply.tokens[-1].text == ""
    assert "<|im_end|>" not in reply.text


@pytest.mark.parametrize("step", sweep([17, 5], always=[0]))
def test_stop_strings_cut_the_text_exactly(smollm2: Model, step: int) -> None:
    """Whatever part of the text is a stop string, out comes what precedes its first appearance."""
    whole = greedy(smollm2).text
    for start, length in itertools.product(range(0, len(whole) - 8, step), (1, 3, 8)):
        stop = whole[start : start + length]
        reply = greedy(smollm2, stop=[stop, "\0never"])
        assert reply.text == whole[: whole.find(stop)]
        assert reply.stats.stop_reason is StopReason.STOP_STRING


def test_text_held_back_for_a_stop_string_is_not_lost(smollm2: Model) -> None:
    """A beginning of a stop string at the end of the reply comes out with the last token."""
    whole = greedy(smollm2).text
    reply = greedy(smollm2, stop=whole[-5:] + "\0")
    assert reply.text == whole
    assert reply.stats.stop_reason is StopReason.MAX_TOKENS


def test_context_full(gemma_path: Path) -> None:
    """Prompt and reply fill n_ctx exactly; one more prompt token than that is refused."""
    with Model(gemma_path, n_ctx=40, n_batch=16, n_threads=2) as model:
        prompt = model.tokenize("word " * 60)
        reply = model.generate(prompt[:30], temperature=0)
        assert reply.stats.stop_reason is StopReason.CONTEXT_FULL
        # The last token is drawn from the logits after the 40th, and need not be decoded itself.
        assert reply.stats.tokens == 40 - 30 + 1
        assert model.generate(prompt[:40], temperature=0).stats.tokens == 1
        with pytest.raises(overspill.ContextFullError, match=r"41 tokens.* holds 40"):
            model.stream(prompt[:41])


WHOLE_REPLIES: dict[str, Callable[[Model, dict[str, Any]], overspill.Stats]] = {
    "generate": lambda model, options: model.generate(PROMPT, **options).stats,
    "generate_many": lambda model, options: next(model.generate_many([PROMPT], **options))[1].stats,
    "ask": lambda model, options: model.ask(PROMPT, **options).stats,
    "aask": lambda model, options: asyncio.run(model.aask(PROMPT, **options)).stats,
    "Chat.ask": lambda model, options: overspill.Chat(model).ask(PROMPT, **options).stats,
    "chat": lambda model, options: model.chat(PROMPT, **options).finish().stats,
}


@pytest.mark.parametrize("way", WHOLE_REPLIES)
def test_a_whole_reply_that_fills_the_context(smollm2_path: Path, caplog: pytest.LogCaptureFixture, way: str) -> None:
    """Without ``max_tokens``, one line says so, once for a model; a stream is its caller's to end."""
    reply = WHOLE_REPLIES[way]
    with Model(smollm2_path, n_ctx=64, n_threads=2) as model, caplog.at_level(logging.WARNING, "overspill"):
        ends = [token for token in range(model.n_vocab) if model.is_end_of_generation(token)]
        endless: dict[str, Any] = {"temperature": 0, "logit_bias": dict.fromkeys(ends, -math.inf)}
        list(model.stream(PROMPT, **endless))
        assert reply(model, {**endless, "max_tokens": 4}).stop_reason is StopReason.MAX_TOKENS
        assert reply(model, {**endless, "max_tokens": 1000}).stop_reason is StopReason.CONTEXT_FULL
        assert caplog.messages == []
        for _ in range(2):
            assert reply(model, endless).stop_reason is StopReason.CONTEXT_FULL
        (said,) = caplog.messages
    assert re.fullmatch(rf"{smollm2_path.name}: a reply of \d+ tokens .*n_ctx=64.*max_tokens=.*", said)


def test_prompt_batches_do_not_change_the_reply(gemma_path: Path, gemma: Model) -> None:
    """A prompt in many batches gives the reply of a prompt in one."""
    prompt = gemma.tokenize("The quick brown fox jumps over the lazy dog. " * 12)
    expected = gemma.generate(prompt, temperature=0, max_tokens=16).text
    with Model(gemma_path, n_ctx=512, n_batch=32, n_threads=2) as model:
        assert model.generate(prompt, temperature=0, max_tokens=16).text == expected


def test_seed(smollm2: Model) -> None:
    """A seed fixes the draws; other seeds and no seed give others."""
    texts = [smollm2.generate(PROMPT, seed=seed, temperature=1.5, max_tokens=16).text for seed in (1, 1, 2, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


@pytest.mark.slow
def test_draws_follow_the_log_probabilities(tiny_gpt_oss: Model) -> None:
    """First tokens over many seeds appear as often as their log-probabilities say (chi-square, 99.99 %)."""
    n, k = 3000, 5
    counts: Counter[int] = Counter()
    logprobs: dict[int, float] = {}
    for seed in range(n):
        options: dict[str, Any] = {"temperature": 1.0, "top_k": k, "top_p": 1.0, "min_p": 0.0, "logprobs": True}
        (token,) = tiny_gpt_oss.generate(PROMPT, seed=seed, max_tokens=1, **options).tokens
        counts[token.id] += 1
        assert token.logprob is not None
        logprobs[token.id] = token.logprob
    assert len(logprobs) == k
    total = sum(map(math.exp, logprobs.values()))
    expected = {token: n * math.exp(logprob) / total for token, logprob in logprobs.items()}
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in logprobs)
    assert chi_square < 23.5  # 4 degrees of freedom


def test_log_probabilities_only_when_asked_for(smollm2: Model) -> None:
    """They cost a pass over the vocabulary, and greedy's are the largest."""
    assert all(token.logprob is None for token in greedy(smollm2, 3).tokens)
    best = greedy(smollm2, 1, logprobs=True).tokens[0].logprob
    assert best is not None
    for seed in range(5):
        (token,) = smollm2.generate(PROMPT, temperature=2, seed=seed, max_tokens=1, logprobs=True).tokens
        assert token.logprob is not None
        assert token.logprob <= best <= 0


def test_penalties_reach_back_as_far_as_they_are_told(smollm2: Model) -> None:
    """An overwhelming penalty forbids every token of the last n, the prompt's included."""
    free = greedy(smollm2, 40).tokens
    assert len({token.id for token in free}) < 40, "nothing repeats: the test would test nothing"
    tokens = [token.id for token in greedy(smollm2, 40, presence_penalty=1e6, repeat_last_n=-1).tokens]
    assert len({*tokens, *smollm2.tokenize(PROMPT)}) == 40 + len(set(smollm2.tokenize(PROMPT)))
    tokens = [token.id for token in greedy(smollm2, 40, presence_penalty=1e6, repeat_last_n=4).tokens]
    assert all(token not in tokens[max(0, i - 4) : i] for i, token in enumerate(tokens))


def test_top_k_of_one_is_greedy(tiny_gpt_oss: Model) -> None:
    """One survivor leaves nothing to draw."""
    assert tiny_gpt_oss.generate(PROMPT, temperature=1.5, top_k=1, max_tokens=24).tokens == greedy(tiny_gpt_oss).tokens


@pytest.mark.parametrize("way", ["break", "close", "with", "raise", "del"])
def test_an_abandoned_stream_ends_and_leaves_the_model_usable(tiny_gpt_oss: Model, way: str) -> None:
    """However the loop is left, the stream is closed and the next one starts afresh."""
    expected = greedy(tiny_gpt_oss).text
    stream = tiny_gpt_oss.stream(PROMPT)
    if way == "break":
        for _ in stream:
            break
    elif way == "close":
        next(stream)
        stream.close()
        stream.close()
    elif way == "with":
        with stream:
            next(stream)
    elif way == "raise":
        with pytest.raises(ZeroDivisionError):
            for _ in stream:
                raise ZeroDivisionError
    if way == "del":
        next(stream)
        del stream
    else:
        assert stream.stats.stop_reason is StopReason.CLOSED
        assert list(stream) == []
        with pytest.raises(StopIteration):
            next(stream)
        assert stream.stats.tokens == 1
    assert greedy(tiny_gpt_oss).text == expected


class AlarmError(Exception):
    """What the signal handler of the tests raises."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_signal_ends_the_step_that_runs(gemma_path: Path, phase: str) -> None:
    """The handler's exception reaches the caller, and the stream says that it was interrupted."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise AlarmError

    with Model(gemma_path, n_ctx=8192, n_batch=4096, n_threads=2) as model:
        before = signal.signal(signal.SIGALRM, handler)
        stream = model.stream("word " * (4000 if phase == "prefill" else 1), temperature=0)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            # Not a `for`, so that the exception can only come out of the step itself or right after it.
            with pytest.raises(AlarmError), stream:
                while True:
                    next(stream)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if phase == "prefill":
            assert stream.stats.stop_reason is StopReason.INTERRUPTED
            assert stream.stats.tokens == 0
        else:
            assert stream.stats.stop_reason in (StopReason.INTERRUPTED, StopReason.CLOSED)
        assert model.generate(PROMPT, max_tokens=3).stats.tokens == 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
def test_a_signal_handler_cannot_use_the_model_but_may_close_the_stream(gemma_path: Path) -> None:
    """What would wait for itself for ever is an Error; closing ends the step."""
    outcomes: list[object] = []

    def handler(number: int, frame: FrameType | None) -> None:
        for use in (lambda: next(stream), model.close, lambda: model.generate("x", max_tokens=1)):
            try:
                outcomes.append(use())
            except overspill.Error as error:
                outcomes.append(str(error))
        stream.close()

    with Model(gemma_path, n_ctx=8192, n_batch=4096, n_threads=2) as model:
        stream = model.stream("word " * 4000)
        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            assert list(stream) == []
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert stream.stats.stop_reason is StopReason.CLOSED
        assert len(outcomes) == 3
        assert all("step" in str(outcome) for outcome in outcomes), outcomes


def test_ctrl_c_between_two_steps_is_an_interruption(tiny_gpt_oss: Model) -> None:
    """KeyboardInterrupt in the caller's own code counts as well."""
    with pytest.raises(KeyboardInterrupt), tiny_gpt_oss.stream(PROMPT) as stream:
        for _ in stream:
            raise KeyboardInterrupt
    assert stream.stats.stop_reason is StopReason.INTERRUPTED


def test_stats(smollm2: Model) -> None:
    """The figures fit each other and what came out, and print as one line."""
    stream = smollm2.stream(PROMPT, temperature=0, max_tokens=9)
    assert stream.stats.tokens_per_second is None
    assert str(stream.stats) == "– tok/s · 0 tokens · no first token · running"
    next(stream)
    first = stream.stats
    assert (first.tokens, first.decode_s, first.stop_reason) == (1, 0, None)
    assert first.time_to_first_token_s is not None
    assert first.time_to_first_token_s >= first.prefill_s > 0
    time.sleep(0.05)  # the caller's own time, which is not the stream's
    start = time.perf_counter()
    list(stream)
    outside = time.perf_counter() - start
    stats = stream.stats
    assert stats.prompt_tokens == len(smollm2.tokenize(PROMPT))
    assert 0 < stats.decode_s <= outside
    assert stats.tokens_per_second == pytest.approx(8 / stats.decode_s)
    assert re.fullmatch(
        r"\d+\.\d\d tok/s · 9 tokens · \d+\.\d\d s to first token(?: · busy CPU: [^·]+)? · stop: max_tokens", str(stats)
    )


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be 0 or more"),
        ({"temperature": math.nan}, ValueError, "temperature must be 0 or more"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_p": 1.01}, ValueError, "top_p must be 0 to 1"),
        ({"min_p": -0.01}, ValueError, "min_p must be 0 to 1"),
        ({"repeat_penalty": 0}, ValueError, "repeat_penalty must be over 0"),
        ({"frequency_penalty": math.inf}, ValueError, "frequency_penalty must be finite"),
        ({"presence_penalty": math.nan}, ValueError, "presence_penalty must be finite"),
        ({"repeat_last_n": -2}, ValueError, "repeat_last_n must be at least -1"),
        ({"seed": 2**32}, ValueError, "seed must be 0 to 4294967294"),
        ({"seed": -1}, ValueError, "seed must be 0 to 4294967294"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
        ({"stop": [""]}, ValueError, "stop must not contain an empty string"),
        ({"stop": [1]}, TypeError, "stop must be a string or a sequence"),
        ({"warmth": 1}, TypeError, "warmth"),
    ],
)
def test_bad_options_name_the_argument(
    gemma: Model, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """One line: which argument, which range, what was given."""
    with pytest.raises(error, match=text):
        gemma.generate(PROMPT, **options)


@pytest.mark.parametrize(
    ("prompt", "error", "text"),
    [
        ([], ValueError, "prompt must have at least one token"),
        ([1, 2, 262144], ValueError, r"prompt\[2\]: 262144 is not in the vocabulary \(0 to 262143\)"),
        ([-1], ValueError, r"prompt\[0\]: -1"),
        ([2**70], ValueError, "prompt"),
        (3.5, TypeError, "prompt must be a string or a sequence of token ids"),
        (["a"], TypeError, "prompt must be a string or a sequence of token ids"),
        ("\ud800", ValueError, "surrogates"),
    ],
)
def test_bad_prompts(gemma: Model, prompt: object, error: type[Exception], text: str) -> None:
    """The same for the prompt."""
    with pytest.raises(error, match=text):
        gemma.stream(prompt)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_gil_is_free_during_a_step(gemma_path: Path) -> None:
    """Another thread runs Python code while the model works on a prompt."""
    counted = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1

    with Model(gemma_path, n_ctx=2048, n_batch=2048, n_threads=1) as model:
        stream = model.stream("word " * 1000)
        thread = threading.Thread(target=count)
        thread.start()
        try:
            before = counted
            next(stream)
            during = counted - before
        finally:
            stop.set()
            thread.join()
    # With the GIL held the whole time it would be a handful.
    assert during > 1000
