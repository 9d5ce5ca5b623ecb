"""The budget of a cascade: whether memory has room for both models, by forecasts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from overspill.base.units import format_bytes
from overspill.header.info import ModelInfo
from overspill.machine.hardware import Hardware
from overspill.placement.device_names import memory_name
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast, forecast
from overspill.planning.plan import plan
from overspill.planning.together import plan_in_turn

__all__ = ["fit_together"]


def fit_together(
    small: ModelInfo, large: ModelInfo, hardware: Hardware, options: Mapping[str, Any]
) -> tuple[bool, str]:
    """Return whether memory holds both models, and why, in words.

    The small model is forecast on ``hardware``, the large one on the memory that the small one leaves. ``options`` are
    those of :class:`Model`.
    """
    offload = options.get("offload", "auto")
    if offload == "cpu":
        hardware = replace(hardware, devices=(hardware.cpu,))
    needed: Counter[str] = Counter()
    planners = [(hardware, partial(_forecast, info, offload=offload, options=options)) for info in (small, large)]
    for which, (_, expected) in zip(("small", "large"), plan_in_turn(planners), strict=True):
        if expected.verdict == "does not fit":
            beside = " beside the small one" if which == "large" else ""
            return False, f"one model at a time: the {which} one does not fit{beside}: {expected.reason}"
        needed.update({name: use.total_bytes for name, use in expected.memory.items()})
    uses = " and ".join(f"{format_bytes(n)} of {memory_name(name)}" for name, n in needed.items() if n)
    return True, f"both models are in memory: they need {uses}"


def _forecast(
    info: ModelInfo, hardware: Hardware, offload: Any, options: Mapping[str, Any]
) -> tuple[Placement, Forecast]:
    names = ("n_ctx", "type_k", "type_v", "load_mode")
    settings = {name: options[name] for name in names if options.get(name) is not None}
    settings["n_ubatch"] = options.get("n_ubatch") or options.get("n_batch") or 512
    if offload in ("auto", "cpu", "tuned"):
        planned = plan(info, hardware=hardware, **settings)
        return planned, planned.forecast()
    placement = offload if isinstance(offload, Placement) else Placement.from_offload(info, hardware.gpus, offload)
    return placement, forecast(info, placement, hardware, **settings)
