"""What batch sizes cost and bring: larger ones read a prompt faster and leave less room for experts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from overspill._core import Error
from overspill.base.checks import as_integer, as_list, check_keywords, keywords_of
from overspill.header.info import ModelInfo
from overspill.machine.hardware import Hardware
from overspill.planning.plan import UBATCHES, Plan, plan, plan_for
from overspill.planning.workload import matrix_layers

__all__ = ["UbatchTrade", "trade_around", "ubatch_trade"]


@dataclass(frozen=True, slots=True)
class UbatchTrade:
    """The costs of a batch size: a larger one reads a prompt faster and leaves less room for experts."""

    n_ubatch: int
    compute_bytes: int
    """On all GPUs."""
    expert_layers: int
    """Layers whose experts (of a dense model: feed-forward matrices) are all on GPUs."""
    tokens_per_s: float
    prefill_ceiling_tokens_per_s: float
    """Where experts in RAM are copied to a GPU for each batch, the link allows no more; infinite if none are."""
    prompt_tokens_per_s: float
    """Reading the prompt of the settings."""
    time_to_first_token_s: float
    """Of that prompt."""


def ubatch_trade(
    model: str | os.PathLike[str] | ModelInfo,
    *,
    hardware: Hardware | None = None,
    ubatches: Sequence[int] = UBATCHES,
    pins: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[UbatchTrade]:
    """Return the trade for each of several batch sizes, planned with each.

    Parameters are those of :func:`plan`; ``ubatches`` has values of ``n_ubatch``.
    """
    check_keywords(settings, keywords_of(plan) - {"n_ubatch"})
    sizes = [as_integer("ubatches", size, 1, 65536) for size in as_list("ubatches", ubatches, "sizes of batches")]
    if not sizes:
        raise ValueError("ubatches must have at least one size of batches")
    first = plan(model, hardware=hardware, pins=pins, **(settings | {"n_ubatch": sizes[0]}))
    return trade_around(first, sizes)


def trade_around(planned: Plan, ubatches: Sequence[int] = UBATCHES) -> list[UbatchTrade]:
    """Return the trade for each batch size, all else as for a plan, which must not have been edited."""
    found = []
    for n_ubatch in ubatches:
        settings = replace(planned.settings, n_ubatch=as_integer("ubatches", n_ubatch, 1, 65536))
        is_planned = settings == planned.settings
        chosen = planned.chosen - {"n_ubatch"}
        more = (planned.pins, chosen, planned.experts)
        try:
            one = planned if is_planned else plan_for(planned.info, planned.hardware, settings, *more)
        except Error:
            continue  # such batches leave no room for the cache of experts that was asked for
        work, arranged = one.estimate().work, one.estimate().arranged
        use, compute = work.evaluate(arranged), work.compute_bytes(arranged)
        taker = work.takes_over(arranged)
        in_ram = work.copied_bytes(arranged, use)
        ceiling = float("inf")
        if taker is not None and in_ram > 0 and n_ubatch >= one.settings.offload_min_batch:
            ceiling = n_ubatch * work.copy_bytes_per_s(taker) / in_ram
        n_layers, outlook = matrix_layers(work, arranged)[1], one.forecast()
        first_s, prompt_rate = outlook.time_to_first_token_s, outlook.prompt_tokens_per_s
        rates = (outlook.tokens_per_s, ceiling, prompt_rate, first_s)
        found.append(UbatchTrade(n_ubatch, sum(compute[: work.cpu]), n_layers, *rates))
    return found
