"""The budget of a cascade: whether memory has room for both models, by forecasts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from overspill.base.units import format_bytes
from overspill.header.info import ModelInfo
from overspill.machine.hardware import Hardware
from overspill.placement.device_names import memory_name
from overspill.planning.offload import place_and_forecast
from overspill.planning.together import plan_in_turn

__all__ = ["fit_together"]


def fit_together(
    small: ModelInfo, large: ModelInfo, hardware: Hardware, options: Mapping[str, Any]
) -> tuple[bool, str]:
    """Return whether memory holds both models, and why, in words.

    The small model is forecast on ``hardware``, the large one on the memory that the small one leaves. ``options`` are
    those of :class:`Model`.
    """
    needed: Counter[str] = Counter()
    planners = [(hardware, partial(place_and_forecast, info, options=options)) for info in (small, large)]
    for which, (_, expected) in zip(("small", "large"), plan_in_turn(planners), strict=True):
        if expected.verdict == "does not fit":
            beside = " beside the small one" if which == "large" else ""
            return False, f"one model at a time: the {which} one does not fit{beside}: {expected.reason}"
        needed.update({name: use.total_bytes for name, use in expected.memory.items()})
    uses = " and ".join(f"{format_bytes(n)} of {memory_name(name)}" for name, n in needed.items() if n)
    return True, f"both models are in memory: they need {uses}"
