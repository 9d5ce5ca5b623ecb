"""Facts of a machine, read from it: CPU, GPUs, control groups, memory and load."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from overspill._core import GPU_BACKENDS, cpu_features, cpu_kernel_types, cpu_kernels
from overspill.base.host import available_ram_bytes, control_groups, physical_cores
from overspill.base.values import Device
from overspill.machine.devices import devices

__all__ = ["Machine"]

T = TypeVar("T")

_ROOT = Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts of a machine; None for a fact that it does not tell."""

    cpu_flags: frozenset[str]
    """Flags of ``/proc/cpuinfo``."""
    built_for: frozenset[str]
    """Instruction sets that llama.cpp's CPU backend uses, by its names."""
    kernels: Mapping[str, str]
    """The instruction set of our products by the type of weights; all other types have llama.cpp's."""
    devices: tuple[Device, ...]
    gpu_backends: tuple[str, ...]
    """GPU backends of this build."""
    nvidia_gpus: tuple[str, ...]
    """Names of the GPUs that NVIDIA's driver knows."""
    visible_cuda_devices: str | None
    """The variable ``CUDA_VISIBLE_DEVICES``."""
    n_cores: int
    """Physical cores that the process may use."""
    n_logical_cpus: int | None
    """Logical CPUs of the whole machine."""
    quota_cpus: float | None
    """CPU seconds per second that control groups allow."""
    available_bytes: int | None
    """RAM that new processes can have without swapping."""
    swap_total_bytes: int | None
    swap_used_bytes: int | None
    swappiness: int | None
    load: float | None
    """Load average of the last minute: processes that ran or waited for a CPU."""
    major_faults_per_s: float | None
    """Major page faults of all programs: pages that were read from a disk."""

    @classmethod
    def read(cls, root: Path = _ROOT, *, sample_s: float = 0.5) -> Machine:
        """Return the facts of this machine; page faults are counted for ``sample_s`` seconds, with 0 not at all.

        ``root`` is the folder that has ``proc`` and ``sys``.
        """
        cpuinfo, status = _text(root / "proc/cpuinfo"), _text(root / "proc/self/status")
        meminfo = {
            name: int(kib) << 10 for name, kib in re.findall(r"(?m)^(\w+):\s*(\d+) kB", _text(root / "proc/meminfo"))
        }
        flags = re.search(r"(?m)^(?:flags|Features)\s*:(.*)", cpuinfo)
        allowed = re.search(r"(?m)^Cpus_allowed_list:\s*(\S+)", status)
        swap_total, swap_free = meminfo.get("SwapTotal"), meminfo.get("SwapFree")
        return cls(
            cpu_flags=frozenset(flags[1].split()) if flags else frozenset(),
            built_for=frozenset(cpu_features()),
            kernels=dict.fromkeys(cpu_kernel_types(), cpu_kernels()),
            devices=tuple(devices()),
            gpu_backends=tuple(GPU_BACKENDS),
            nvidia_gpus=tuple(_nvidia_gpus(root)),
            visible_cuda_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
            n_cores=physical_cores(root, _cpus(allowed[1]) if allowed else None),
            n_logical_cpus=len(re.findall(r"(?m)^cpu\d+ ", _text(root / "proc/stat"))) or None,
            quota_cpus=min(_quotas(root), default=None),
            available_bytes=available_ram_bytes(root),
            swap_total_bytes=swap_total,
            swap_used_bytes=None if swap_total is None or swap_free is None else swap_total - swap_free,
            swappiness=_parsed(_text(root / "proc/sys/vm/swappiness"), int),
            load=_parsed(_text(root / "proc/loadavg").partition(" ")[0], float),
            major_faults_per_s=_major_faults_per_s(root / "proc/vmstat", sample_s) if sample_s > 0 else None,
        )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parsed(text: str, kind: Callable[[str], T]) -> T | None:
    try:
        return kind(text)
    except ValueError:
        return None


def _cpus(text: str) -> set[int]:
    """Return the numbers in a list such as ``0-3,8``."""
    ends = (part.split("-") for part in text.split(","))
    return {cpu for first, *last in ends for cpu in range(int(first), int(last[0] if last else first) + 1)}


def _nvidia_gpus(root: Path) -> Iterator[str]:
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        name = re.search(r"(?m)^Model:\s*(.+?)\s*$", _text(file))
        yield name[1] if name else file.parent.name


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU seconds per second that each control group allows."""
    for group, unified in control_groups(root, "cpu"):
        texts = (
            _text(group / "cpu.max").split()
            if unified
            else [_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")]
        )
        figures = [_parsed(text, int) for text in texts]  # "max" or -1 where there is no limit
        if len(figures) == 2 and figures[0] and figures[1] and figures[0] > 0:
            yield figures[0] / figures[1]


def _major_faults_per_s(file: Path, sample_s: float) -> float | None:
    def count() -> int | None:
        found = re.search(r"(?m)^pgmajfault (\d+)", _text(file))
        return int(found[1]) if found else None

    start, before = time.monotonic(), count()
    if before is None:
        return None
    time.sleep(sample_s)
    after = count()
    return None if after is None else (after - before) / (time.monotonic() - start)
