"""Whether memory has room for both models of a cascade, as far as forecasts tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from overspill.base.units import format_bytes
from overspill.header.info import ModelInfo
from overspill.machine.hardware import Hardware
from overspill.placement.device_names import CPU
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast, forecast
from overspill.planning.plan import plan

__all__ = ["fit_together"]


def fit_together(
    small: ModelInfo, large: ModelInfo, hardware: Hardware, options: Mapping[str, Any]
) -> tuple[bool, str]:
    """Forecast the small model on what there is, and the large one on what it leaves; say whether both fit, and why.

    ``options`` are those of :class:`Model`.
    """
    offload = options.get("offload", "auto")
    if offload == "cpu":
        hardware = replace(hardware, devices=(hardware.cpu,))
    needed = {device.name: 0 for device in hardware.devices}
    for which, info in (("small", small), ("large", large)):
        expected = _forecast(info, hardware, offload, options)
        if expected.verdict == "does not fit":
            beside = " beside the small one" if which == "large" else ""
            return False, f"one model at a time: the {which} one does not fit{beside}: {expected.reason}"
        used = {device.name: expected.memory[device.name].total_bytes for device in hardware.devices}
        needed = {name: n_bytes + used[name] for name, n_bytes in needed.items()}
        hardware = hardware.without(used)
    uses = " and ".join(f"{format_bytes(n)} of {'RAM' if name == CPU else name}" for name, n in needed.items() if n)
    return True, f"both models are in memory: they need {uses}"


def _forecast(info: ModelInfo, hardware: Hardware, offload: Any, options: Mapping[str, Any]) -> Forecast:
    names = ("n_ctx", "type_k", "type_v", "load_mode")
    settings = {name: options[name] for name in names if options.get(name) is not None}
    settings["n_ubatch"] = options.get("n_ubatch") or options.get("n_batch") or 512
    if offload in ("auto", "cpu", "tuned"):
        return plan(info, hardware=hardware, **settings).forecast()
    placement = offload if isinstance(offload, Placement) else Placement.from_offload(info, hardware.gpus, offload)
    return forecast(info, placement, hardware, **settings)
