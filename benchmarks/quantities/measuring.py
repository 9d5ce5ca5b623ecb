"""Measure both sides of a quantity in turn, and say what follows from the times.

A quantity is a function that opens what it needs for a ``with`` block and yields a :data:`Round`. Like all modules of
this folder it uses overspill's public names alone, and a rival's only where one is asked for: the comparison of
revisions runs it with packages of other revisions.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import overspill

N_THREADS = 2

# A dozen rounds at 95 % would show a difference that is not there in every second run. At 99 % one run in nine would,
# if the least change counted; but below 1 % not even a true difference need be the code's: where the linker puts it is
# enough.
CONFIDENCE = 0.99
LEAST_CHANGE = 0.01

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Models:
    """The files of models."""

    gemma: Path
    tiny_gpt_oss: Path
    gpt_oss_120b_header: Path
    """A file without weights."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One side of one round."""

    seconds: Sequence[float] | NDArray[np.float64]
    """The time of each unit of work, such as a token."""
    answer: Any = None
    """The tokens or other values that came out, as JSON can hold them."""
    stats: Sequence[overspill.Stats] = ()
    """The counters of the streams that were timed."""

    @property
    def in_llama_s(self) -> float:
        """The seconds of a token within ``llama_decode`` and waiting for it; the median of all streams."""
        parts = [one.breakdown for one in self.stats]
        return statistics.median((spent.decode_s + spent.sync_s) / spent.tokens for spent in parts)

    @property
    def in_stream_s(self) -> float:
        """The seconds of a token within the stream, the caller's left out; the median of all streams."""
        return statistics.median(one.decode_s / one.breakdown.tokens for one in self.stats)


Take: TypeAlias = Callable[[], Timed]
"""Measures one side once."""
Round: TypeAlias = Callable[[int], tuple[Timed, ...]]
"""Measures our side and the rival's, if there is one, and checks their answers; given the number of the round."""
Quantity: TypeAlias = Callable[[], AbstractContextManager[Round]]


def assert_same(ours: object, rivals: object) -> None:
    """Assert that both sides answer the same."""
    assert ours == rivals, f"the sides answer differently: {ours}, {rivals}"


def in_turn(ours: Take, rival: Take | None = None, check: Callable[[Any, Any], None] = assert_same) -> Round:
    """Return a round in which each side is measured once; either side is the first in every other round."""

    def one_round(number: int) -> tuple[Timed, ...]:
        if rival is None:
            return (ours(),)
        sides = (ours, rival)
        order = (0, 1) if number % 2 == 0 else (1, 0)
        timed = {side: sides[side]() for side in order}
        check(timed[0].answer, timed[1].answer)
        return timed[0], timed[1]

    return one_round


@contextmanager
def llama_cpps_products() -> Iterator[None]:
    """Have models that are loaded meanwhile multiply as a rival does: what differs then is everything else."""
    with patch.dict(os.environ, OVERSPILL_KERNELS="llama.cpp"):
        yield


class Pair(NamedTuple):
    """Seconds of a unit of work: ours and the rival's, which is NaN where there is none."""

    ours: float
    rival: float

    @property
    def ratio(self) -> float:
        """Our seconds over the rival's."""
        return self.ours / self.rival


@dataclass(frozen=True, slots=True)
class Measured:
    """All rounds of a quantity that count."""

    ours: tuple[Timed, ...]
    rival: tuple[Timed, ...]
    """Round by round, as ours; empty where there is none."""
    loads: int = 1

    @property
    def best(self) -> Pair:
        """The mean of a unit in the fastest round of each side: other programs only slow down."""
        return self._pair(lambda rounds: min(float(np.mean(timed.seconds)) for timed in rounds))

    @property
    def median(self) -> Pair:
        """The median over the units of the median over the rounds: units differ, such as tokens by their depth."""
        return self._pair(lambda rounds: float(np.median(np.median([timed.seconds for timed in rounds], axis=0))))

    @property
    def medians_by_load(self) -> list[Pair]:
        """The same for the rounds of each load alone."""
        n = len(self.ours) // self.loads
        return [Measured(self.ours[i : i + n], self.rival[i : i + n]).median for i in range(0, len(self.ours), n)]

    def _pair(self, statistic: Callable[[Sequence[Timed]], float]) -> Pair:
        return Pair(statistic(self.ours), statistic(self.rival) if self.rival else float("nan"))


def measure(quantity: Quantity, *, rounds: int, loads: int = 1, warm_up: bool = True) -> Measured:
    """Return ``loads`` times ``rounds`` rounds of a quantity.

    Parameters
    ----------
    quantity
        Opened once for each load: the place of its memory makes some percent of a model's speed.
    rounds
        How many of them count, for each load.
    loads
        How often everything is opened.
    warm_up
        Begin each load with a round that does not count.
    """
    counted: list[tuple[Timed, ...]] = []
    for load in range(loads):
        with quantity() as one_round:
            if warm_up:
                one_round(load + 1)
            counted += [one_round(load + number) for number in range(rounds)]
    ours, *rivals = zip(*counted, strict=True)
    return Measured(ours, rivals[0] if rivals else (), loads)


def call_time(work: Callable[[], object], n: int, *, calls: int = 1) -> float:
    """Return the seconds of a call: the median of ``n`` times, each of which is the mean of ``calls`` of them."""
    times = []
    for _ in range(n):
        start = time.perf_counter_ns()
        for _ in range(calls):
            work()
        times.append((time.perf_counter_ns() - start) / calls / 1e9)
    return statistics.median(times)


def in_own_process(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Return what a module's function returns in a process that is there for this call alone.

    The process takes back what it has opened: a device cannot be closed in another way.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments, **keywords).result()
        except BrokenProcessPool:
            raise RuntimeError("its process ended in the middle; what it said last is above") from None


class Change(NamedTuple):
    """How many times as long one side takes as the other, and the interval that holds it with 99 % confidence."""

    low: float
    ratio: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Change:
        """Return the Hodges-Lehmann estimate of the rounds' ratios, with the interval of Wilcoxon's signed-rank test.

        Where the sides do not differ, a ratio is as likely as its inverse, and that is all the test asks for: its level
        holds exactly, for any spread and for few rounds, of which a bootstrap's interval comes out too narrow.
        """
        logs = np.log(ratios)
        first, second = np.triu_indices(len(logs))
        means = np.sort((logs[first] + logs[second]) / 2)
        # The chance of every rank sum, if each round's sign is the toss of a coin.
        chances = np.ones(1)
        for rank in range(1, len(logs) + 1):
            chances = np.convolve(chances, [0.5, *[0.0] * (rank - 1), 0.5])
        beyond = int(np.searchsorted(np.cumsum(chances), (1 - CONFIDENCE) / 2, side="right"))
        low, ratio, high = np.exp([means[beyond - 1], np.median(means), means[-beyond]])
        return cls(float(low), float(ratio), float(high))

    @property
    def verdict(self) -> str:
        """The words "faster", "slower" or "no difference seen"."""
        if self.low <= 1 <= self.high or abs(self.ratio - 1) < LEAST_CHANGE:
            return "no difference seen"
        return "slower" if self.ratio > 1 else "faster"
