"""What a cache of experts in a GPU's memory makes of a token's time.

In each layer the GPU computes the experts that are resident while the CPU computes the others. With a share ``h`` of
hits, each of the ``k`` experts of a token is a hit by itself, so that ``m`` of them miss with the probability of a
binomial distribution, and a layer takes::

    sum over m of  P(m) * max(m / k * cpu,  exchange + (k - m) / k * gpu if m < k)

``cpu`` and ``gpu`` are the bytes of the layer's ``k`` experts over the rates at which the devices read them, and
``exchange`` is what sending the activations and getting the results back costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from overspill.header.info import ModelInfo
from overspill.planning.workload import Arrangement, Workload

__all__ = [
    "HIT_SHARES",
    "INSERTIONS_PER_MISS",
    "CachedLayer",
    "ExpertForecast",
    "cached_layers",
    "expected_hit_share",
    "experts_bytes",
    "layer_s",
]

HIT_SHARES = ((0.0, 0.0), (0.06, 0.19), (0.125, 0.44), (0.25, 0.65), (0.31, 0.73), (0.41, 0.83), (0.5, 0.9), (1.0, 1.0))
"""Hits by the share of experts that are resident: replays of an LRU for each layer over 215,438 tokens of gpt-oss-20b,
which has 32 experts. With 128, models reuse a smaller share of theirs: 0.83 at 0.25 in a trace of Qwen3-30B-A3B. So
this is on the safe side for those."""
INSERTIONS_PER_MISS = 0.22
"""Misses at their second touch, which are copied: the same replays at 0.31."""


def experts_bytes(info: ModelInfo) -> int:
    """Return the bytes of all experts that tokens use, of all layers."""
    return sum(info.layers[layer]["experts"] for layer in info.expert_layers)


def expected_hit_share(resident_share: float) -> float:
    """Return the hits that are to be expected of a cache with so many of the experts, by :data:`HIT_SHARES`."""
    for (low, hits), (high, more) in pairwise(HIT_SHARES):
        if resident_share <= high:
            return hits + (more - hits) * (max(resident_share, low) - low) / (high - low)
    return 1.0


@dataclass(frozen=True, slots=True)
class ExpertForecast:
    """What is expected of a cache of experts on GPUs."""

    cache_bytes: int
    """Of all GPUs."""
    resident_share: float
    """Of the experts in RAM, those that it has room for."""
    hit_share: float
    """Of a token's experts, those that are expected to be there."""
    insertions_per_token: float
    """Experts that are copied there for a token, in all layers."""
    assumption: str
    """Where the share of hits is from, in words."""


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """A layer whose experts are in RAM, and may be resident on a GPU."""

    gpu: int
    cpu_s: float
    """Seconds in which the CPU reads a token's experts."""
    gpu_s: float
    """Seconds in which the GPU does."""
    exchange_s: float
    n_used: int
    expert_bytes: int
    """Of one expert."""
    experts_bytes: int
    """Of all."""


def cached_layers(work: Workload, arranged: Arrangement, pools: Mapping[int, int]) -> list[CachedLayer]:
    """Return the layers that pools, bytes by the number of the GPU, are for."""
    found = []
    n_used, n_experts = work.info.n_experts_used, max(1, work.info.n_experts)
    for kind, kv, devices in zip(work.kinds[: work.n_computed], arranged.kv, arranged.groups, strict=False):
        experts = [weight for weight in kind.weights.values() if kind.parts[weight.name] == "experts"]
        if not experts or any(devices[kind.group_of[weight.name]] != work.cpu for weight in experts):
            continue
        gpu = kv if kv in pools else next(iter(pools))
        seconds = dict.fromkeys((work.cpu, gpu), 0.0)
        for weight in experts:
            for device in seconds:
                _, n_bytes, rate = work.reading(kind, weight, device, "mul_mat_id")
                seconds[device] += n_bytes / rate
        n_bytes = sum(weight.n_bytes for weight in experts)
        spec = work.devices[gpu]
        exchange_s = spec.hop_s if spec.exchange_s is None else spec.exchange_s
        found.append(
            CachedLayer(gpu, seconds[work.cpu], seconds[gpu], exchange_s, n_used, n_bytes // n_experts, n_bytes)
        )
    return found


def layer_s(layer: CachedLayer, hit_share: float) -> tuple[float, float]:
    """Return the seconds of a layer's experts: those in which the CPU reads its own, and those it waits beyond that."""
    n, reading_s, waiting_s = layer.n_used, 0.0, 0.0
    for n_missed in range(n + 1):
        share = math.comb(n, n_missed) * (1 - hit_share) ** n_missed * hit_share ** (n - n_missed)
        cpu_s = n_missed / n * layer.cpu_s
        gpu_s = layer.exchange_s + (n - n_missed) / n * layer.gpu_s if n_missed < n else 0.0
        reading_s += share * cpu_s
        waiting_s += share * max(0.0, gpu_s - cpu_s)
    return reading_s, waiting_s
