"""The sampler against llama.cpp's own chain, float64 arithmetic, and itself on every instruction set."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray

from overspill import Error, Model, Sampler, SamplingOptions, _core
from overspill.sampling.options import SamplingKeywords
from programs import python_environment
from sampling_reference import edited, mirostat_survivors, survivors
from upstream_tools import UpstreamChain

PLAIN = SamplingOptions(temperature=1, top_k=0, top_p=1, min_p=0, seed=1)

# Each sampler on its own; combinations are drawn from all.
ALONE: dict[str, list[dict[str, Any]]] = {
    "temperature": [{"temperature": t} for t in (0.0, 0.1, 0.8, 1.0, 3.0)],
    "dynamic": [
        {"dynamic_temperature_range": r, "dynamic_temperature_exponent": e}
        for r, e in ((0.5, 1.0), (1.0, 2.0), (2.0, 0.5))
    ],
    "top_k": [{"top_k": k} for k in (1, 2, 40, 1000, 10**6)],
    "top_p": [{"top_p": p} for p in (0.0, 0.1, 0.5, 0.95, 0.999)],
    "min_p": [{"min_p": p} for p in (0.001, 0.05, 0.5, 1.0)],
    "typical": [{"typical_p": p} for p in (0.2, 0.5, 0.95)],
    "sigma": [{"top_n_sigma": n} for n in (0.5, 1.0, 2.5)],
    "xtc": [{"xtc_probability": 1.0, "xtc_threshold": t} for t in (0.01, 0.1, 0.3)],
    "penalties": [
        {"repeat_penalty": 1.3, "repeat_last_n": -1},
        {"frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"repeat_penalty": 0.8, "frequency_penalty": -0.3, "repeat_last_n": 8},
    ],
    "bias": [{"logit_bias": {0: 3.0, 3: -math.inf, 6: -1.5}}, {"logit_bias": {5: 100.0}}],
}
SIZES = [7, 16, 33, 255, 256, 257, 1000, 4097]
LARGE_SIZES = [32000, 201088, 262144]


def rows(random: np.random.Generator, n: int) -> NDArray[np.float32]:
    """Return logits of one of the shapes that make trouble, or of a model's."""
    shape = random.choice(["normal", "flat", "peaked", "ties", "equal", "infinite", "one", "offset", "zipf"])
    x = random.normal(0, 3, n)
    if shape == "flat":
        x = random.normal(0, 0.3, n)
    elif shape == "peaked":
        x[random.integers(n, size=min(n, 5))] += random.uniform(5, 25, min(n, 5))
    elif shape == "ties":
        x = np.round(x)
    elif shape == "equal":
        x[:] = 1.5
    elif shape == "infinite":
        x[random.random(n) < 0.5] = -math.inf
        x[random.integers(n)] = 1.0
    elif shape == "one":
        x[:] = -math.inf
        x[random.integers(n)] = -3.0
    elif shape == "offset":
        x += 500
    elif shape == "zipf":
        x = -np.log(random.permutation(n) + 1.0) * random.uniform(0.8, 2.5)
    return x.astype(np.float32)


def options_of(random: np.random.Generator, n: int) -> SamplingOptions:
    """Return one sampler on its own, or up to five together."""
    names = list(ALONE)
    chosen = random.choice(names, size=int(random.choice([1, 1, 2, 3, 5])), replace=False)
    keywords: dict[str, Any] = {}
    for name in chosen:
        keywords |= ALONE[name][random.integers(len(ALONE[name]))]
    bias = {token: value for token, value in keywords.get("logit_bias", {}).items() if token < n}
    return replace(PLAIN, **{**keywords, "logit_bias": bias})


def mask_of(random: np.random.Generator, n: int) -> NDArray[np.uint32]:
    """Return the bits of a few allowed tokens, or of most."""
    allowed = random.random(n) < random.choice([0.02, 0.5, 0.98])
    allowed[random.integers(n)] = True
    return np.packbits(np.pad(allowed, (0, -n % 32)), bitorder="little").view("<u4").astype(np.uint32)


def masked(x: NDArray[np.float32], allowed: NDArray[np.uint32] | None) -> NDArray[np.float32]:
    """Return the logits with -inf where a token is not allowed."""
    if allowed is None:
        return x
    bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), bitorder="little")[: len(x)]
    return np.where(bits, x, -np.inf).astype(np.float32)


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


@pytest.mark.parametrize("part", range(10))
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


def test_same_distribution_on_a_models_logits(upstream_tools: Path, gemma: Model) -> None:
    """Each sampler alone, and llama.cpp's default chain, on what Gemma says after each token of a text."""
    gemma.reset()
    tokens = gemma.tokenize("The capital of France is Paris.\n\ndef fib(n):\n    return")
    every = gemma.eval(tokens, logits="all").copy()
    outcomes: Counter[str] = Counter()
    for position, x in enumerate(every):
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
def test_dry(upstream_tools: Path, gpt2: Model, breakers: tuple[str, ...]) -> None:
    """The same penalties as llama.cpp's, over histories full of repetitions and breakers."""
    random = np.random.default_rng(5)
    alphabet = [token for text in (" a", "a", "b", "c", "ab", ":", "\n", ".", " The") for token in gpt2.tokenize(text)]
    for _ in range(60):
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


def check_draws(
    sampler: Sampler,
    x: NDArray[np.float32],
    history: list[int],
    allowed: NDArray[np.uint32] | None = None,
    n_draws: int = 20_000,
) -> None:
    """Compare draws with float64's probabilities: chi-square at 1 in 10,000, cells of at least ten expected draws."""
    options = sampler.options
    y = edited(masked(x, allowed), options, history)
    if options.mirostat:
        ids, p, _ = mirostat_survivors(y, options)
    else:
        ids, p = survivors(y, options)
    counts = Counter(sampler.sample(x, allowed=allowed) for _ in range(n_draws))
    assert set(counts) <= set(ids.tolist())
    expected = p * n_draws
    observed = np.array([counts[int(token)] for token in ids], np.float64)
    # What is unlikely is pooled, by likelihood: tokens alike would be wronged alike.
    pool = np.where(expected >= 10, np.arange(len(ids)), len(ids) + (np.cumsum(expected) // 50).astype(np.int64))
    _, cell = np.unique(pool, return_inverse=True)
    cells = np.stack([np.bincount(cell, observed), np.bincount(cell, expected)])
    enough = cells[1] >= 10
    o, e = np.column_stack([cells[:, enough], cells[:, ~enough].sum(axis=1)])
    chi_square = float(((o - e) ** 2 / np.maximum(e, 1e-9)).sum())
    degrees = max(len(e) - 1, 1)
    # Wilson and Hilferty's cube root brings chi-square close to a normal distribution.
    z = ((chi_square / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / math.sqrt(2 / (9 * degrees))
    assert z < 3.72


DRAWS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.9, "temperature": 0.7},
    {"top_k": 20},
    {"min_p": 0.1},
    {"temperature": 1.7},
    {"typical_p": 0.8},
    {"logit_bias": {1: 2.0}},
    {"xtc_probability": 1.0, "xtc_threshold": 0.02},
    {"top_p": 0.95, "xtc_probability": 1.0, "xtc_threshold": 0.005},
    {"mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.0},
    {"dynamic_temperature_range": 0.8},
    {"repeat_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.2},
]


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("keywords", DRAWS, ids=str)
@pytest.mark.parametrize("n", [50, 5000])
def test_draws_are_as_likely_as_they_should_be(keywords: dict[str, Any], n: int, with_mask: bool) -> None:
    """Each sampler alone, also among a part of the tokens."""
    random = np.random.default_rng(8)
    x = random.normal(0, 2, n).astype(np.float32)
    history = random.integers(0, n, 30).tolist()
    sampler = Sampler(replace(PLAIN, **keywords))
    for token in history:
        sampler.accept(token)
    check_draws(sampler, x, history, mask_of(np.random.default_rng(1), n) if with_mask else None)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("keywords", [{}, {"top_p": 0.6}, {"top_p": 0.95}, {"min_p": 0.01}], ids=str)
def test_draws_from_large_rows(gemma: Model, keywords: dict[str, Any], temperature: float) -> None:
    """Two hundred thousand tokens nearly alike, and what a model says."""
    flat = np.random.default_rng(2).normal(0, 1, 201_088).astype(np.float32)
    gemma.reset()
    says = gemma.eval(gemma.tokenize("Once upon a")).copy()
    for x in (flat, says):
        check_draws(Sampler(replace(PLAIN, temperature=temperature, **keywords)), x, [], n_draws=8_000)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_wide_nucleus_is_drawn_from_evenly(temperature: float) -> None:
    """No token gets what rejected ones had: chi-square over tokens by their place in a block, at 1 in 10,000."""
    n, n_draws = 8192, 60_000
    x = np.random.default_rng(0).normal(0, 1, n).astype(np.float32)
    sampler = Sampler(replace(PLAIN, temperature=temperature, top_p=0.7))
    ids, p = sampler.distribution(x)
    # Cells: the last kept token of each block, the one before it, and so on.
    order = np.sort(ids)
    from_the_end = np.concatenate(
        [np.arange(len(block))[::-1] for block in np.split(order, np.flatnonzero(np.diff(order // 256)) + 1)]
    )
    cell = dict(zip(order.tolist(), np.minimum(from_the_end, 20).tolist(), strict=True))
    expected, observed = np.zeros(21), np.zeros(21)
    np.add.at(expected, [cell[token] for token in ids.tolist()], p.astype(np.float64) * n_draws)
    np.add.at(observed, [cell[sampler.sample(x)] for _ in range(n_draws)], 1)
    assert ((observed - expected) ** 2 / expected).sum() < 52.4  # 20 degrees of freedom


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


DIGEST = """
import hashlib, sys
import numpy as np
from overspill import Sampler, SamplingOptions, _core
from test_sampler import ALONE, LARGE_SIZES, PLAIN, SIZES, rows
from dataclasses import replace
digest = hashlib.sha256()
random = np.random.default_rng(11)
for n in [*SIZES, *LARGE_SIZES]:
    x = rows(random, n)
    bits = random.integers(0, 2**32, (n + 31) // 32, dtype=np.uint32)
    bits[0] |= 1 << int(x[:7].argmax())
    for keywords in [{}, *(one for several in ALONE.values() for one in several), {"mirostat": 2}]:
        sampler = Sampler(replace(PLAIN, **keywords))
        for allowed in (None, bits):
            for _ in range(3):
                try:
                    token = sampler.sample(x, allowed=allowed)
                except Exception as error:
                    digest.update(str(error).encode())
                    break
                sampler.accept(token)
                digest.update(token.to_bytes(4, "little"))
            if n < 5000:
                try:
                    ids, p = sampler.distribution(x, allowed=allowed)
                except Exception:
                    continue
                digest.update(ids.tobytes() + p.tobytes())
print(_core.simd(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_answer() -> None:
    """Draws and probabilities to the bit, in processes of their own; and a name that is none is refused."""

    def run(simd: str) -> subprocess.CompletedProcess[str]:
        environment = python_environment(Path(__file__).parent, OVERSPILL_SIMD=simd)
        return subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True)

    refused = run("mmx")
    assert "OVERSPILL_SIMD must be one of scalar" in refused.stderr
    names = refused.stderr.split("one of ")[1].split(" on this")[0].split(", ")
    assert names[-1] == _core.simd() or "OVERSPILL_SIMD" in os.environ
    answers = {name: run(name) for name in names}
    assert all(done.returncode == 0 for done in answers.values()), answers
    assert {name: done.stdout.split()[0] for name, done in answers.items()} == {name: name for name in names}
    assert len({done.stdout.split()[1] for done in answers.values()}) == 1


def test_a_state_goes_on_where_it_was_saved() -> None:
    """As JSON, by pickle, and as a clone; reset() starts over."""
    random = np.random.default_rng(1)
    x = random.normal(0, 2, 500).astype(np.float32)
    sampler = Sampler(temperature=1.5, top_k=0, repeat_penalty=1.5, xtc_probability=0.5, seed=7)

    def draw(one: Sampler, n: int) -> list[int]:
        tokens = []
        for _ in range(n):
            tokens.append(one.sample(x))
            one.accept(tokens[-1])
        return tokens

    first = draw(sampler, 100)
    saved = json.loads(json.dumps(sampler.state))
    assert len(saved["history"]) == 64
    clone, pickled = sampler.clone(), pickle.loads(pickle.dumps(sampler))
    other = Sampler(sampler.options)
    other.state = saved
    after = draw(sampler, 50)
    assert draw(clone, 50) == draw(pickled, 50) == draw(other, 50) == after
    sampler.reset()
    assert draw(sampler, 150) == first + after
    assert draw(Sampler(replace(sampler.options, seed=8)), 150) != first + after
    with pytest.raises(ValueError, match="state must be"):
        sampler.state = {"seed": 1}


def test_what_cannot_be_drawn_from_is_an_error() -> None:
    """Never a random token; and the sampler works afterwards."""
    good = np.zeros(300, np.float32)
    for sampler in (
        Sampler(temperature=0),
        Sampler(PLAIN),
        Sampler(top_k=5),
        Sampler(mirostat=2),
        Sampler(typical_p=0.5),
    ):
        for token in (0, 17, 299):
            for value in (math.nan, math.inf):
                bad = good.copy()
                bad[token] = value
                with pytest.raises(Error, match="not numbers"):
                    sampler.sample(bad)
                with pytest.raises(Error, match="not numbers"):
                    sampler.distribution(bad)
        with pytest.raises(Error, match="not numbers"):
            sampler.sample(np.full(300, -math.inf, np.float32))
        with pytest.raises(Error, match="no token is left"):
            sampler.sample(good, allowed=np.zeros(10, np.uint32))
        assert 0 <= sampler.sample(good) < 300
    banned = Sampler(temperature=0, logit_bias=dict.fromkeys(range(299), -math.inf))
    assert banned.sample(good) == 299


def test_masks() -> None:
    """A token without its bit is never drawn; a mask that is too short allows no more than it has."""
    x = np.arange(70, dtype=np.float32)
    bits = np.zeros(3, np.uint32)
    bits[[0, 1]] = 1 << 5, 1 << 31
    assert Sampler(temperature=0).sample(x, allowed=bits) == 63
    assert Sampler(temperature=0).sample(x, allowed=bits[:1]) == 5
    assert Sampler(temperature=0).sample(x, allowed=bits.view(np.int32)) == 63
    ids, _ = Sampler(PLAIN).distribution(x, allowed=bits)
    assert ids.tolist() == [63, 5]
    assert Sampler(temperature=0, logit_bias={69: 9.0, 5: 100.0}).sample(x, allowed=bits) == 5
    for allowed in (
        np.zeros(3),
        np.zeros((3, 1), np.uint32),
        [1, 2, 3],
        np.zeros(6, np.uint32)[::2],
        np.zeros(0, np.uint32),
    ):
        with pytest.raises(TypeError, match="allowed must be"):
            Sampler(PLAIN).sample(x, allowed=allowed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logits", "error", "text"),
    [
        (np.zeros(5), TypeError, "float32, not float64"),
        (np.zeros((2, 5), np.float32), ValueError, "one contiguous row"),
        (np.zeros(10, np.float32)[::2], ValueError, "one contiguous row"),
        (np.zeros(0, np.float32), ValueError, "one contiguous row"),
        ([1.0, 2.0], TypeError, "a numpy array of float32, not list"),
    ],
)
def test_other_arrays_are_refused(logits: Any, error: type[Exception], text: str) -> None:
    """One line that says what is wanted."""
    with pytest.raises(error, match=text):
        Sampler(PLAIN).sample(logits)


def test_read_only_rows_are_left_alone() -> None:
    """The sampler edits beside the row, also where memory cannot be written to."""
    x = np.frombuffer(np.random.default_rng(2).normal(0, 1, 400).astype(np.float32).tobytes(), np.float32)
    before = x.copy()
    sampler = Sampler(repeat_penalty=2.0, logit_bias={3: 5.0}, xtc_probability=1.0, top_k=0, seed=1)
    for _ in range(50):
        sampler.accept(sampler.sample(x))
    assert np.array_equal(x, before)


def test_two_threads_at_once_are_told_so() -> None:
    """They get an Error or an answer, and nothing is damaged."""
    sampler = Sampler(temperature=1, top_k=0, top_p=0.9, repeat_penalty=1.1, seed=1)
    x = np.random.default_rng(4).normal(0, 1, 50_000).astype(np.float32)
    errors: list[Exception] = []

    def work() -> None:
        for _ in range(200):
            try:
                sampler.accept(sampler.sample(x))
            except Error as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("in use by another thread" in str(error) for error in errors)
    assert 0 <= sampler.sample(x) < len(x)


WRITE = """
import math, os, sys
import numpy as np
row = np.memmap(sys.argv[1], np.float32)
random = np.random.default_rng(0)
n = len(row)
kinds = [random.normal(0, 3, n), random.normal(-50, 1, n), np.full(n, -math.inf), np.full(n, math.nan), np.zeros(n)]
print("writing", flush=True)
parent = os.getppid()
while os.getppid() == parent:
    for kind in kinds:
        row[:] = kind
"""
SAMPLE = """
import sys
from dataclasses import replace
import numpy as np
from overspill import Error, Sampler
from test_sampler import PLAIN
row = np.asarray(np.memmap(sys.argv[1], np.float32))
for keywords in [
    *({"top_p": p, "temperature": t} for p in (0.0, 0.3, 0.9) for t in (0.0, 1.0)),
    *({"top_k": 40}, {"typical_p": 0.5}, {"top_n_sigma": 1.0}, {"min_p": 0.05}, {"mirostat": 2}),
    *({"xtc_probability": 1.0, "xtc_threshold": t} for t in (0.0, 0.01)),
    *({"dynamic_temperature_range": 0.5}, {"top_p": 0.9, "min_p": 0.01}),
]:
    sampler = Sampler(replace(PLAIN, **keywords))
    for _ in range(500):
        try:
            assert 0 <= sampler.sample(row) < len(row)
        except Error as error:
            assert "the logits" in str(error)
    assert 0 <= sampler.sample(np.zeros(1000, np.float32)) < 1000
"""


def test_a_row_that_changes_meanwhile(tmp_path: Path) -> None:
    """Another process writes to it: a token or an Error comes out, and nothing is read that is not there."""
    path = tmp_path / "row"
    np.zeros(20_000, np.float32).tofile(path)
    environment = python_environment(Path(__file__).parent)
    with subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            command = [sys.executable, "-c", SAMPLE, str(path)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        finally:
            writer.kill()
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be 0 or more"),
        ({"dynamic_temperature_range": math.inf}, ValueError, "dynamic_temperature_range must be 0 or more"),
        ({"dynamic_temperature_exponent": math.nan}, ValueError, "dynamic_temperature_exponent must be finite"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_k": 2**40}, ValueError, "top_k must be"),
        ({"typical_p": 1.1}, ValueError, "typical_p must be 0 to 1"),
        ({"top_n_sigma": -1}, ValueError, "top_n_sigma must be 0 or more"),
        ({"xtc_probability": 2}, ValueError, "xtc_probability must be 0 to 1"),
        ({"xtc_threshold": -1}, ValueError, "xtc_threshold must be 0 to 1"),
        ({"dry_multiplier": -1}, ValueError, "dry_multiplier must be 0 or more"),
        ({"dry_base": 0.5}, ValueError, "dry_base must be 1 or more"),
        ({"dry_allowed_length": -1}, ValueError, "dry_allowed_length must be at least 0"),
        ({"dry_last_n": -2}, ValueError, "dry_last_n must be at least -1"),
        ({"dry_sequence_breakers": "ab"}, TypeError, "dry_sequence_breakers must be strings"),
        ({"dry_sequence_breakers": [""]}, ValueError, "must not contain an empty string"),
        ({"dry_multiplier": 1}, ValueError, "need a model"),
        ({"mirostat": 1}, ValueError, "mirostat must be 0 or 2"),
        ({"mirostat_tau": -1}, ValueError, "mirostat_tau must be 0 or more"),
        ({"mirostat_eta": math.nan}, ValueError, "mirostat_eta must be 0 or more"),
        ({"logit_bias": {-1: 1.0}}, ValueError, "logit_bias must be at least 0"),
        ({"logit_bias": {1: math.nan}}, ValueError, "logit_bias: a value must be finite or -inf"),
        ({"logit_bias": {1: math.inf}}, ValueError, "logit_bias: a value must be finite or -inf"),
        ({"seed": 2**32 - 1}, ValueError, "seed must be 0 to 4294967294"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"warmth": 1}, TypeError, "no sampling option 'warmth'"),
    ],
    ids=str,
)
def test_bad_options(keywords: dict[str, Any], error: type[Exception], text: str) -> None:
    """Each is refused with its name and its range."""
    with pytest.raises(error, match=text):
        Sampler(**keywords)


def test_bias_outside_of_the_row_is_refused() -> None:
    """Only the row says how many tokens there are."""
    with pytest.raises(ValueError, match="less than the number of logits, 10"):
        Sampler(logit_bias={10: 1.0}).sample(np.zeros(10, np.float32))


def test_options_are_values() -> None:
    """Frozen, comparable, hashable, and spelled out alike for type checkers."""
    options = SamplingOptions(temperature=1, logit_bias={3: 1})
    assert options == SamplingOptions(temperature=1.0, logit_bias={3: 1.0})
    assert hash(options) == hash(replace(options))
    assert str(options) == "temperature 1 · top_k 40 · top_p 0.95 · min_p 0.05 · logit_bias {3: 1.0}"
    with pytest.raises(FrozenInstanceError):
        options.temperature = 2  # type: ignore[misc]
    assert list(get_type_hints(SamplingKeywords)) == [field.name for field in fields(SamplingOptions)]


def test_one_set_of_defaults() -> None:
    """What the core takes for an option that is not given is what Python says."""
    for name, value in _core.default_sampling().items():
        assert getattr(SamplingOptions(), name) == pytest.approx(value, abs=1e-7), name


@pytest.mark.parametrize("token", [2**31 - 1, 1 << 24])
def test_tokens_that_no_vocabulary_has(token: int) -> None:
    """Refused, since memory is kept for every token up to the largest."""
    sampler = Sampler(repeat_penalty=1.1)
    with pytest.raises(ValueError, match="token must be 0 to 16777215"):
        sampler.accept(token)
    with pytest.raises(ValueError, match="n_draws must be 0 to 4294967296"):
        sampler.state = {**sampler.state, "n_draws": 2**60}
    assert sampler.state["history"] == []


def test_recommendations_of_a_file() -> None:
    """Keys of the GGUF's metadata become options; nonsense is passed over."""
    metadata = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 64,
        "general.sampling.penalty_repeat": -3.0,
        "general.sampling.min_p": "none",
    }
    assert SamplingOptions.from_metadata(metadata.get) == SamplingOptions(temperature=0.6, top_k=64)
