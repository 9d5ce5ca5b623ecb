"""A token of a model on the CPU and a device beside it, measured and predicted.

The functions add the server's device to their process, for good: call them by
:func:`quantities.measuring.in_own_process`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import overspill
from quantities.stream import timed_stream

TINY_PLACEMENTS: Mapping[str, Any] = {
    "all on the CPU": "cpu",
    "all on the device": {"default": "RPC0"},
    "experts on the CPU": {"default": "RPC0", "experts": "cpu"},
    "half of the layers": {"layers 2-3": "RPC0"},
    "the output alone": {"output": "RPC0"},
}


def parts_of_a_token(path: Path, endpoint: str) -> dict[str, dict[str, Any]]:
    """Return what ``overspill bench --json`` says of decoding, for each of five placements of a tiny gpt-oss."""
    overspill.add_rpc_server(endpoint)
    options: dict[str, Any] = {"n_prompt": 0, "n_gen": 64, "repetitions": 3, "n_threads": 1}
    return {
        name: overspill.bench(path, offload=offload, **options).to_dicts()[0]
        for name, offload in TINY_PLACEMENTS.items()
    }


PLACEMENTS: Mapping[str, Mapping[str, str]] = {
    "all on the CPU": {},
    "all on the device": {"default": "RPC0"},
    "experts on the CPU": {"default": "RPC0", "experts": "cpu"},
    "experts on the device": {"experts": "RPC0"},
    "half of the layers": {"layers 3-5": "RPC0"},
    "the output alone": {"output": "RPC0"},
    "experts of 3 layers on the CPU": {"default": "RPC0", "layers 0-2 experts": "cpu"},
    "attention and KV on the CPU": {"default": "RPC0", "attention": "cpu", "kv": "cpu"},
    "one matrix of each expert on the CPU": {"default": "RPC0", "/ffn_down_exps/": "cpu"},
    "the output on the CPU": {"default": "RPC0", "output": "cpu"},
}
N_CTX = 512
N_PROMPT, N_TOKENS = 4, 12


@dataclass(frozen=True, slots=True)
class Moment:
    """Some tokens of a placement, and what is forecast of it from the machine as it was measured around them."""

    tokens_s: list[float]
    forecasts: tuple[overspill.Forecast, overspill.Forecast]
    """From the measurements just before and just after the tokens."""
    graph_splits: int
    read_bytes: int
    """Weights and KV cache that a token reads."""

    @property
    def measured(self) -> float:
        """Tokens per second, of a token that is slower than a tenth of them."""
        return 1 / float(np.quantile(self.tokens_s, 0.1))

    @property
    def predicted(self) -> float:
        """Tokens per second, the mean of both forecasts."""
        return statistics.fmean(outlook.tokens_per_s for outlook in self.forecasts)


@dataclass(frozen=True, slots=True)
class Visited:
    """A placement, and what was found in all of its visits."""

    moments: list[Moment]
    predicted_at_best: float
    """Tokens per second, the highest forecast from any measurement of the machine, beside other placements as well."""


def visit_placements(path: Path, endpoint: str, *, n_visits: int, n_moments: int) -> dict[str, Visited]:
    """Return what is found of a gpt-oss's placements, each of which is loaded ``n_visits`` times, in turn."""
    overspill.add_rpc_server(endpoint)
    info = overspill.ModelInfo.from_file(path)
    gpus = [device for device in overspill.devices() if device.is_gpu]
    placements = {name: overspill.Placement.from_mapping(info, gpus, mapping) for name, mapping in PLACEMENTS.items()}
    moments: dict[str, list[Moment]] = {name: [] for name in placements}
    machines: list[overspill.Hardware] = []

    def forecast(name: str, machine: overspill.Hardware) -> overspill.Forecast:
        depth = N_PROMPT + N_TOKENS // 2
        return overspill.forecast(info, placements[name], machine, n_ctx=N_CTX, depth=depth)

    def measure_machine() -> overspill.Hardware:
        machines.append(overspill.Hardware.here(info, n_threads=1, refresh=True))
        return machines[-1]

    for _ in range(n_visits):
        for name, placement in placements.items():
            with overspill.Model(path, offload=placement, n_ctx=N_CTX, n_threads=1) as model:
                before = measure_machine()
                for _ in range(n_moments):
                    # A step of each token is all of its work, as with logits=True the stream does not look ahead.
                    timed = timed_stream(
                        model, list(range(1, N_PROMPT + 1)), max_tokens=N_TOKENS + 1, temperature=0, logits=True
                    )
                    after = measure_machine()
                    (stats,) = timed.stats
                    spent = stats.breakdown
                    moments[name].append(
                        Moment(
                            list(timed.seconds[1:]),
                            (forecast(name, before), forecast(name, after)),
                            spent.graph_splits,
                            (spent.read_bytes or 0) // spent.tokens,
                        )
                    )
                    before = after
            shown = (f"{one.predicted:.2f}/{one.measured:.2f}" for one in moments[name][-n_moments:])
            print(f"{name}: predicted/measured tokens/s", *shown, flush=True)
    return {
        name: Visited(moments[name], max(forecast(name, machine).tokens_per_s for machine in machines))
        for name in placements
    }
