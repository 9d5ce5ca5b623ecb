"""What was measured: times of the same run, and a device's part of a token."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

__all__ = ["DeviceShare", "Samples"]


@dataclass(frozen=True, slots=True)
class Samples:
    """The same, measured several times."""

    n_prompt: int
    """Tokens of a prompt that were read at once; 0 for decoding."""
    n_gen: int
    """Tokens that were decoded one after the other; 0 for a prompt."""
    n_depth: int
    """Tokens in the context before that."""
    seconds: tuple[float, ...]
    """Of each time."""

    @property
    def name(self) -> str:
        """llama-bench's name, such as ``tg128 @ d4096``."""
        test = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{test} @ d{self.n_depth}" if self.n_depth else test

    @property
    def rates(self) -> list[float]:
        """Tokens per second, each time."""
        return [(self.n_prompt + self.n_gen) / seconds for seconds in self.seconds]

    @property
    def tokens_per_s(self) -> float:
        """Their mean, as llama-bench has it."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Their standard deviation in tokens per second; 0 for one time."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What one device does for a token, and how near it comes to the speed of its memory."""

    device: str
    read_bytes: int
    """Weights and KV cache that a token reads there, from the header."""
    bandwidth_bytes_per_s: float
    """Of its memory, measured; see :func:`device_bandwidth`."""
    busy_s: float
    """It computes so long for a token."""
    n_pieces: int
    """So many pieces of the graph, between changes of device."""

    @property
    def floor_s(self) -> float:
        """What reading takes at least."""
        return self.read_bytes / self.bandwidth_bytes_per_s

    @property
    def share(self) -> float:
        """``floor_s`` over ``busy_s``: 1 is the roofline. More where caches keep what was read before."""
        return self.floor_s / self.busy_s if self.busy_s > 0 else 0.0
