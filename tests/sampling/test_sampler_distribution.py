"""Which tokens are left and how likely they are, against llama.cpp's own chain and float64 arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model_fixtures import N_THREADS
from overspill import Error, Model, Sampler, SamplingOptions
from sampling_cases import ALONE, LARGE_SIZES, PLAIN, SIZES, mask_of, masked, rows
from sampling_reference import edited, mirostat_survivors, survivors
from sweeps import sweep
from upstream_tools import UpstreamChain


def options_of(random: np.random.Generator, n: int) -> SamplingOptions:
    """Return one sampler on its own, or up to five together."""
    names = list(ALONE)
    chosen = random.choice(names, size=int(random.choice([1, 1, 2, 3, 5])), replace=False)
    keywords: dict[str, Any] = {}
    for name in chosen:
        keywords |= ALONE[name][random.integers(len(ALONE[name]))]
    bias = {token: value for token, value in keywords.get("logit_bias", {}).items() if token < n}
    return replace(PLAIN, **{**keywords, "logit_bias": bias})


def compare(
    case: int,
    x: NDArray[np.float32],
    options: SamplingOptions,
    history: list[int],
    tools: Path,
    allowed: NDArray[np.uint32] | None = None,
) -> str:
    """Compare with llama.cpp, or fail.

    "rounding": float64 sides with us; llama.cpp adds up to 262,144 floats one by one, and cuts a little off the mark.
    """
    upstream = UpstreamChain(tools, options, len(x))
    sampler = Sampler(options)
    for token in history:
        upstream.accept(token)
        sampler.accept(token)
    what = f"case {case}: n={len(x)}, {options}, {len(history)} tokens of history"
    what += "" if allowed is None else ", masked"
    y = edited(masked(x, allowed), options, history)
    if np.isneginf(y).all():
        with pytest.raises(Error, match="no token is left"):
            sampler.sample(x, allowed=allowed)
        return "nothing left"
    ids, p = sampler.distribution(x, allowed=allowed)
    their_ids, their_p, chosen = upstream.sample(masked(x, allowed))
    if options.temperature == 0 and options.dynamic_temperature_range == 0:
        their_ids, their_p = np.array([chosen], np.int32), np.ones(1, np.float32)
    weighty = their_p > 1e-30  # llama.cpp keeps what is impossible in its list
    their_ids, their_p = their_ids[weighty], their_p[weighty]
    kept = p > 1e-30
    ids, p = ids[kept], p[kept]
    assert abs(float(p.astype(np.float64).sum()) - 1) < 1e-5, what
    assert (np.diff(y[ids]) <= 0).all(), f"{what}: not in order"
    their_order = np.argsort(-y[their_ids], kind="stable")
    # Among equal logits llama.cpp keeps any, we the first: so the logits are compared, and the ids where they tell.
    same_set = len(ids) == len(their_ids) and np.array_equal(y[ids], y[their_ids][their_order])
    if same_set and np.abs(p - their_p[their_order]).max() <= 1e-5:
        ours, theirs = set(ids.tolist()), set(their_ids.tolist())
        for token in ours ^ theirs:
            assert (y == y[token]).sum() > 1, f"{what}: {token} is kept by one side only"
        return "equal"
    right_ids, right_p = survivors(y, options)
    right_ids, right_p = right_ids[right_p > 1e-30], right_p[right_p > 1e-30]
    mine, right = np.zeros(len(x)), np.zeros(len(x))
    mine[ids], right[right_ids] = p, right_p
    # Far down a tail of tens of thousands, a token more or less is below single precision.
    off = float((mine + right)[(mine > 0) != (right > 0)].sum())
    assert off <= 5e-6, f"{what}: {len(ids)} are left, not {len(right_ids)}; llama.cpp: {len(their_ids)}"
    assert np.abs(mine - right).max() <= 1e-5, f"{what}: probabilities differ by {np.abs(mine - right).max()}"
    if options.typical_p < 1 and (np.isinf(y).any() or options.top_n_sigma > 0):
        return "undefined"  # llama.cpp's entropy is NaN then: 0 * log(0)
    return "rounding"


@pytest.mark.parametrize("part", sweep(range(10), always=[0]))
def test_same_distribution_as_llama_cpp(upstream_tools: Path, part: int) -> None:
    """10,000 random cases leave the same tokens with the same probabilities, within 1e-5."""
    random = np.random.default_rng(part)
    outcomes: Counter[str] = Counter()
    for case in range(1000):
        n = int(random.choice(LARGE_SIZES) if case % 15 == 0 else random.choice(SIZES))
        options = options_of(random, n)
        history = random.integers(0, n, size=int(random.integers(0, 100))).tolist()
        allowed = mask_of(random, n) if case % 4 == 1 else None
        outcomes[compare(case, rows(random, n), options, history, upstream_tools, allowed)] += 1
    assert outcomes["equal"] >= 900
    assert outcomes["rounding"] <= 25


@pytest.mark.slow
@pytest.mark.parametrize("step", sweep([12, 1], always=[0]))
def test_same_distribution_on_a_models_logits(upstream_tools: Path, gemma_path: Path, step: int) -> None:
    """Each sampler alone, and llama.cpp's default chain, on what Gemma says after tokens of a text."""
    with Model(gemma_path, n_ctx=64, n_threads=N_THREADS, kernels="llama.cpp") as model:
        tokens = model.tokenize("The capital of France is Paris.\n\ndef fib(n):\n    return")
        every = model.eval(tokens, logits="all").copy()
    outcomes: Counter[str] = Counter()
    for position, x in list(enumerate(every))[::step]:
        for keywords in [
            *(one for several in ALONE.values() for one in several),
            {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
        ]:
            outcomes[compare(position, x, replace(PLAIN, **keywords), tokens[: position + 1], upstream_tools)] += 1
    # llama.cpp's sums over all 262,144 are off by 1e-4: it keeps 61,204 tokens of 82,235 at top-p 0.999.
    assert outcomes["equal"] >= 0.8 * outcomes.total()
    assert set(outcomes) == {"equal", "rounding"}


def test_xtc_after_cuts_between_equals(upstream_tools: Path) -> None:
    """Of rounded logits, the cut before XTC falls among many that are alike."""
    random = np.random.default_rng(6)
    outcomes: Counter[str] = Counter()
    for case in range(200):
        n = int(random.choice([257, 4097, 20_000, 32_000]))
        x = (np.round(random.normal(0, 3, n) * 4) / 4).astype(np.float32)
        truncation = {"top_p": float(random.uniform(0.1, 0.99))} if case % 4 else {"top_k": int(random.integers(1, n))}
        threshold = float(random.choice([1e-5, 1e-4, 1e-3, 1e-2]))
        options = replace(PLAIN, xtc_probability=1.0, xtc_threshold=threshold, **truncation)
        outcomes[compare(case, x, options, [], upstream_tools)] += 1
    assert set(outcomes) <= {"equal", "rounding"}
    assert outcomes["equal"] >= 150


@pytest.mark.parametrize("n", LARGE_SIZES)
@pytest.mark.parametrize("tau", [3.0, 8.0])
def test_mirostat_of_large_rows(n: int, tau: float) -> None:
    """Float64 says which tokens stay, but for those within rounding of the limit."""
    random = np.random.default_rng(4)
    for _ in range(9):
        x = rows(random, n)
        options = replace(PLAIN, mirostat=2, mirostat_tau=tau, temperature=float(random.choice([0.7, 1.0])))
        allowed = mask_of(random, n)
        y = masked(x, allowed)
        if np.isneginf(y).all():
            continue
        sampler = Sampler(options)
        ids, p = sampler.distribution(x, allowed=allowed)
        right_ids, right_p, at_limit = mirostat_survivors(y, options)
        mine, right = np.zeros(n), np.zeros(n)
        mine[ids], right[right_ids] = p, right_p
        assert set(np.flatnonzero((mine > 0) != (right > 0))) <= set(at_limit.tolist())
        assert np.abs(mine - right).max() <= 1e-5 + right[at_limit].sum()
        assert sampler.sample(x, allowed=allowed) in {*right_ids.tolist(), *at_limit.tolist()}


@pytest.mark.parametrize("tau", [0.5, 3.0, 8.0])
def test_mirostat(upstream_tools: Path, tau: float) -> None:
    """The first draw is llama.cpp's, and mu learns as the paper says."""
    random = np.random.default_rng(3)
    for case in range(50):
        x = rows(random, int(random.choice(SIZES)))
        options = replace(PLAIN, mirostat=2, mirostat_tau=tau, temperature=float(random.choice([0.7, 1.0])))
        sampler = Sampler(options)
        ids, p = sampler.distribution(x)
        their_ids, their_p, _ = UpstreamChain(upstream_tools, options, len(x)).sample(x)
        their_ids, their_p = their_ids[their_p > 1e-30], their_p[their_p > 1e-30]
        assert np.array_equal(x[ids[p > 1e-30]], np.sort(x[their_ids])[::-1]), case
        assert np.allclose(p[p > 1e-30], np.sort(their_p)[::-1], atol=1e-5), case
        mu = 2 * tau
        for _ in range(20):
            ids, p = sampler.distribution(x)
            chance = dict(zip(ids.tolist(), p.tolist(), strict=True))
            mu -= 0.1 * (-math.log2(chance[sampler.sample(x)]) - tau)
            assert sampler.state["mirostat_mu"] == pytest.approx(mu, abs=1e-3)


@pytest.fixture(scope="module")
def gpt2(vocab_path: Path) -> Iterator[Model]:
    """Return a vocabulary to write sequence breakers in."""
    with Model(vocab_path, vocab_only=True) as model:
        yield model


@pytest.mark.parametrize("breakers", [("\n", ":", '"', "*"), (), ("ba", "cab"), (". The",)])
@pytest.mark.parametrize("n_histories", sweep([15, 60], always=[0]))
def test_dry(upstream_tools: Path, gpt2: Model, breakers: tuple[str, ...], n_histories: int) -> None:
    """The same penalties as llama.cpp's, over histories full of repetitions and breakers."""
    random = np.random.default_rng(5)
    alphabet = [token for text in (" a", "a", "b", "c", "ab", ":", "\n", ".", " The") for token in gpt2.tokenize(text)]
    for _ in range(n_histories):
        options = replace(
            PLAIN,
            dry_multiplier=float(random.choice([0.5, 1.0, 4.0])),
            dry_base=float(random.choice([1.0, 1.75, 3.0])),
            dry_allowed_length=int(random.integers(0, 5)),
            dry_last_n=int(random.choice([-1, 10, 64])),
            dry_sequence_breakers=breakers,
        )
        upstream = UpstreamChain(upstream_tools, options, gpt2.n_vocab, gpt2.path)
        sampler = Sampler(options, model=gpt2)
        for token in random.choice(
            alphabet[: int(random.integers(2, len(alphabet)))], size=int(random.integers(0, 150))
        ):
            upstream.accept(int(token))
            sampler.accept(int(token))
        x = np.zeros(gpt2.n_vocab, np.float32)
        ids, p = sampler.distribution(x)
        their_ids, their_p, _ = upstream.sample(x)
        ours, theirs = np.zeros(gpt2.n_vocab), np.zeros(gpt2.n_vocab)
        ours[ids], theirs[their_ids] = p, their_p
        assert np.allclose(ours, theirs, atol=1e-9, rtol=1e-3), options


def test_dry_of_a_long_history(gpt2: Model) -> None:
    """A token costs what the history is long, not that times the number of breakers, which would be minutes here."""
    options = replace(PLAIN, dry_multiplier=1.0, dry_last_n=-1, dry_sequence_breakers=("\n", "e", ". The"))
    assert len(gpt2.dry_breakers(options.dry_sequence_breakers)) > 1000
    sampler = Sampler(options, model=gpt2)
    words = [token for text in (" a", " b", " c", " d") for token in gpt2.tokenize(text)]
    random = np.random.default_rng(3)
    for token in [*random.choice(words, size=200_000), *words[:3], *words[:3]]:
        sampler.accept(int(token))
    x = np.zeros(gpt2.n_vocab, np.float32)
    for _ in range(100):
        ids, p = sampler.distribution(x)
    # Nothing breaks the history, so that each of its words continues a repetition.
    assert set(words) <= {int(token) for token in ids[np.argsort(p)][: len(words)]}
    (newline,) = gpt2.tokenize("\n")
    sampler.accept(newline)
    assert len(set(sampler.distribution(x)[1].tolist())) == 1


def test_xtc_after_a_cut_between_equals() -> None:
    """Top-p may keep a part of equally likely tokens; XTC works on that part alone."""
    random = np.random.default_rng(0)
    x = np.concatenate([random.uniform(0.5, 1.5, 6000), np.zeros(8000), np.full(6000, -8.0)]).astype(np.float32)
    for temperature in (0.0, 1.0):
        options = replace(PLAIN, temperature=temperature, top_p=0.8, xtc_probability=1.0, xtc_threshold=1e-5)
        right, _ = survivors(x, options)
        assert Sampler(options).sample(x) in right
        assert np.array_equal(x[Sampler(options).distribution(x)[0]], x[right])


def test_dynamic_temperature_of_one_token() -> None:
    """Which is all there is, or all that XTC leaves of a row that is alike."""
    dynamic = replace(PLAIN, dynamic_temperature_range=0.5)
    xtc = replace(dynamic, xtc_probability=1.0, xtc_threshold=0.01)
    alike = np.full(16, 1.5, np.float32)
    penalties = replace(xtc, presence_penalty=0.5)
    for x, options in ((np.zeros(1, np.float32), dynamic), (alike, xtc), (alike, penalties)):
        right, p = survivors(edited(x, options, list(range(len(x)))), options)
        sampler = Sampler(options)
        for token in range(len(x)):
            sampler.accept(token)
        ids, ours = sampler.distribution(x)
        assert (ids.tolist(), ours.tolist()) == (right.tolist(), p.tolist())
        assert [sampler.sample(x)] == right.tolist()
