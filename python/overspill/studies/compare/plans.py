"""Plans for models that are compared: each alone, and one beside the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from overspill._core import Error
from overspill.header.info import ModelInfo
from overspill.machine.devices import devices
from overspill.machine.hardware import Hardware
from overspill.placement.device_names import CPU
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast
from overspill.planning.offload import Offload, place_and_forecast
from overspill.planning.together import plan_in_turn
from overspill.studies.compare.answers import Answer, ComparedModel

__all__ = ["plan_alone", "plan_together"]

_SPARE_RAM_BYTES = 1 << 30  # several models leave as much RAM as a plan leaves on a GPU


def plan_alone(
    label: str,
    info: ModelInfo,
    offload: Offload,
    questions: Sequence[str],
    options: Mapping[str, Any],
    memory: Mapping[str, int | str],
    show: Callable[[str, float], object],
) -> ComparedModel:
    """Return a model with the plan and the forecast for it alone."""
    # Measured only where something depends on it, as when a model is loaded.
    hardware = Hardware.here(
        info,
        memory=memory,
        n_threads=options.get("n_threads"),
        kernels=options.get("kernels", "auto"),
        measure=offload != "cpu" and any(device.is_gpu for device in devices()),
        progress=lambda what, share: show(f"measuring {what}", share),
    )
    placement, expected = _placed(info, hardware, offload, options)
    answers = [Answer(question) for question in questions]
    return ComparedModel(label, Path(info.files[0]), info, offload, hardware, placement, expected, answers)


def _placed(
    info: ModelInfo, hardware: Hardware, offload: Offload, options: Mapping[str, Any]
) -> tuple[Placement, Forecast]:
    try:
        return place_and_forecast(info, hardware, {**options, "offload": offload})
    except Error:
        # The model cannot be loaded so, which loading says while the others answer.
        return place_and_forecast(info, hardware, {**options, "offload": "cpu"})


def plan_together(models: Sequence[ComparedModel], options: Mapping[str, Any]) -> list[Placement] | None:
    """Return placements of all models at once; None if one does not fit beside the others, or is slower."""
    placements = []
    planners = ((one.hardware, partial(_placed, one.info, offload=one.offload, options=options)) for one in models)
    for one, (placement, expected) in zip(models, plan_in_turn(planners, {CPU: _SPARE_RAM_BYTES}), strict=True):
        if expected.verdict == "does not fit" or expected.tokens_per_s < 0.99 * one.forecast.tokens_per_s:
            return None
        placements.append(placement)
    return placements
