"""Plans for models that are compared: each alone, and one beside the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from overspill.engine.loading import Offload
from overspill.header.info import ModelInfo
from overspill.machine.devices import devices
from overspill.machine.hardware import Hardware
from overspill.placement.device_names import CPU
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast, forecast
from overspill.planning.plan import plan
from overspill.planning.together import plan_in_turn
from overspill.planning.tuned import tuned_options
from overspill.studies.compare.answers import Answer, ComparedModel

__all__ = ["plan_alone", "plan_together"]

_SPARE_RAM_BYTES = 1 << 30  # several models leave as much RAM as a plan leaves on a GPU


def plan_alone(
    label: str,
    info: ModelInfo,
    offload: Offload,
    questions: Sequence[str],
    settings: Mapping[str, Any],
    memory: Mapping[str, int | str],
    n_threads: int | None,
    show: Callable[[str, float], object],
) -> ComparedModel:
    """Return a model with the plan and the forecast for it alone."""
    # Measured only where something depends on it, as when a model is loaded.
    hardware = Hardware.here(
        info,
        memory=memory,
        n_threads=n_threads,
        measure=offload != "cpu" and any(device.is_gpu for device in devices()),
        progress=lambda what, share: show(f"measuring {what}", share),
    )
    placement, expected = _plan(info, offload, hardware, settings)
    answers = [Answer(question) for question in questions]
    return ComparedModel(label, Path(info.files[0]), info, offload, hardware, placement, expected, answers)


def _plan(
    info: ModelInfo, offload: Offload, hardware: Hardware, settings: Mapping[str, Any]
) -> tuple[Placement, Forecast]:
    if offload == "auto":
        planned = plan(info, hardware=hardware, **settings)
        return planned, planned.forecast()
    if offload == "tuned":
        tuned = tuned_options(info)
        offload = tuned["offload"]
        n_ctx = settings["n_ctx"]
        settings = {name: tuned[name] for name in ("n_ctx", "n_ubatch", "type_k", "type_v", "load_mode")}
        settings |= {} if n_ctx is None else {"n_ctx": n_ctx}
    if isinstance(offload, Placement):
        placement = offload
    elif not hardware.gpus and isinstance(offload, str | int):
        placement = Placement.cpu(info)  # if it is not what was asked for, loading says so
    else:
        placement = Placement.from_offload(info, hardware.gpus, offload)
    return placement, forecast(info, placement, hardware, **settings)


def plan_together(models: Sequence[ComparedModel], settings: Mapping[str, Any]) -> list[Placement] | None:
    """Return placements of all models at once; None if one does not fit beside the others, or is slower."""
    placements = []
    planners = ((one.hardware, partial(_plan, one.info, one.offload, settings=settings)) for one in models)
    for one, (placement, expected) in zip(models, plan_in_turn(planners, {CPU: _SPARE_RAM_BYTES}), strict=True):
        if expected.verdict == "does not fit" or expected.tokens_per_s < 0.99 * one.forecast.tokens_per_s:
            return None
        placements.append(placement)
    return placements
