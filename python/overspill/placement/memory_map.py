"""A placement as a picture for a notebook: a bar for each device's memory, divided by what takes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from overspill.base import html
from overspill.base.units import format_bytes
from overspill.base.values import MemoryUse
from overspill.placement.assignment import Assignment
from overspill.placement.device_names import memory_name

__all__ = ["memory_map"]

_GROUNDS = {
    "attention": "#b5d4f4",
    "experts": "#fbd3a4",
    "other weights": "#d9d4f0",
    "KV cache": "#b9e6c9",
    "compute buffers": "#f3c4d3",
    "cache of experts": "#f5eba0",
}


def memory_map(
    assignment: Assignment, memory: Mapping[str, MemoryUse] | None = None, free: Mapping[str, int] | None = None
) -> str:
    """Return the bars as HTML.

    Parameters
    ----------
    assignment
        The content of the placement.
    memory
        Bytes by device, a cache of experts counted as weights. Default: those of tensors and, if known, KV caches.
    free
        Bytes of each device before a model is loaded: a bar is all of them. Default: the bars of all devices are of
        one scale.
    """
    used = {device: _uses(assignment, device, memory) for device in assignment.devices}
    longest = max(sum(uses.values()) for uses in used.values())
    free = {} if free is None else free
    return "".join(
        _device(device, uses, free.get(device), longest)
        for device, uses in used.items()
        if device in free or any(uses.values())
    )


def _uses(assignment: Assignment, device: str, memory: Mapping[str, MemoryUse] | None) -> dict[str, int]:
    """Return the bytes on a device by what takes them, in the order of the bar."""
    pool = assignment.expert_cache.get(device, 0)
    if memory is None:
        kv = zip(assignment.kv, assignment.kv_bytes_by_layer or (), strict=False)
        use = MemoryUse(
            assignment.bytes_by_device()[device] + pool, sum(n_bytes for where, n_bytes in kv if where == device), 0
        )
    else:
        use = memory[device]
    parts: Counter[str] = Counter()
    for name, where in assignment.tensors.items():
        if where == device:
            parts[assignment.model.parts[name]] += assignment.model.tensors[name]
    attention, experts = parts["attention"], parts["experts"]
    # The rest are also copies that llama.cpp makes, which no part of the model has.
    other = use.weights_bytes - pool - attention - experts
    sizes = (attention, experts, other, use.kv_bytes, use.compute_bytes, pool)
    return dict(zip(_GROUNDS, sizes, strict=True))


def _device(device: str, uses: Mapping[str, int], free: int | None, longest: int) -> str:
    n_bytes = sum(uses.values())
    whole = (longest if free is None else max(free, n_bytes)) or 1
    shown = [(f"{part} {format_bytes(size)}", size, _GROUNDS[part]) for part, size in uses.items() if size]
    said = format_bytes(n_bytes)
    if free is not None:
        said += f" of {format_bytes(free)}"
        if free > n_bytes:
            shown.append((f"free {format_bytes(free - n_bytes)}", free - n_bytes, ""))
        elif free < n_bytes:
            said += f": {format_bytes(n_bytes - free)} too much"
    bar = html.bar(html.Segment(label, size / whole, ground, size) for label, size, ground in shown)
    boxes = " ".join(html.box(label, ground) for label, _, ground in shown)
    name = html.escape(memory_name(device))
    return (
        f'<div data-device="{html.escape(device)}" style="margin:.4em 0"><strong>{name}</strong> {html.escape(said)}'
        f'{bar}<div style="font-size:90%;line-height:1.7">{boxes}</div></div>'
    )
