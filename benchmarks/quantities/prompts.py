"""Exchanges with a model whose experts are in RAM beside a stand-in for a GPU, measured and predicted.

The functions add the stand-in to their process, for good: call them by :func:`quantities.measuring.in_own_process`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import overspill
from upstream_tools import stand_in_gpu

UNPINNED_BYTES_PER_S, PINNED_BYTES_PER_S = 4e6, 16e6
UBATCHES, UBATCHES_OF_LONG_PROMPTS = (512, 1024, 2048, 4096, 8192), (512, 2048, 8192)
REPLY_TOKENS = 100
PINS: Mapping[str, str] = {"attention": "gpu", "dense": "gpu", "kv": "gpu", "output": "gpu", "experts": "cpu"}
"""Of so small a model everything would fit, and beside so slow a link everything would be left to the CPU."""
Choice = tuple[int, bool]
"""The size of batches, and whether weights in RAM are registered with the driver."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and a reply."""

    first_token_s: float
    token_s: float
    """Of a token of the reply, the median."""
    outlook: overspill.Forecast

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.first_token_s + REPLY_TOKENS * self.token_s


@dataclass(frozen=True, slots=True)
class Exchanges:
    """One prompt's length: what was chosen, and what all choices take."""

    chosen: Choice
    today: Exchange
    """With the plan for decoding alone, and batches of 512."""
    cells: dict[Choice, Exchange]


def exchange(path: Path, planned: overspill.Plan, prompt: Sequence[int]) -> Exchange:
    """Load a model with a plan, and measure."""
    used = planned.settings
    switch: Any = "on" if used.pin_weights else "off"
    with overspill.Model(path, offload=planned, n_ctx=used.n_ctx, n_threads=1, pin_weights=switch) as model:
        while model.memory["CPU"].pinning.endswith("going on"):
            time.sleep(0.01)
        model.generate(prompt[:40], temperature=0, max_tokens=2)
        bias = {token: -100.0 for token in model.special_tokens.values() if model.is_end_of_generation(token)}
        times = [time.perf_counter()]
        for _ in model.stream(prompt, temperature=0, max_tokens=REPLY_TOKENS, logit_bias=bias):
            times.append(time.perf_counter())
        first_token_s, *token_s = (later - earlier for earlier, later in pairwise(times))
        return Exchange(first_token_s, statistics.median(token_s), planned.forecast())


def exchanges(tools: Path, path: Path, prompt_tokens: int) -> Exchanges:
    """Measure every choice for prompts of one length, and say which one is planned."""
    stand_in_gpu(
        tools,
        "GPU0",
        4 << 30,
        link_bytes_per_s=UNPINNED_BYTES_PER_S,
        pinned_bytes_per_s=PINNED_BYTES_PER_S,
    )
    info = overspill.ModelInfo.from_file(path)
    hardware = overspill.Hardware.here(info, n_threads=1)
    n_ctx = 1024 * -(-(prompt_tokens + REPLY_TOKENS + 1) // 1024)
    options: dict[str, Any] = {"hardware": hardware, "n_ctx": n_ctx, "pins": PINS, "reply_tokens": REPLY_TOKENS}
    options |= {"depth": min(n_ctx, prompt_tokens + REPLY_TOKENS // 2)}
    draw = random.Random(0)
    prompt = [draw.randrange(8000) for _ in range(prompt_tokens)]
    planned = overspill.plan(info, prompt_tokens=prompt_tokens, **options)
    chosen = (planned.settings.n_ubatch, planned.settings.pin_weights)
    plain = overspill.plan(info, prompt_tokens=1, n_ubatch=512, pin_weights=False, offload_min_batch=32, **options)
    today = exchange(path, plain, prompt)
    cells = {}
    sizes = UBATCHES if prompt_tokens < 10000 else UBATCHES_OF_LONG_PROMPTS  # each takes a minute of these
    for choice in dict.fromkeys([chosen, *((size, pins) for size in sizes for pins in (True, False))]):
        size, pins = choice
        given = overspill.plan(info, prompt_tokens=prompt_tokens, n_ubatch=size, pin_weights=pins, **options)
        if size <= max(512, 2 * prompt_tokens):
            cells[choice] = exchange(path, given, prompt)
    return Exchanges(chosen, today, cells)
