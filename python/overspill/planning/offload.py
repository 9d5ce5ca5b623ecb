"""What ``offload`` stands for: the one place that turns it into a placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from overspill._core import Error
from overspill.base.checks import naming, shown
from overspill.base.values import Device, is_given
from overspill.header.info import ModelInfo
from overspill.machine.hardware import DeviceSpec, Hardware
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast, forecast
from overspill.planning.plan import Plan, plan
from overspill.planning.settings import is_mapped
from overspill.planning.tuned import tuned_options
from overspill.planning.workload import pinning_room_bytes

__all__ = ["Offload", "check_offload", "place_and_forecast", "placement_for", "tuned_beside"]

Offload: TypeAlias = Literal["auto", "cpu", "gpu", "tuned"] | int | Placement | Mapping[str, Any]

# Those of plan() that Model has, too.
_SETTINGS = ("n_ctx", "n_parallel", "n_ubatch", "type_k", "type_v", "load_mode", "prompt_tokens", "reply_tokens",
             "offload_min_batch", "experts")  # fmt: skip


def check_offload(offload: object) -> None:
    """Raise a ValueError if ``offload`` is of no kind that there is."""
    is_number = isinstance(offload, int) and not isinstance(offload, bool) and 0 <= offload < 2**31
    is_word = isinstance(offload, str) and offload in ("auto", "cpu", "gpu", "tuned")
    if not (is_number or is_word or isinstance(offload, Placement | Mapping)):
        raise ValueError(
            'offload must be "auto", "cpu", "gpu", "tuned", a number of layers from 0, a Placement or a mapping, '
            f"not {shown(offload)}"
        )


def tuned_beside(info: ModelInfo, given: Mapping[str, Any]) -> tuple[Placement, dict[str, Any]]:
    """Return the tuned placement, which ``"tuned"`` stands for, and the tuned settings that the caller did not give.

    Parameters
    ----------
    info
        The model.
    given
        Keywords of :class:`overspill.Model`. A tuned ``n_ubatch`` is at most a given ``n_batch``.

    Raises
    ------
    Error
        Nothing was tuned for this model on this machine.
    """
    tuned = tuned_options(info)
    placement: Placement = tuned.pop("offload")
    tuned["n_ubatch"] = min(tuned["n_ubatch"], given.get("n_batch") or tuned["n_ubatch"])
    return placement, {name: value for name, value in tuned.items() if not is_given(given.get(name))}


def placement_for(
    info: ModelInfo,
    offload: Offload,
    gpus: Sequence[Device] | Sequence[DeviceSpec],
    hardware: Callable[[], Hardware],
    **settings: Any,
) -> Placement | None:
    """Return the placement that ``offload`` stands for; None for everything on the CPU and no GPU touched.

    Parameters
    ----------
    info
        The model.
    offload
        As of :class:`overspill.Model`; ``"tuned"`` is for :func:`tuned_beside`.
    gpus
        The GPUs that there are.
    hardware
        Returns what to plan for; called for ``"auto"`` alone, since it may have to measure.
    **settings
        As for :func:`plan`.

    Raises
    ------
    Error
        ``"gpu"``, and there is none.
    ValueError, TypeError
        ``offload`` is of no kind that there is, or a placement or mapping is for another model or other devices.
    """
    check_offload(offload)
    if isinstance(offload, Placement):
        offload.check(info, gpus)
        return offload
    if isinstance(offload, Mapping):
        with naming("offload"):
            return Placement.from_mapping(info, gpus, offload)
    if offload == "gpu" and not gpus:
        raise Error('offload="gpu", but there is no GPU here; overspill.devices() lists what there is')
    if offload in ("cpu", 0) or not gpus:
        return None
    if offload == "auto":
        return plan(info, hardware=hardware(), **settings)
    return Placement.from_offload(info, gpus, offload)


def place_and_forecast(info: ModelInfo, hardware: Hardware, options: Mapping[str, Any]) -> tuple[Placement, Forecast]:
    """Return the placement that :class:`overspill.Model` would ask for on some hardware, and the forecast for it.

    Parameters
    ----------
    info, hardware
        The model, and what there is for it.
    options
        Keywords of :class:`overspill.Model`, ``offload`` among them.

    Raises
    ------
    Error, ValueError, TypeError
        As for :func:`tuned_beside` and :func:`placement_for`.
    """
    offload = options.get("offload", "auto")
    if offload == "tuned":
        offload, tuned = tuned_beside(info, options)
        options = {**options, **tuned}
    settings = {name: options[name] for name in _SETTINGS if options.get(name) is not None}
    if options.get("n_batch") is not None:
        settings.setdefault("n_ubatch", options["n_batch"])
    switch = options.get("pin_weights", "auto")
    if offload == "auto":
        planned = plan(info, hardware=hardware, pin_weights=None if switch == "auto" else switch == "on", **settings)
        return planned, planned.forecast()
    settings.pop("experts", None)
    placement = placement_for(info, offload, hardware.gpus, lambda: hardware, **settings) or Placement.cpu(info)
    if isinstance(placement, Plan):
        # As a load completes its settings.
        if settings.setdefault("n_ubatch", placement.settings.n_ubatch) == placement.settings.n_ubatch:
            settings.setdefault("offload_min_batch", placement.settings.offload_min_batch)
        if switch == "auto" and "pin_weights" not in placement.chosen:
            switch = "on" if placement.settings.pin_weights else "off"
    found = forecast(info, placement, hardware, **settings)
    can = found.weights_in_ram and any(gpu.registers_host_memory for gpu in hardware.gpus)
    if switch == "off" or not can or not is_mapped(found.settings):
        return placement, found
    cpu = found.memory[hardware.cpu.name]
    pins = switch == "on" or pinning_room_bytes(cpu.free_bytes, cpu.weights_bytes + cpu.kv_bytes) >= 0
    return placement, forecast(info, placement, hardware, pin_weights=True, **settings) if pins else found
