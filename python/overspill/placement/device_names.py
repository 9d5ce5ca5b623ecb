"""The names of the devices that a placement may use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, Protocol, TypeAlias

__all__ = ["CPU", "memory_name"]


CPU: Final = "CPU"
"""llama.cpp's name for it."""


def memory_name(device: str) -> str:
    """Return what a device's memory is called: ``RAM`` for the CPU's, otherwise the device's name."""
    return "RAM" if device == CPU else device


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _HasDevices(Protocol):
    @property
    def devices(self) -> Iterable[_Named]: ...


Devices: TypeAlias = _HasDevices | Iterable[str | _Named]


def _name(device: str | _Named) -> str:
    name = device if isinstance(device, str) else device.name
    if not isinstance(name, str) or not name:
        raise TypeError(f"devices must be names, or have one, not {device!r}")
    return name


def _gpu_names(devices: Devices) -> list[str]:
    if isinstance(devices, str):
        raise TypeError(f"devices must be a sequence, such as [{devices!r}]")
    listed = list(devices if isinstance(devices, Iterable) else devices.devices)
    # What is neither a GPU nor the CPU computes in the CPU's memory.
    names = [_name(device) for device in listed if getattr(device, "kind", "gpu") not in ("cpu", "accelerator")]
    names = [name for name in names if name.upper() != CPU]
    for name, count in Counter(name.lower() for name in names).items():
        if count > 1:
            raise ValueError(f"devices: {name} is given {count} times")
    return names
