"""Measured values: times of repeated runs, each device's part of a token, and the speed of each type of weights."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

__all__ = ["DeviceShare", "Samples", "WeightSpeed"]


@dataclass(frozen=True, slots=True)
class Samples:
    """Times of one test that ran repeatedly: a prompt that was read, or tokens that were decoded."""

    n_prompt: int
    """Tokens of a prompt that were read at once; 0 for decoding."""
    n_gen: int
    """Tokens that were decoded one after the other; 0 for a prompt."""
    n_depth: int
    """Tokens in the context before that."""
    seconds: tuple[float, ...]
    """Seconds of each run."""

    @property
    def name(self) -> str:
        """The test's name, as llama-bench writes it: ``pp512``, ``tg128 @ d4096``."""
        test = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{test} @ d{self.n_depth}" if self.n_depth else test

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each run."""
        return [(self.n_prompt + self.n_gen) / seconds for seconds in self.seconds]

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second: the mean of the rates, as llama-bench computes it."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Standard deviation of the rates, in tokens per second; 0 for one run."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """One device's part of a token, and how near the device comes to the speed of its memory."""

    device: str
    read_bytes: int
    """Bytes of weights and KV cache that a token reads there, from the header."""
    bandwidth_bytes_per_s: float
    """The measured speed of its memory; see :func:`device_bandwidth`."""
    busy_s: float
    """Seconds that the device computes for a token."""
    n_pieces: int
    """Pieces of the graph that it computes, between changes of device."""

    @property
    def floor_s(self) -> float:
        """Seconds that reading takes at least."""
        return self.read_bytes / self.bandwidth_bytes_per_s

    @property
    def share(self) -> float:
        """``floor_s / busy_s``: 1 is the roofline, and caches that keep weights make it more."""
        return self.floor_s / self.busy_s if self.busy_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class WeightSpeed:
    """How fast weights of a type in RAM are read for a token, and how near that comes to reading alone."""

    weights: str
    """Their type, such as ``"q8_0"``, or that of experts, such as ``"mxfp4:experts"``."""
    bytes_per_s: float
    """With the model's threads, each product's fixed cost included."""
    plain_reads_bytes_per_s: float
    """The same threads' reads of memory that compute nothing, measured just after."""
    kernels: str
    """What multiplies: ``"llama.cpp"``, or the instruction set of Overspill's products."""

    @property
    def share(self) -> float:
        """``bytes_per_s / plain_reads_bytes_per_s``."""
        return self.bytes_per_s / self.plain_reads_bytes_per_s
