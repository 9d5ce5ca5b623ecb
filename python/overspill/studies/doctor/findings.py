"""Findings: what would make decoding slow on a machine, the reading that shows it, and advice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from overspill.base.checks import as_integer, check_choice
from overspill.base.units import format_bytes, format_count, format_rate
from overspill.base.values import LoadMode
from overspill.header.info import ModelInfo
from overspill.header.tensor_names import part_of
from overspill.machine.hardware import Hardware
from overspill.machine.measure import products_name, weights_name
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast
from overspill.planning.offload import place_and_forecast
from overspill.planning.settings import prompt_length
from overspill.studies.doctor.machine import Machine

__all__ = ["Finding", "examine"]

Severity: TypeAlias = Literal["bad", "warning", "fine"]

_ORDER: tuple[Severity, ...] = ("bad", "warning", "fine")

# What ggml calls a set of instructions, and the flags of /proc/cpuinfo that its code for it needs.
_BASIC = {"AVX": "avx", "F16C": "f16c", "FMA": "fma", "AVX2": "avx2", "NEON": "asimd", "DOTPROD": "asimddp"}
_WIDE = {
    "AVX512": "avx512f avx512cd avx512vl avx512dq avx512bw",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AVX_VNNI": "avx_vnni",
    "AMX_INT8": "amx_tile amx_int8",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
}
_SWAP_TO_MENTION_BYTES = 64 << 20
_CALM_SWAPPINESS = 10
_MANY_FAULTS_PER_S = 100.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of a machine or a model, and its result."""

    severity: Severity
    title: str
    reading: str
    """The figures that it rests on, in words, with units."""
    advice: str = ""
    """What to do; empty if nothing is to be done."""


def examine(
    info: ModelInfo | None = None,
    *,
    n_threads: int | None = None,
    placement: Placement | None = None,
    load_mode: LoadMode = "mmap",
    machine: Machine | None = None,
    hardware: Hardware | None = None,
) -> list[Finding]:
    """Return findings on what would make decoding slow; nothing is loaded or measured.

    Parameters
    ----------
    info
        A model's header. Default: only the machine is checked.
    n_threads
        CPU threads of the model, 1 to 512. Default: the physical cores, as for :class:`overspill.Model`.
    placement
        The model's placement. Default: the plan.
    load_mode
        As for :class:`overspill.Model`.
    machine, hardware
        Facts of the machine, and its speeds. Default: those of this machine, read now.

    Returns
    -------
    list
        The worst first.

    Raises
    ------
    ValueError
        ``n_threads`` or ``load_mode`` is out of its range, or the placement is for another model or other devices.
    """
    if n_threads is not None:
        n_threads = as_integer("n_threads", n_threads, 1, 512)
    check_choice("load_mode", load_mode, get_args(LoadMode))
    if placement is not None and info is None:
        raise ValueError("placement needs the info of its model")
    machine = Machine.read() if machine is None else machine
    n_threads = machine.n_cores if n_threads is None else n_threads
    if hardware is None:
        hardware = Hardware.here(info, measure=False, n_threads=n_threads)
        if machine.available_bytes is not None:
            cpu = replace(hardware.cpu, memory_bytes=machine.available_bytes)
            hardware = replace(hardware, devices=(*hardware.gpus, cpu))
    found = [
        *_instructions(machine),
        *_gpus(machine),
        *_threads(machine, n_threads),
        *_load(machine, n_threads),
        *_swap(machine),
        *_page_faults(machine),
        *_bandwidth(hardware, machine.kernels),
    ]
    if info is not None:
        found += _model(info, machine, hardware, placement, load_mode)
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


# --- the checks


def _instructions(machine: Machine) -> Iterator[Finding]:
    def missing(sets: Mapping[str, str]) -> list[str]:
        return [
            name
            for name, flags in sets.items()
            if name not in machine.built_for and machine.cpu_flags.issuperset(flags.split())
        ]

    basic, wide = missing(_BASIC), missing(_WIDE)
    if "AVX512_VNNI" in machine.built_for and "AVX_VNNI" in wide:
        wide.remove("AVX_VNNI")  # the same, half as wide
    used = ", ".join(name for name in (_BASIC | _WIDE) if name in machine.built_for) or "none of them"
    advice = (
        "install overspill from source on this machine, or the portable build, which takes the best code for the CPU "
        "at hand (docs/building.md)"
    )
    if basic or wide:
        yield Finding(
            "bad" if basic else "warning",
            "llama.cpp was built for a lesser CPU",
            f"the CPU also has {', '.join(basic + wide)}, and the build uses {used}",
            advice,
        )
    elif machine.cpu_flags:
        yield Finding("fine", "llama.cpp uses what the CPU has", f"the build uses {used}")
    if "sse2" in machine.cpu_flags and "avx2" not in machine.cpu_flags:
        guest = "hypervisor" in machine.cpu_flags
        yield Finding(
            "bad" if guest else "warning",
            "The CPU has no AVX2",
            f"/proc/cpuinfo has {len(machine.cpu_flags)} flags, without avx2"
            + (" and with hypervisor: a virtual machine" if guest else ""),
            "let the virtual machine have the host's CPU model (QEMU: -cpu host)"
            if guest
            else "weights with 4 or 8 bits suffer most from it: leave as much as possible to a GPU",
        )


def _gpus(machine: Machine) -> Iterator[Finding]:
    here = [device for device in machine.devices if device.is_gpu]
    lost = [backend for backend in machine.gpu_backends if all(device.backend != backend for device in here)]
    known = f"NVIDIA's driver lists {', '.join(machine.nvidia_gpus) or 'no GPU'}"
    hidden = machine.visible_cuda_devices
    for backend in lost:
        reading = f"llama.cpp lists {', '.join(device.name for device in machine.devices)}"
        advice = f"install a driver for it that {backend} of this build can use; in a container, pass the GPU through"
        if backend == "CUDA":
            reading += f"; {known}"
            if hidden is not None:
                reading += f'; CUDA_VISIBLE_DEVICES is "{hidden}"'
                advice = "unset CUDA_VISIBLE_DEVICES, or name a GPU there"
            elif machine.nvidia_gpus:
                advice = "update NVIDIA's driver to one for this build's CUDA; in a container, use --gpus all"
        yield Finding("bad", f"Built with {backend}, but no GPU was found for it", reading, advice)
    if machine.nvidia_gpus and not machine.gpu_backends:
        yield Finding(
            "bad",
            "This build cannot use the GPU",
            f"{known}, and the build has no backend but CPU and RPC",
            "install overspill with CUDA (docs/building.md)",
        )
    elif here and not lost:
        sizes = (f"{gpu.name}, {gpu.description}: {format_bytes(gpu.free_bytes)} free" for gpu in here)
        yield Finding("fine", "GPUs were found", "; ".join(sizes))


def _threads(machine: Machine, n_threads: int) -> Iterator[Finding]:
    threads, cores = format_count(n_threads, "thread"), format_count(machine.n_cores, "physical core")
    if n_threads > machine.n_cores:
        yield Finding(
            "warning",
            "More threads than physical cores",
            f"{threads} on the {cores} that this process may use",
            f"{machine.n_cores} for n_threads (--threads): more of them wait for the same memory, and for each other",
        )
    quota = machine.quota_cpus
    if quota is not None and quota < min(n_threads, machine.n_cores):
        yield Finding(
            "bad",
            "The control group allows less than the threads need",
            f"the time of {quota:g} CPUs for {threads}",
            f"{max(1, math.floor(quota))} for n_threads (--threads), or a container with more CPUs: threads that spent "
            "the time are stopped, and the others wait for them",
        )
    elif n_threads <= machine.n_cores:
        yield Finding("fine", "No more threads than physical cores", f"{threads} on {cores}")


def _load(machine: Machine, n_threads: int) -> Iterator[Finding]:
    load, n_cpus = machine.load, machine.n_logical_cpus
    if load is None or n_cpus is None:
        return
    reading = f"a load of {load:.1f} in the last minute on {format_count(n_cpus, 'logical CPU')}"
    # A desktop itself takes half a CPU.
    if load + n_threads > n_cpus + 0.5:
        yield Finding(
            "bad" if load >= n_cpus else "warning",
            "Other programs keep the cores busy",
            f"{reading}, before {format_count(n_threads, 'thread')} of the model",
            "end them, or leave cores to them with fewer threads (--threads): all threads wait for the one that was "
            "interrupted; if a model runs now, look again afterwards",
        )
    else:
        yield Finding("fine", "The cores are free", reading)


def _swap(machine: Machine) -> Iterator[Finding]:
    used, total, swappiness = machine.swap_used_bytes, machine.swap_total_bytes, machine.swappiness
    if used is None or total is None:
        return
    reading = f"{format_bytes(used)} of {format_bytes(total)} in use" if total else "there is no swap"
    reading += "" if swappiness is None or not total else f", swappiness {swappiness}"
    if used >= _SWAP_TO_MENTION_BYTES:
        advice = "end programs that need much RAM"
        if swappiness is None or swappiness > _CALM_SWAPPINESS:
            advice += f", and lower the swappiness (sysctl vm.swappiness={_CALM_SWAPPINESS})"
        yield Finding(
            "warning",
            "Swap is in use",
            reading,
            f'{advice}; the load mode "mlock" keeps weights from being swapped out',
        )
    else:
        yield Finding("fine", "Nothing is swapped out", reading)


def _page_faults(machine: Machine) -> Iterator[Finding]:
    rate = machine.major_faults_per_s
    if rate is not None:
        many = rate >= _MANY_FAULTS_PER_S
        yield Finding(
            "warning" if many else "fine",
            "Programs wait for pages from the disk" if many else "No program waits for pages from the disk",
            f"{rate:.0f} major page faults per second, all programs together",
            "make room in RAM; if a model runs now, not all of it has room" if many else "",
        )


def _bandwidth(hardware: Hardware, kernels: Mapping[str, str]) -> Iterator[Finding]:
    cpu = hardware.cpu
    speed = format_rate(cpu.bandwidth_bytes_per_s)
    by_type = ""
    for weights, reads in cpu.plain_reads.items():
        if (rate := cpu.rates.get(weights)) is not None:
            products = products_name(kernels.get(weights.partition(":")[0], "llama.cpp"))
            by_type += f"; {weights_name(weights)} {format_rate(rate)}, {rate / reads:.2f} of plain reads"
            by_type += f" (products of {products})"
    if hardware.source == "assumed":
        yield Finding(
            "fine",
            "The speed of this machine is assumed in part",
            f"not all of it is measured yet; RAM counts with {speed}{by_type}",
            "overspill plan MODEL measures what counts for a model, in seconds",
        )
    else:
        yield Finding(
            "fine",
            f"The speed of RAM is {hardware.source}",
            f"{speed} of weights with {format_count(hardware.n_threads, 'thread')}: a token takes at least the time to "
            f"read its weights{by_type}",
        )


def _model(
    info: ModelInfo, machine: Machine, hardware: Hardware, placement: Placement | None, load_mode: LoadMode
) -> Iterator[Finding]:
    options = {"offload": "auto" if placement is None else placement, "load_mode": load_mode}
    placement, outlook = place_and_forecast(info, hardware, options)
    cpu = hardware.cpu.name
    in_ram = {name for name, device in placement.tensors().items() if device == cpu}
    sizes = {name: n_bytes for name, _, _, n_bytes in info.tensors if name in in_ram}
    # Of the embedding a token reads a row.
    read = {name: n_bytes for name, n_bytes in sizes.items() if part_of(name) != "embedding"}
    experts = sum(n_bytes for name, n_bytes in read.items() if part_of(name) == "experts")
    what = "experts" if experts > sum(read.values()) / 2 else "weights"
    yield from _memory(outlook, cpu, what, experts or sum(sizes.values()), load_mode)

    gpus = [gpu for gpu in hardware.gpus if gpu.name in placement.devices_used and gpu.copies_host_weights]
    is_slow = gpus and gpus[0].copy_bytes_per_s(pinned=True) > 1.2 * gpus[0].copy_bytes_per_s(pinned=False)
    has_room = not outlook.memory[cpu].missing_bytes and not (gpus and gpus[0].registers_host_memory)
    if is_slow and read and load_mode in ("mmap", "mmap+mlock") and not outlook.settings.pin_weights and has_room:
        yield Finding(
            "warning",
            "Weights in RAM are not pinned, which makes prompts slow",
            f"{outlook.weights_in_ram} Prompts: {_prompts(outlook)}",
            f'the load mode "read" (--load-mode read): {format_bytes(outlook.memory[cpu].free_bytes)} of RAM are '
            "available; loading takes longer, and copies of pinned memory are faster",
        )


def _prompts(outlook: Forecast) -> str:
    rate, first_s = outlook.prompt_tokens_per_s, outlook.time_to_first_token_s
    return f"about {rate:.3g} tokens/s, {first_s:.2g} s to the first token after {prompt_length(outlook.settings)}"


def _memory(outlook: Forecast, cpu: str, what: str, n_bytes: int, load_mode: LoadMode) -> Iterator[Finding]:
    advice = "; or ".join(outlook.remedies)
    for name, use in outlook.memory.items():
        if use.missing_bytes and name != cpu:
            reading = (
                f"{format_bytes(use.total_bytes)} are needed and {format_bytes(use.margin_bytes)} to be left, and "
                f"{format_bytes(use.free_bytes)} are free"
            )
            yield Finding("bad", f"{name} has too little memory", reading, advice)
    use = outlook.memory[cpu]
    reading = (
        f"{format_bytes(n_bytes)} of {what}, {format_bytes(use.total_bytes)} with all else, and "
        f"{format_bytes(use.free_bytes)} of RAM are available"
    )
    if use.missing_bytes:
        mapped = load_mode in ("mmap", "mmap+mlock")
        reading += f": about {outlook.tokens_per_s:.2g} tokens/s, reading from the disk" if mapped else ""
        yield Finding("bad", f"RAM is smaller than the {what} that stay in it", reading, advice)
    else:
        yield Finding(
            "fine", f"RAM holds the {what} that stay in it" if use.weights_bytes else "RAM is spared", reading
        )
    if outlook.verdict != "does not fit":
        speed = f"about {outlook.tokens_per_s:.3g} tokens/s; prompts: {_prompts(outlook)}"
        yield Finding("fine", "What to expect of this model", f"{speed}, {outlook.verdict}. {outlook.reason}", advice)
