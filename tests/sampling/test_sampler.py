"""A sampler's state, its errors, and the same answer on every instruction set."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overspill import Error, Sampler, _core
from programs import python_environment
from sampling_cases import PLAIN

DIGEST = """
import hashlib, sys
import numpy as np
from overspill import Sampler, SamplingOptions, _core
from sampling_cases import ALONE, LARGE_SIZES, PLAIN, SIZES, rows
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
        environment = python_environment(OVERSPILL_SIMD=simd)
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
from sampling_cases import PLAIN
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
    environment = python_environment()
    with subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            command = [sys.executable, "-c", SAMPLE, str(path)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        finally:
            writer.kill()
    assert done.returncode == 0, done.stderr[-2000:]


def test_bias_outside_of_the_row_is_refused() -> None:
    """Only the row says how many tokens there are."""
    with pytest.raises(ValueError, match="less than the number of logits, 10"):
        Sampler(logit_bias={10: 1.0}).sample(np.zeros(10, np.float32))


@pytest.mark.parametrize("token", [2**31 - 1, 1 << 24])
def test_tokens_that_no_vocabulary_has(token: int) -> None:
    """Refused, since memory is kept for every token up to the largest."""
    sampler = Sampler(repeat_penalty=1.1)
    with pytest.raises(ValueError, match="token must be 0 to 16777215"):
        sampler.accept(token)
    with pytest.raises(ValueError, match="n_draws must be 0 to 4294967296"):
        sampler.state = {**sampler.state, "n_draws": 2**60}
    assert sampler.state["history"] == []
