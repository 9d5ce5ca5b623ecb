"""Sampling options and rows of logits of every kind: a token that is allowed, or an error that names the option."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuzz.mutators import NUMBERS, TEXTS, any_json
from fuzz.targets.gguf_files import check_message
from overspill import Error, Sampler, SamplingOptions

__all__ = ["Sampling"]

_NAMES = tuple(option.name for option in fields(SamplingOptions))
_SANE = {"dry_sequence_breakers": (), "seed": 7}


@dataclass(frozen=True)
class Draw:
    """Options, and the row they are for."""

    options: dict[str, Any]
    row: NDArray[np.float32]
    allowed: NDArray[np.uint32] | None
    state: Any


class Sampling:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        """Need nothing."""

    def make(self, random: Random) -> Draw:
        """Return options, most of them in their ranges."""
        options: dict[str, Any] = dict(_SANE)
        for name in random.sample(_NAMES, random.randrange(8)):
            if random.random() < 0.6:
                options[name] = random.choice(
                    (random.uniform(0, 1.5), random.uniform(0, 100), random.randrange(100), 0, 1)
                )
            else:
                options[name] = random.choice((random.choice(NUMBERS), random.choice(TEXTS), any_json(random)))
        if random.random() < 0.3:
            options["logit_bias"] = {
                random.choice((0, 3, 7, random.choice(NUMBERS))): random.choice(NUMBERS) for _ in "abc"
            }
        for name in ("top_k", "mirostat", "repeat_last_n", "dry_allowed_length", "dry_last_n"):
            if isinstance(options.get(name), float) and options[name] == options[name] and random.random() < 0.8:
                options[name] = int(max(-1, min(options[name], 2**31 - 1)))
        if isinstance(options.get("mirostat"), int) and random.random() < 0.9:
            options["mirostat"] = random.choice((0, 2))
        n = random.choice((1, 2, 5, 17, 255, 256, 257, 300, 1000, 9001))
        state = np.random.default_rng(random.getrandbits(32))
        row = np.asarray(state.standard_normal(n) * random.choice((0, 1e-30, 1, 4, 100, 1e30)), np.float32)
        for _ in range(random.choice((0, 0, 0, 1, 3, n))):
            row[random.randrange(n)] = random.choice((-np.inf, -np.inf, np.inf, np.nan, 0, 3.4e38, -3.4e38, 1e-45))
        words = -(-n // 32)
        allowed = None
        if random.random() < 0.3:
            allowed = np.asarray(state.integers(0, 2**32, words, np.uint64), np.uint32) & np.uint32(
                random.choice((0, 1, 2**32 - 1))
            )
        return Draw(options, row, allowed, None if random.random() < 0.8 else any_json(random))

    def check(self, case: Draw) -> None:
        """Draw, accept and go on."""
        try:
            sampler = Sampler(**case.options)
        except (ValueError, TypeError) as error:
            check_message(error)
            return
        before = case.row.copy()
        for _ in range(3):
            try:
                token = sampler.sample(case.row, allowed=case.allowed)
            except (Error, ValueError) as error:
                if isinstance(error, Error):
                    check_message(error)
                break
            assert 0 <= token < len(case.row), f"the token {token} of {len(case.row)}"
            assert case.row[token] > -np.inf, "a token at -inf"
            if case.allowed is not None:
                assert case.allowed[token // 32] >> np.uint32(token % 32) & 1, "a token that is not allowed"
            sampler.accept(token)
        assert np.array_equal(before, case.row, equal_nan=True), "the row was written to"
        if case.state is not None:
            try:
                sampler.state = case.state
            except (ValueError, TypeError):
                return
            sampler.clone()
