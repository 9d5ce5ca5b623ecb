"""What ``offload`` stands for: the one place that turns it into a placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from overspill import _core
from overspill.base.values import Device
from overspill.header.info import ModelInfo
from overspill.machine.hardware import DeviceSpec, Hardware
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast, forecast
from overspill.planning.plan import Plan, plan
from overspill.planning.tuned import tuned_options

__all__ = ["Offload", "place_and_forecast", "placement_for", "with_tuned"]

Offload: TypeAlias = Literal["auto", "cpu", "gpu", "tuned"] | int | Placement | Mapping[str, Any]

_SETTINGS = ("n_ctx", "n_ubatch", "type_k", "type_v", "load_mode")  # those of plan() that Model has, too


def check_offload(offload: object) -> None:
    """Raise a ValueError unless ``offload`` is of a kind that :class:`overspill.Model` takes."""
    is_number = isinstance(offload, int) and not isinstance(offload, bool) and 0 <= offload < 2**31
    is_word = isinstance(offload, str) and offload in ("auto", "cpu", "gpu", "tuned")
    if not (is_number or is_word or isinstance(offload, Placement | Mapping)):
        raise ValueError(
            'offload must be "auto", "cpu", "gpu", "tuned", a number of layers from 0, a Placement or a mapping, '
            f"not {offload!r}"
        )


def with_tuned(
    info: ModelInfo, offload: Offload, given: Mapping[str, Any], n_batch: int = 512
) -> tuple[Offload, dict[str, Any]]:
    """Return the placement in place of ``"tuned"``, and settings: those given, or else those that were tuned.

    Parameters
    ----------
    info
        The model.
    offload
        Anything but ``"tuned"`` is returned as it is, with the settings that were given.
    given
        Those of the keywords of :class:`overspill.Model` that the caller gave.
    n_batch
        The most that a tuned ``n_ubatch`` may be.

    Raises
    ------
    ValueError
        ``offload`` is of no kind that there is.
    Error
        Nothing was tuned for this model on this machine.
    """
    check_offload(offload)
    if offload != "tuned":
        return offload, dict(given)
    tuned = tuned_options(info)
    tuned["n_ubatch"] = min(tuned["n_ubatch"], n_batch)
    return tuned.pop("offload"), {**tuned, **given}


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
        As of :class:`overspill.Model`; ``"tuned"`` is for :func:`with_tuned`.
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
        return Placement.from_mapping(info, gpus, offload)
    if offload == "gpu" and not gpus:
        raise _core.Error('offload="gpu", but there is no GPU here; overspill.devices() lists what there is')
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
        As for :func:`with_tuned` and :func:`placement_for`.
    """
    n_batch = options.get("n_batch") or 512
    given = {name: options[name] for name in _SETTINGS if options.get(name) is not None}
    offload, chosen = with_tuned(info, options.get("offload", "auto"), given, n_batch)
    settings: dict[str, Any] = {"n_ubatch": n_batch} | {name: chosen[name] for name in _SETTINGS if name in chosen}
    placement = placement_for(info, offload, hardware.gpus, lambda: hardware, **settings) or Placement.cpu(info)
    if isinstance(placement, Plan) and placement is not offload:
        return placement, placement.forecast()
    return placement, forecast(info, placement, hardware, **settings)
