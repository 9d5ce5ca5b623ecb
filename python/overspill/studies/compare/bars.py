"""Bar charts of speed, waiting time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overspill.base.units import format_bytes
from overspill.studies.compare.answers import ComparedModel

__all__ = ["Bar", "memory_bars", "speed_bars", "wait_bars"]


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a chart; shares are of its whole width, 0 to 1."""

    label: str
    value: str
    shares: list[tuple[float, str, str]]
    """Share, name of its colour, and name of its shade."""
    note: str = ""


def speed_bars(models: Sequence[ComparedModel]) -> list[Bar]:
    """Return a bar for each model: tokens per second, as a share of the fastest model's."""
    speeds = [one.tokens_per_second for one in models]
    most = max((speed for speed in speeds if speed is not None), default=1.0)
    return [
        Bar(
            one.label,
            "–" if speed is None else f"{speed:.2f} tok/s",
            [((speed or 0) / most, "speed", "weights")],
            f"{one.forecast.tokens_per_s:.1f} were expected" if one.hardware.source == "measured" else "",
        )
        for one, speed in zip(models, speeds, strict=True)
    ]


def wait_bars(models: Sequence[ComparedModel]) -> list[Bar]:
    """Return a bar for each model: seconds to the first token, as a share of the slowest model's."""
    times = [one.time_to_first_token_s for one in models]
    most = max((seconds for seconds in times if seconds is not None), default=1.0) or 1.0
    return [
        Bar(one.label, "–" if seconds is None else f"{seconds:.2f} s", [((seconds or 0) / most, "wait", "weights")])
        for one, seconds in zip(models, times, strict=True)
    ]


def memory_bars(models: Sequence[ComparedModel], device: str) -> list[Bar]:
    """Return a bar for each model: bytes on one device, as a share of its free memory, divided by their use."""
    bars = []
    for one in models:
        use = one.memory.get(device)
        room = next((spec.memory_bytes for spec in one.hardware.devices if spec.name == device), 0)
        if use is None or not use.total_bytes:
            bars.append(Bar(one.label, "–" if not one.memory else "nothing", []))
            continue
        whole = max(room, use.total_bytes)
        kinds = {"weights": use.weights_bytes, "kv": use.kv_bytes, "compute": use.compute_bytes}
        shares = [(n_bytes / whole, device, kind) for kind, n_bytes in kinds.items()]
        note = " · ".join(
            f"{name} {format_bytes(n_bytes)}"
            for name, n_bytes in zip(("weights", "KV cache", "computing"), kinds.values(), strict=True)
            if n_bytes
        )
        value = format_bytes(use.total_bytes) + (f" of {format_bytes(room)}" if room else "")
        bars.append(Bar(one.label, value, shares, note))
    return bars
