"""The names of the devices that a placement may use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol, TypeAlias

from overspill.base.checks import as_list, as_text, device_index, shown

__all__ = ["CPU", "Devices", "device_name", "find_device", "gpu_names", "listed_devices", "memory_name"]

CPU: Final = "CPU"
"""llama.cpp's name for the CPU."""


def memory_name(device: str) -> str:
    """Return the name of a device's memory: ``RAM`` for the CPU's, otherwise the device's name."""
    return "RAM" if device == CPU else device


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _HasDevices(Protocol):
    @property
    def devices(self) -> Iterable[_Named]: ...


Devices: TypeAlias = _HasDevices | Iterable[str | _Named]
"""Names of devices, or objects that have a name; or an object with such ``devices``."""


def device_name(device: str | _Named) -> str:
    """Return the name of a device.

    Raises
    ------
    TypeError
        The name is empty or no text.
    """
    name = device if isinstance(device, str) else getattr(device, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"devices must be names, or have one, not {shown(device)}")
    return as_text("devices", name)


def listed_devices(devices: Devices) -> list[Any]:
    """Return the devices, or raise a TypeError if they are no sequence, and have none."""
    return as_list("devices", getattr(devices, "devices", devices), "names, such as ['CUDA0'],")


def gpu_names(devices: Devices) -> list[str]:
    """Return the names of the GPUs among ``devices``.

    Raises
    ------
    TypeError
        ``devices`` is one text, or one of them has no name.
    ValueError
        A name is given twice.
    """
    listed = listed_devices(devices)
    # Accelerators compute in the CPU's memory.
    names = [device_name(device) for device in listed if getattr(device, "kind", "gpu") not in ("cpu", "accelerator")]
    names = [name for name in names if name.upper() != CPU]
    for name, count in Counter(name.lower() for name in names).items():
        if count > 1:
            raise ValueError(f"devices: {name} is given {count} times")
    return names


def find_device(names: Sequence[str], wanted: str) -> str:
    """Return the one of ``names``, the CPU's last, that is meant: a name in any case, ``"cpu"`` or ``"gpu"``.

    Raises
    ------
    TypeError
        ``wanted`` is no text.
    ValueError
        There is no such device.
    """
    if not isinstance(wanted, str):
        raise TypeError(f"device must be a string, not {shown(wanted)}")
    if (index := device_index(names, wanted)) is not None:
        return names[index]
    if wanted.casefold() == "gpu":
        raise ValueError("device: there is no GPU among the devices of this placement")
    raise ValueError(f'device must be one of {", ".join(names)}, "cpu" or "gpu", not {shown(wanted)}')
