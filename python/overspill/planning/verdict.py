"""Whether a placement fits: the bytes needed and free on each device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from overspill.base.values import MemoryUse
from overspill.planning.workload import Arrangement, Use, Workload

__all__ = ["MemoryForecast", "Verdict", "memory_by_device", "verdict_of"]


Verdict: TypeAlias = Literal["fits on the GPU", "partial GPU offload possible", "CPU only", "does not fit"]


@dataclass(frozen=True, slots=True)
class MemoryForecast(MemoryUse):
    """The bytes that a placement needs on a device, and the bytes that are free there."""

    free_bytes: int
    """Free on the device before the model is loaded."""
    margin_bytes: int = 0
    """To be left free of them."""

    @property
    def room_bytes(self) -> int:
        """Bytes that the placement leaves free, beyond the margin."""
        return max(0, self.free_bytes - self.total_bytes - self.margin_bytes)

    @property
    def missing_bytes(self) -> int:
        """Bytes that the device has too few of; 0 if the placement fits."""
        return max(0, self.total_bytes + self.margin_bytes - self.free_bytes) if self.total_bytes else 0


def _fits(use: MemoryForecast) -> bool:
    return use.missing_bytes == 0


def memory_by_device(
    work: Workload, use: Use, compute: Sequence[int], pools: Mapping[int, int]
) -> dict[str, MemoryForecast]:
    """Return the bytes needed and free on each device.

    ``compute`` has the bytes of compute buffers by device, ``pools`` those for a cache of experts.
    """
    margins = [work.settings.margin_bytes] * work.cpu + [0]
    return {
        device.name: MemoryForecast(
            use.weights_bytes[number] + pools.get(number, 0),
            use.kv_bytes[number],
            compute[number],
            device.memory_bytes,
            margins[number],
        )
        for number, device in enumerate(work.devices)
    }


def verdict_of(work: Workload, arranged: Arrangement, memory: Mapping[str, MemoryForecast]) -> Verdict:
    """Return whether an arrangement fits, and whether GPUs hold all of it, a part, or nothing."""
    if not all(map(_fits, memory.values())):
        return "does not fit"
    places = {*arranged.kv, arranged.output, *(device for layer in arranged.groups for device in layer)}
    if work.cpu not in places:
        return "fits on the GPU"
    return "CPU only" if places == {work.cpu} else "partial GPU offload possible"
