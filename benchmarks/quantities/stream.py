"""The time of a token of a stream, next to the loops of others and to our own without what is looked at."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import overspill
from quantities import rivals
from quantities.measuring import N_THREADS, Round, Take, Timed, in_own_process, in_turn, llama_cpps_products

if TYPE_CHECKING:
    from upstream_tools import MinimalLoop

PROMPT = "Once upon a time there was a little girl who"
GREEDY: Mapping[str, Any] = {"temperature": 0}
SAMPLINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": GREEDY,
    "top-p 0.95": {"temperature": 0.8, "top_k": 0, "min_p": 0.0, "top_p": 0.95, "seed": 1},
    "argmax in Python": {"sampler": lambda logits, tokens: int(logits.argmax())},
}


def timed_stream(
    model: overspill.Model, prompt: str | Sequence[int], *, max_tokens: int, pause_s: float = 0, **options: Any
) -> Timed:
    """Return the time from token to token of a stream, the first from the call on; the answer are the tokens' ids.

    Parameters
    ----------
    model, prompt, max_tokens, options
        As :meth:`overspill.Model.stream` has them.
    pause_s
        Seconds for which the caller is busy with each token.
    """
    seconds, ids = [], []
    before = time.perf_counter()
    with model.stream(prompt, max_tokens=max_tokens, **options) as stream:
        for token in stream:
            after = time.perf_counter()
            seconds.append(after - before)
            ids.append(token.id)
            before = after
            if pause_s:
                time.sleep(pause_s)
    return Timed(seconds, ids, (stream.stats,))


def after_first(timed: Timed) -> Timed:
    """Return the same without the time of the first token."""
    return replace(timed, seconds=timed.seconds[1:])


def assert_likely(
    model: overspill.Model, prompt: str, ids: Sequence[int], banned: Mapping[int, float] | None = None
) -> None:
    """Assert that each token of a reply is about as likely as the likeliest one; other builds and batches round."""
    from rounding import NATS

    model.reset()
    logits = model.eval(model.tokenize(prompt))
    for i, token in enumerate(ids):
        allowed = logits.copy()
        for end, bias in (banned or {}).items():
            allowed[end] += bias
        assert allowed[token] > allowed.max() - NATS, f"token {i} of {model.detokenize(ids)!r} is not likely"
        logits = model.eval([token])


def loop_over(loop: MinimalLoop, prompt: Sequence[int], n_tokens: int, timed: slice) -> Take:
    """Return what takes the times of a part of the tokens in a minimal loop; the answer are all of them."""
    tokens = loop.greedy(prompt, n_tokens)
    return lambda: Timed(loop.seconds(prompt, tokens)[timed], tokens)


@contextmanager
def token(
    path: Path,
    tools: Path | None = None,
    *,
    n_tokens: int,
    n_threads: int = N_THREADS,
    prompt: Sequence[int] | None = None,
    sampling: Mapping[str, Any] = GREEDY,
    loading: Mapping[str, Any] | None = None,
    placed: Mapping[str, Any] | None = None,
) -> Iterator[Round]:
    """Yield rounds of a token after the first; the rival is a minimal loop, which decodes the same tokens.

    Parameters
    ----------
    path
        The model.
    tools
        llama.cpp's; without them there is no rival.
    n_tokens
        After the first.
    n_threads
        Of either side.
    prompt
        By default the beginning of a story.
    sampling
        Options of the stream; only a greedy one has a rival.
    loading, placed
        The model's placement: options of :class:`overspill.Model` and of the minimal loop.
    """
    n_ctx = max(1024, len(prompt or ()) + n_tokens + 2)
    settings: dict[str, Any] = {"n_ctx": n_ctx, "n_threads": n_threads}
    with ExitStack() as opened:
        if tools is not None:
            opened.enter_context(llama_cpps_products())
        model = opened.enter_context(overspill.Model(path, **settings, **(loading or {})))
        tokens = prompt or model.tokenize(PROMPT)

        def ours() -> Timed:
            return after_first(timed_stream(model, tokens, max_tokens=n_tokens + 1, **sampling))

        minimal_loop = None
        if tools is not None:
            loop = opened.enter_context(rivals.minimal_loop(tools, path, **settings, **(placed or {})))
            minimal_loop = loop_over(loop, tokens, n_tokens + 1, slice(1, None))
        yield in_turn(ours, minimal_loop)


@contextmanager
def token_beside_experts_on_the_cpu(path: Path, tools: Path, *, n_tokens: int) -> Iterator[Round]:
    """Yield rounds of a token of a gpt-oss whose experts are on the CPU, the rest on a GPU that computes on the CPU.

    This process keeps the GPU.
    """
    from upstream_tools import stand_in_gpu

    stand_in_gpu(tools, "GPU0", 1 << 30)
    placed = {"n_gpu_layers": 99, "overrides": [(r"ffn_(gate|up|down)_exps", "CPU")]}
    loading = {"offload": {"default": "GPU0", "experts": "cpu"}}
    with token(path, tools, n_tokens=n_tokens, n_threads=1, loading=loading, placed=placed) as one_round:
        yield one_round


def fresh_token(path: Path, n_tokens: int, sampling: Mapping[str, Any]) -> Timed:
    """Load a model; return the mean time of a token after the first, and the text of the reply, which does not end."""
    with overspill.Model(path, n_ctx=2048, n_threads=N_THREADS) as model:
        banned = dict.fromkeys(ends_of(model), -math.inf)
        options = {**sampling, "logit_bias": banned, "max_tokens": n_tokens + 1}
        timed = after_first(timed_stream(model, "Once upon a time", **options))
        assert len(timed.seconds) == n_tokens
        return Timed([float(np.mean(timed.seconds))], model.detokenize(timed.answer))


def ends_of(model: overspill.Model) -> list[int]:
    """Return the tokens that end a reply."""
    return [token for token in range(model.n_vocab) if model.is_end_of_generation(token)]


@contextmanager
def token_in_own_process(
    path: Path,
    rival: Take,
    *,
    n_tokens: int,
    sampling: Mapping[str, Any] = GREEDY,
    check: Callable[[Any, Any], None] = lambda ours, theirs: None,
) -> Iterator[Round]:
    """Yield rounds of the mean of a token, loaded anew in a process of its own as the rival's program is.

    Where the kernel puts threads and memory makes a factor of two on a tiny model, and some percent on others.
    """
    yield in_turn(lambda: in_own_process(fresh_token, path, n_tokens, sampling), rival, check)


def streams_in_turn(model: overspill.Model, sides: Sequence[Mapping[str, Any]], n_tokens: int) -> Round:
    """Return a round of a token of two streams with other options, ours the first.

    The streams step in turn, since the machine's speed drifts by more than the difference that is looked for. Each
    is the first in half of the rounds, since the place of a context's memory matters. Neither looks ahead, so that a
    step is all of its work.
    """

    def one_round(number: int) -> tuple[Timed, Timed]:
        seconds: tuple[list[float], list[float]] = ([], [])
        ids: tuple[list[int], list[int]] = ([], [])
        order = (0, 1) if number % 2 == 0 else (1, 0)
        streams: dict[int, overspill.Stream] = {}
        with ExitStack() as opened:
            for side in order:
                options = {"max_tokens": n_tokens + 1, "logits": True, **sides[side]}
                streams[side] = opened.enter_context(model.stream("Once upon a time", **options))
                next(streams[side])
            for _ in range(n_tokens):
                for side in order:
                    start = time.perf_counter()
                    token = next(streams[side])
                    seconds[side].append(time.perf_counter() - start)
                    ids[side].append(token.id)
        assert ids[0] == ids[1], "the streams chose other tokens"
        ours, other = (Timed(seconds[i], ids[i], (streams[i].stats,)) for i in (0, 1))
        return ours, other

    return one_round


@contextmanager
def python_sampler(path: Path, *, n_tokens: int) -> Iterator[Round]:
    """Yield rounds of a token that an argmax in Python chooses; the rival is our own greedy sampler."""
    with overspill.Model(path, n_ctx=512, n_threads=N_THREADS) as model:
        yield streams_in_turn(model, (SAMPLINGS["argmax in Python"], GREEDY), n_tokens)


@contextmanager
def traced_experts(path: Path, *, n_tokens: int) -> Iterator[Round]:
    """Yield rounds of a token whose experts are recorded; the rival is the same without that."""
    with overspill.Model(path, offload="cpu", n_ctx=512, n_threads=N_THREADS) as model:
        greedy = {**GREEDY, "logit_bias": dict.fromkeys(ends_of(model), -math.inf)}
        yield streams_in_turn(model, ({**greedy, "experts": True}, greedy), n_tokens)


@contextmanager
def token_beside_a_busy_caller(path: Path, *, n_tokens: int, **options: Any) -> Iterator[Round]:
    """Yield rounds of a token whose caller takes half of its time; the rival is our own with an idle caller."""
    with overspill.Model(path, n_ctx=512, n_threads=N_THREADS) as model:

        def timed(pause_s: float, **options: Any) -> Timed:
            prompt = "Once upon a time"
            return after_first(
                timed_stream(model, prompt, max_tokens=n_tokens + 1, pause_s=pause_s, **GREEDY, **options)
            )

        idle = timed(0)

        def with_idle_caller() -> Timed:
            nonlocal idle
            idle = timed(0)
            return idle

        yield in_turn(lambda: timed(0.5 * float(np.mean(idle.seconds)), **options), with_idle_caller)
