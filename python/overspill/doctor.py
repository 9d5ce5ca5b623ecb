"""Say what would make decoding slow here, each finding from a reading of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from overspill import _core
from overspill.device import devices, physical_cores
from overspill.hardware import Hardware
from overspill.info import ModelInfo
from overspill.placement_table import format_bytes
from overspill.planner import Forecast, plan
from overspill.types import Device, LoadMode

__all__ = ["Finding", "Readings", "diagnose", "examine", "read_machine"]

# What a kernel needs (the names of /proc/cpuinfo), and what llama.cpp's build calls it, the most useful last.
_INSTRUCTION_SETS = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI", "amx_int8": "AMX_INT8"}
_BUSY_SHARE = 0.25  # of a core, by other programs


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    severity: Literal["fine", "warning", "bad"]
    title: str
    reading: str
    """The figures that it comes from."""
    advice: str = ""
    """What to do; empty if there is nothing to do."""


@dataclass(frozen=True)
class Readings:
    """What was read of the machine."""

    cpu_flags: frozenset[str]
    """Instruction sets that the CPU has, by Linux's names; empty where they are not known."""
    build_features: Mapping[str, str]
    """What llama.cpp's CPU backend was built for, by its names."""
    devices: Sequence[Device]
    gpu_backends: Sequence[str]
    """GPU backends that this build has."""
    physical_cores: int
    load_average: float
    """Programs that wanted to run, over the last minute; 0 where it is not known."""
    ram_bytes: int
    """In the machine."""
    swap_used_bytes: int

    @property
    def gpus(self) -> list[Device]:
        """GPUs of this machine, without servers'."""
        return [one for one in self.devices if one.kind in ("gpu", "integrated_gpu") and one.backend != "RPC"]


def read_machine(root: Path = Path("/")) -> Readings:
    """Read what Linux and llama.cpp say; ``root`` is where ``proc`` lies."""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    memory = {
        name: int(value) * 1024
        for name, value in re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    }
    load = _text(root / "proc/loadavg").split()
    cpu = _core.system_info().partition("CPU :")[2]
    return Readings(
        frozenset(flags[1].split()) if flags else frozenset(),
        dict(re.findall(r"(\w+) = (\w+)", cpu)),
        devices(),
        list(_core.GPU_BACKENDS),
        physical_cores(),
        float(load[0]) if load else 0.0,
        memory.get("MemTotal", 0),
        memory.get("SwapTotal", 0) - memory.get("SwapFree", 0),
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def examine(
    model: str | os.PathLike[str] | ModelInfo | None = None,
    *,
    n_threads: int | None = None,
    load_mode: LoadMode = "mmap",
    n_ctx: int | None = None,
) -> list[Finding]:
    """Say what would make decoding slow on this machine, with this model if one is given.

    Parameters
    ----------
    model
        A GGUF file or its header.
    n_threads, load_mode, n_ctx
        As for :class:`overspill.Model`.
    """
    expected = None
    if model is not None:
        info = model if isinstance(model, ModelInfo) else ModelInfo.from_file(model)
        # Whether it fits does not depend on speeds, so that nothing needs to be measured.
        planned = plan(info, hardware=Hardware.here(info, measure=False), n_ctx=n_ctx, load_mode=load_mode)
        expected = planned.forecast()
    return diagnose(read_machine(), expected, n_threads=n_threads, load_mode=load_mode)


def diagnose(
    readings: Readings, expected: Forecast | None = None, *, n_threads: int | None = None, load_mode: LoadMode = "mmap"
) -> list[Finding]:
    """Make findings of readings, and of what a plan for a model expects."""
    findings = [
        _instruction_sets(readings),
        _gpu_build(readings),
        _threads(readings, n_threads),
        _other_programs(readings),
        _swap(readings),
    ]
    if expected is not None:
        findings += [_ram(expected), *_pinned(readings, expected, load_mode)]
    return findings


def _instruction_sets(readings: Readings) -> Finding:
    title = "instruction sets of the CPU"
    present = [name for flag, name in _INSTRUCTION_SETS.items() if flag in readings.cpu_flags]
    unused = [name for name in present if readings.build_features.get(name, "0") == "0"]
    if not readings.cpu_flags:
        return Finding("fine", title, "not known on this system")
    used = ", ".join(name for name in present if name not in unused) or "none of AVX2 and later"
    if not unused:
        return Finding("fine", title, f"the build uses what the CPU has: {used}")
    return Finding(
        "bad" if "AVX2" in unused else "warning",
        title,
        f"the CPU has {', '.join(unused)}, which the build does not use; it uses {used}",
        "install overspill from source on this machine, or a wheel with plugins for every CPU (docs/building.md): "
        "10 instead of 45 tokens/s have been seen for want of AVX2",
    )


def _gpu_build(readings: Readings) -> Finding:
    missing = [name for name in readings.gpu_backends if all(device.backend != name for device in readings.devices)]
    if missing:
        return Finding(
            "bad",
            "GPU",
            f"the build has {', '.join(missing)}, and finds no GPU for it",
            "look whether the driver is there and new enough (nvidia-smi), and whether the build is for this GPU's "
            "architecture",
        )
    names = ", ".join(f"{gpu.name} ({gpu.description}), {format_bytes(gpu.free_bytes)} free" for gpu in readings.gpus)
    return Finding("fine", "GPU", names or "none, and the build is for none")


def _threads(readings: Readings, n_threads: int | None) -> Finding:
    n, cores = n_threads or readings.physical_cores, readings.physical_cores
    reading = f"{n} threads on {cores} physical cores"
    if n > cores:
        return Finding(
            "warning",
            "threads",
            reading,
            f"use at most {cores}: decoding waits for memory, and more threads wait for each other",
        )
    return Finding("fine", "threads", reading)


def _other_programs(readings: Readings) -> Finding:
    reading = f"load {readings.load_average:.1f} on {readings.physical_cores} cores in the last minute"
    if readings.load_average > _BUSY_SHARE * readings.physical_cores:
        return Finding(
            "warning",
            "other programs",
            reading,
            "llama.cpp's threads wait for the slowest of them, so one busy core slows all of them down: end what is "
            "not needed, or use fewer threads; measure (overspill plan, overspill tune) when the machine is idle",
        )
    return Finding("fine", "other programs", reading)


def _swap(readings: Readings) -> Finding:
    reading = f"{format_bytes(readings.swap_used_bytes)} of swap in use"
    if readings.swap_used_bytes > readings.ram_bytes // 100:
        return Finding(
            "warning",
            "swap",
            reading,
            'weights that are swapped out are read from the disk: free memory, or load_mode="mlock"',
        )
    return Finding("fine", "swap", reading)


def _ram(expected: Forecast) -> Finding:
    use = list(expected.memory.values())[-1]
    reading = f"{format_bytes(use.total_bytes)} are to lie in RAM, of which {format_bytes(use.free_bytes)} are free"
    if use.missing_bytes:
        return Finding(
            "bad",
            "RAM",
            reading,
            f"{format_bytes(use.missing_bytes)} are read from the disk again for every token: 1.6 instead of 33 "
            f"tokens/s have been seen on one GPU. {'; '.join(expected.remedies) or 'a smaller model, or more RAM'}",
        )
    return Finding("fine", "RAM", reading)


def _pinned(readings: Readings, expected: Forecast, load_mode: LoadMode) -> list[Finding]:
    gpus = [
        gpu.name for gpu in readings.gpus if expected.memory.get(gpu.name) and expected.memory[gpu.name].weights_bytes
    ]
    cpu = list(expected.memory.values())[-1]
    if not gpus or not cpu.weights_bytes:
        return []
    reading = f"{format_bytes(cpu.weights_bytes)} of weights lie in RAM beside {', '.join(gpus)}, load_mode {load_mode}"
    if "mmap" in load_mode and cpu.missing_bytes == 0:
        return [
            Finding(
                "warning",
                "pinned memory",
                reading,
                'mapped files cannot be pinned, which slows prompts down: load_mode="read" pins them (prompts 36 to '
                "56 % faster have been reported), and takes longer to load",
            )
        ]
    return [Finding("fine", "pinned memory", reading)]
