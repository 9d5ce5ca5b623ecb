"""The loop in the caller's hands: samplers and processors in Python, masks, and work ahead of the caller."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from overspill import Model, Sampler, SamplingOptions, StopReason, Stream, Token

# A step that is to be ended takes long on a CPU, and not on a GPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

Logits = NDArray[np.float32]
Tokens = NDArray[np.int32]


@pytest.fixture(scope="module")
def model(tiny_gpt_oss_path: Path) -> Iterator[Model]:
    """Return the tiny model, whose greedy text does not end by itself."""
    with Model(tiny_gpt_oss_path, n_ctx=512, n_threads=1) as loaded:
        yield loaded


def ids(model: Model, **options: object) -> list[int]:
    """Return forty tokens of a reply."""
    return [token.id for token in model.stream([1, 2, 3], max_tokens=40, **options)]  # type: ignore[arg-type]


def test_a_sampler_in_python(model: Model) -> None:
    """It sees the logits and every token so far, and its answer is the token."""
    seen: list[list[int]] = []

    def second_best(logits: Logits, tokens: Tokens) -> int:
        assert logits.shape == (model.n_vocab,)
        assert not tokens.flags.writeable
        seen.append(tokens.tolist())
        return int(np.argsort(logits)[-2])

    reply = ids(model, sampler=second_best)
    assert seen == [[1, 2, 3, *reply[:n]] for n in range(40)]
    assert reply != ids(model, temperature=0)
    assert ids(model, sampler=lambda logits, tokens: logits.argmax()) == ids(model, temperature=0)


def test_none_leaves_it_to_the_sampler(model: Model) -> None:
    """With edits in place, or without any."""
    assert ids(model, sampler=lambda logits, tokens: None, seed=3) == ids(model, seed=3)
    banned = ids(model, temperature=0)[0]

    def ban(logits: Logits, tokens: Tokens) -> None:
        logits[banned] = -np.inf

    reply = ids(model, sampler=ban, temperature=0)
    assert banned not in reply
    assert (
        reply
        == ids(model, logits_processors=[ban], temperature=0)
        == ids(model, temperature=0, logit_bias={banned: -np.inf})
    )


def test_processors_run_in_order_before_the_sampler(model: Model) -> None:
    """Each sees what those before it did."""

    def flatten(logits: Logits, tokens: Tokens) -> None:
        logits[:] = 0

    def favour(logits: Logits, tokens: Tokens) -> Logits:
        logits[len(tokens) % 7] += 1
        return logits

    expected = [n % 7 for n in range(3, 43)]
    assert ids(model, logits_processors=[flatten, favour], temperature=0) == expected
    chosen = ids(model, logits_processors=[flatten, favour], sampler=lambda logits, tokens: int(logits.argmax()))
    assert chosen == expected
    with pytest.raises(TypeError, match="must edit the logits in place"):
        ids(model, logits_processors=[lambda logits, tokens: logits.copy()])
    with pytest.raises(TypeError, match="must be callable"):
        ids(model, logits_processors=[3])


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (-1, ValueError, "not in the vocabulary"),
        (10**6, ValueError, "not in the vocabulary"),
        (2**80, ValueError, "not in the vocabulary"),
        (1.5, TypeError, "must return a token id or None, not 1.5"),
        ("a", TypeError, "must return a token id or None"),
        (True, TypeError, "must return a token id or None"),
    ],
)
def test_answers_that_are_no_token(model: Model, answer: object, error: type[Exception], text: str) -> None:
    """They end the stream, and the model goes on."""
    stream = model.stream([1], sampler=lambda logits, tokens: answer)  # type: ignore[arg-type,return-value]
    with pytest.raises(error, match=text):
        next(stream)
    assert stream.stats.stop_reason == StopReason.ERROR
    assert list(stream) == []
    assert len(ids(model, temperature=0)) == 40


@pytest.mark.parametrize("where", ["sampler", "processor"])
def test_exceptions_reach_the_caller_unchanged(model: Model, where: str) -> None:
    """The very object, with its traceback into the callable."""
    raised = LookupError("what was looked for")

    def fail(logits: Logits, tokens: Tokens) -> None:
        if len(tokens) == 5:
            raise raised

    options = {"sampler": fail} if where == "sampler" else {"logits_processors": [fail]}
    stream = model.stream([1, 2, 3], **options)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(LookupError) as caught:
        next(stream)
    assert caught.value is raised
    assert any(entry.name == "fail" for entry in caught.traceback)
    assert stream.stats.stop_reason == StopReason.ERROR
    assert stream.stats.tokens == 2


def test_the_model_can_be_used_within_a_sampler(model: Model) -> None:
    """Another stream, the tokenizer, an evaluation: only the stream itself is busy."""

    def busy(logits: Logits, tokens: Tokens) -> int:
        (token,) = model.stream([5], max_tokens=1, temperature=0)
        model.reset()
        model.eval([6])
        with pytest.raises(Exception, match="in the middle of a step"):
            next(stream)
        return token.id

    stream = model.stream([1, 2, 3], sampler=busy, max_tokens=3)
    assert len(list(stream)) == 3


def test_views_kept_from_a_callable(model: Model) -> None:
    """Tokens keep their values for good, and logits their memory."""
    kept: list[tuple[Logits, Tokens]] = []
    reply = ids(model, sampler=lambda logits, tokens: kept.append((logits, tokens)))
    assert [tokens.tolist() for _, tokens in kept] == [[1, 2, 3, *reply[:n]] for n in range(40)]
    assert all(np.shares_memory(kept[0][0], logits) for logits, _ in kept)


def test_a_sampler_of_ones_own_goes_on_from_stream_to_stream(model: Model) -> None:
    """Its state is there to be read between tokens, and draws are those of the sampler alone."""
    sampler = Sampler(temperature=2, top_k=0, seed=5, repeat_penalty=1.2)
    twin = sampler.clone()
    with model.stream([1, 2, 3], sampler=sampler, max_tokens=20, logits=True) as stream:
        for prompt in [1, 2, 3]:
            twin.accept(prompt)
        for n, token in enumerate(stream):
            assert twin.sample(token.logits) == token.id
            twin.accept(token.id)
            assert sampler.state == twin.state
            assert sampler.state["n_draws"] == n + 1
    with pytest.raises(ValueError, match="either it or sampling options"):
        model.stream([1], sampler=sampler, temperature=1)


def test_sampling_options_as_a_value(model: Model) -> None:
    """Keywords overrule them; unknown ones are refused."""
    options = SamplingOptions(temperature=0.7, seed=4)
    assert ids(model, sampling=options) == ids(model, temperature=0.7, seed=4)
    assert ids(model, sampling=options, temperature=0) == ids(model, temperature=0)
    with pytest.raises(ValueError, match=r"logit_bias: .* is not in the vocabulary"):
        model.stream([1], logit_bias={10**6: 1.0})


def test_masks(model: Model) -> None:
    """Anything with allowed() and accept() restricts the stream; its exceptions reach the caller."""

    class Countdown:
        def __init__(self) -> None:
            self.bits = np.zeros((model.n_vocab + 31) // 32, np.uint32)
            self.next = 20

        def allowed(self) -> NDArray[np.uint32]:
            if self.next == 0:
                raise StopAsyncIteration("counted down")
            self.bits[:] = 0
            self.bits[self.next // 32] = 1 << (self.next % 32)
            return self.bits

        def accept(self, token: int) -> None:
            assert token == self.next
            self.next -= 1

    stream = model.stream([1], grammar=Countdown())
    reply = []
    with pytest.raises(StopAsyncIteration, match="counted down"):
        for token in stream:
            reply.append(token.id)
    assert reply == list(range(20, 0, -1))
    with pytest.raises(ValueError, match="not a token that the grammar allows"):
        next(model.stream([1], grammar=Countdown(), sampler=lambda logits, tokens: 3))
    with pytest.raises(TypeError, match="grammar must be GBNF or have"):
        model.stream([1], grammar=3)  # type: ignore[arg-type]


def test_log_probabilities(model: Model) -> None:
    """Of the chosen and of the most likely, against numpy's softmax, whatever the sampler does to the choice."""
    for options in ({"seed": 1}, {"sampler": lambda logits, tokens: 7}, {"logit_bias": {3: 50.0}}, {"temperature": 0}):
        for token in model.stream([1, 2, 3], max_tokens=5, logits=True, logprobs=5, **options):
            x = token.logits.astype(np.float64)
            expected = x - x.max() - np.log(np.exp(x - x.max()).sum())
            assert token.logprob == pytest.approx(expected[token.id], abs=1e-5)
            order = np.argsort(-expected, kind="stable")[:5]
            assert [one for one, _ in token.top_logprobs] == order.tolist()
            assert [p for _, p in token.top_logprobs] == pytest.approx(expected[order], abs=1e-5)
    (token,) = model.stream([1], max_tokens=1)
    assert token.logprob is None
    assert token.top_logprobs == ()
    for logprobs in (-1, 1001):
        with pytest.raises(ValueError, match="logprobs must be 1 to 1000"):
            model.stream([1], logprobs=logprobs)


def slowly(stream: Iterable[Token]) -> Iterator[Token]:
    """Yield from a stream as a caller that is busy between tokens."""
    for one in stream:
        time.sleep(0.002)
        yield one


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 9}, {"seed": 9, "grammar": "root ::= .*", "logprobs": 2}]
)
def test_the_same_text_whether_it_looks_ahead(smollm2: Model, options: dict[str, object]) -> None:
    """A caller that is slow gets the same tokens and stats as one that is not."""
    quick = list(smollm2.stream("Once upon", max_tokens=30, **options))  # type: ignore[arg-type]
    stream = smollm2.stream("Once upon", max_tokens=30, **options)  # type: ignore[arg-type]
    assert list(slowly(stream)) == quick
    assert stream.stats.tokens == len(quick)
    assert stream.stats.stop_reason in (StopReason.MAX_TOKENS, StopReason.EOS)


def test_only_what_was_delivered_counts(model: Model) -> None:
    """The token ahead is in no stats, and its end is not the stream's until it is there."""
    with model.stream([1, 2, 3], max_tokens=10, temperature=0) as stream:
        for n, _ in enumerate(slowly(stream), 1):
            assert stream.stats.tokens == n
            assert (stream.stats.stop_reason is not None) == (n == 10)
    stream = model.stream([1, 2, 3], temperature=0)
    for _ in range(5):
        next(stream)
        time.sleep(0.002)
    stream.close()
    assert stream.stats.tokens == 5
    assert stream.stats.stop_reason == StopReason.CLOSED


def test_leaving_while_it_looks_ahead(model: Model) -> None:
    """Closing here or in another thread, dropping it, or one more token: no thread stays."""
    threads = threading.active_count()
    native = len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 0

    def start() -> Stream:
        stream = model.stream([1, 2, 3], temperature=0)
        for _ in range(4):
            next(stream)
            time.sleep(0.002)
        return stream

    def close_elsewhere(stream: Stream) -> None:
        thread = threading.Thread(target=stream.close)
        thread.start()
        thread.join()

    endings: list[Callable[[Stream], object]] = [Stream.close, lambda stream: None, next, close_elsewhere]
    for _ in range(10):
        for end in endings:
            stream = start()
            end(stream)
            del stream
    assert threading.active_count() == threads
    if native:
        assert len(list(Path("/proc/self/task").iterdir())) <= native + 1


def test_two_streams_that_look_ahead(smollm2: Model) -> None:
    """Each has its own text."""
    alone = [
        [token.id for token in smollm2.stream(text, temperature=0, max_tokens=15)] for text in ("One two", "Rain in")
    ]
    streams = [smollm2.stream(text, temperature=0, max_tokens=15) for text in ("One two", "Rain in")]
    together: list[list[int]] = [[], []]
    for pair in zip(*(slowly(stream) for stream in streams), strict=True):
        for reply, token in zip(together, pair, strict=True):
            reply.append(token.id)
    assert together == alone


CLOSE_IN_HANDLER = """
import signal, sys, threading, time
import overspill

model = overspill.Model(sys.argv[1], n_ctx=4096, n_batch=512, n_threads=1)
other = model.stream([1, 2, 3], temperature=0)
for _ in range(3):
    next(other)
    time.sleep(0.01)  # so that it looks ahead
signal.signal(signal.SIGALRM, lambda *_: other.close())
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
long = [i % 8000 for i in range(4000)]
for token in model.stream(long, temperature=0, max_tokens=3):
    pass
signal.setitimer(signal.ITIMER_REAL, 0)
print(other.stats.stop_reason)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no such timer there")
def test_a_signal_handler_may_close_another_stream(tiny_gpt_oss_path: Path) -> None:
    """Though that one waits for the turn which this thread has."""
    command = [sys.executable, "-c", CLOSE_IN_HANDLER, str(tiny_gpt_oss_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "closed\n", done.stderr[-2000:]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_while_waiting_for_the_step_ahead(gemma: Model) -> None:
    """It reaches the caller from the step that it came in, though that step may come to its end."""
    # A wide nucleus and a grammar of much choice: most of a step is not the graph's, which could be stopped.
    options = {"mirostat": 2, "grammar": "root ::= [ -~]*", "seed": 1}
    for delay_s in (0.02, 0.05, 0.11):
        with gemma.stream("Once upon a time", max_tokens=200, **options) as stream:  # type: ignore[arg-type]
            next(stream)
            timer = threading.Timer(delay_s, lambda: signal.raise_signal(signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                for _ in stream:
                    time.sleep(0.001)  # so that it looks ahead
            timer.join()
        # Closed, if it came during the pause.
        assert stream.stats.stop_reason in (StopReason.INTERRUPTED, StopReason.CLOSED)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_while_it_looks_ahead(gemma: Model) -> None:
    """It arrives as KeyboardInterrupt, between tokens and while waiting for one."""
    for delay in (0.001, 0.02, 0.06):
        timer = threading.Timer(delay + 0.3, lambda: signal.raise_signal(signal.SIGINT))
        stream = gemma.stream("Once upon a time", temperature=0)
        with pytest.raises(KeyboardInterrupt), stream:
            timer.start()
            for _ in stream:
                time.sleep(delay)
        timer.join()
        assert stream.stats.stop_reason == StopReason.INTERRUPTED
    assert len(list(gemma.stream("Hi", max_tokens=2))) == 2


@pytest.mark.slow
def test_leaving_the_program_while_it_looks_ahead(tiny_gpt_oss_path: Path) -> None:
    """The interpreter ends in good order with a step under way."""
    code = (
        "import sys, time, overspill\n"
        "model = overspill.Model(sys.argv[1], n_ctx=512, n_threads=1)\n"
        "stream = model.stream([1, 2, 3])\n"
        "for _ in range(6): next(stream); time.sleep(0.002)\n"
        "keep = [stream]; keep.append(keep)\n"
    )
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code, str(tiny_gpt_oss_path)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
