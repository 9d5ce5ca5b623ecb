"""What the machine can do, as the planner needs it: memory, and the speed of decoding on each device."""

from __future__ import annotations

import json
import logging
import math
import operator
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from overspill import _core
from overspill.machine.devices import devices, physical_cores
from overspill.header.info import ModelInfo
from overspill.base.values import Device, as_integer

__all__ = [
    "DeviceSpec",
    "Hardware",
    "available_ram_bytes",
    "cache_folder",
    "control_groups",
    "parse_bytes",
    "parse_rate",
    "replace_json",
    "user_folder",
]

logger = logging.getLogger("overspill")

Size: TypeAlias = int | str
"""Bytes: an integer, or a text with a unit, such as ``"24GiB"``."""
Rate: TypeAlias = float | str
"""Bytes per second: a number, or a text with a unit, such as ``"936GB/s"``."""
Report: TypeAlias = Callable[[str, float], object]
"""Given what is measured next, and the share that is done, 0 to 1."""

_LARGEST = 2**50
_MOST_INTERRUPTIONS_PER_S = 20  # of each thread
_UNITS = {"B": 1.0} | {
    f"{prefix}{suffix}": float(base**power)
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_NUMBER = re.compile(r"\s*([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)\s*(.*?)\s*")


def _checked(name: str, value: float, shown: object, unit: str, low: float) -> float:
    if not low <= value <= _LARGEST:
        raise ValueError(f"{name} must be {'over 0' if low else '0'} to 2**50 {unit}, not {shown}")
    return value


def parse_bytes(name: str, value: Size) -> int:
    """Return a size in bytes.

    Parameters
    ----------
    name
        How errors call it.
    value
        An integer, or a text with a unit: B, kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024),
        in any case.

    Raises
    ------
    ValueError
        There is no unit, or it is none of those; it is negative, or over a pebibyte.
    """
    if not isinstance(value, str):
        try:
            return int(_checked(name, operator.index(value), value, "bytes", 0))
        except TypeError:
            raise TypeError(f'{name} must be bytes as an integer, or a text such as "24GiB", not {value!r}') from None
    found = _NUMBER.fullmatch(value)
    if found is None:
        raise ValueError(f'{name} must be a size such as "24GiB", not "{value}"')
    number, unit = found.groups()
    if unit.upper() not in _UNITS:
        raise ValueError(f'{name} must have a unit: "{number}GiB" or "{number}GB", not "{value}"')
    return int(_checked(name, float(number) * _UNITS[unit.upper()], f'"{value}"', "bytes", 0))


def parse_rate(name: str, value: Rate) -> float:
    """Return a rate in bytes per second.

    Parameters
    ----------
    name
        How errors call it.
    value
        A number, or a text with a unit: those of :func:`parse_bytes` or Mbit, Gbit, each with ``/s``.

    Raises
    ------
    ValueError
        There is no unit, or it is none of those; it is not over 0, or over a pebibyte per second.
    """
    smallest = 1.0
    if not isinstance(value, str):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f'{name} must be bytes per second, or a text such as "936GB/s", not {value!r}')
        return _checked(name, float(value), value, "bytes per second", smallest)
    found = _NUMBER.fullmatch(value)
    if found is None:
        raise ValueError(f'{name} must be a rate such as "936GB/s", not "{value}"')
    number, unit = found.groups()
    size, slash, second = (part.strip() for part in unit.partition("/"))
    scale = {"MBIT": 1e6 / 8, "GBIT": 1e9 / 8}.get(size.upper()) or _UNITS.get(size.upper())
    if scale is None or slash != "/" or second.lower() != "s":
        raise ValueError(f'{name} must have a unit: "{number}GB/s" or "{number}Gbit/s", not "{value}"')
    if size.endswith("b"):
        raise ValueError(f'{name}: write "{number}GB/s" for bytes or "{number}Gbit/s" for bits, not "{value}"')
    return _checked(name, float(number) * scale, f'"{value}"', "bytes per second", smallest)


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device, and what a decode costs on it."""

    name: str
    """llama.cpp's, such as ``CPU``, ``CUDA0`` or ``RPC0``; ``GPU0`` and so on for hardware that is not there."""
    kind: Literal["cpu", "gpu"]
    memory_bytes: int
    """What a model may use: free now, or given."""
    bandwidth_bytes_per_s: float
    """Reading weights for one token, where ``rates`` does not say: of F16, so little arithmetic is in it."""
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Measured bytes per second, each operation's own fixed cost included.

    By the type of weights, such as ``"q8_0"``; with ``":experts"`` for a choice of experts; with ``":kv"`` for
    attention to a KV cache of that type.
    """
    op_s: float = 0.0
    """Seconds that every other operation of the graph takes: norms, additions, activations."""
    hop_s: float = 0.0
    """Seconds that it costs to compute something on this device in between: there and back. 0 for the CPU."""
    link_bytes_per_s: float = math.inf
    """Between host and device: PCIe, or the network."""
    description: str = ""
    """The hardware's own name, or a server's endpoint."""
    copies_host_weights: bool = False
    """Whether it computes large batches with weights that lie in RAM, for which it keeps room for copies: as CUDA does,
    and servers do not."""

    def __post_init__(self) -> None:
        """Check the figures, which may come from a file."""
        if not self.name or self.kind not in ("cpu", "gpu"):
            raise ValueError(f'a device must have a name and the kind "cpu" or "gpu", not {self.name!r} {self.kind!r}')
        figures: dict[str, tuple[float, bool]] = {
            "memory_bytes": (self.memory_bytes, False),
            "bandwidth_bytes_per_s": (self.bandwidth_bytes_per_s, True),
            "op_s": (self.op_s, False),
            "hop_s": (self.hop_s, False),
            "link_bytes_per_s": (self.link_bytes_per_s, True),
            **{f"rates[{key!r}]": (rate, True) for key, rate in self.rates.items()},
        }
        for key, (value, positive) in figures.items():
            if not (value > 0 or (value == 0 and not positive)):
                raise ValueError(f"{self.name}: {key} must be {'over' if positive else 'at least'} 0, not {value}")

    def rate(self, weights: str) -> float:
        """Return the bytes per second for a key of ``rates``, or the bandwidth if that was not measured."""
        return self.rates.get(weights, self.bandwidth_bytes_per_s)

    def __str__(self) -> str:
        """Return one line."""
        hop = f" · {self.hop_s * 1e6:.0f} µs a visit" if self.hop_s else ""
        about = f" ({self.description})" if self.description else ""
        size, speed = self.memory_bytes / 2**30, self.bandwidth_bytes_per_s / 1e9
        return f"{self.name}{about}: {size:.1f} GiB · {speed:.1f} GB/s{hop}"


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices that a model can lie on."""

    devices: tuple[DeviceSpec, ...]
    """GPUs in llama.cpp's order, the CPU last."""
    source: Literal["measured", "given", "assumed"]
    """``assumed`` if any figure is neither measured nor given."""
    n_threads: int
    """Threads of the CPU."""

    def __post_init__(self) -> None:
        """Check that there is one CPU, at the end."""
        if [device.kind for device in self.devices] != ["gpu"] * (len(self.devices) - 1) + ["cpu"]:
            raise ValueError("hardware must be any number of GPUs and then one CPU")
        if len({device.name for device in self.devices}) < len(self.devices):
            raise ValueError("the devices must have different names")

    @property
    def cpu(self) -> DeviceSpec:
        """The CPU and its RAM."""
        return self.devices[-1]

    @property
    def gpus(self) -> tuple[DeviceSpec, ...]:
        """Everything else, devices of RPC servers too."""
        return self.devices[:-1]

    def device(self, name: str) -> DeviceSpec:
        """Return a device by its name, in any case; ``"gpu"`` is the first GPU.

        Raises
        ------
        ValueError
            There is no such device.
        """
        names = [device.name for device in self.devices]
        return self.devices[_index_of("device", name, names)]

    def without(self, taken: Mapping[str, int]) -> Hardware:
        """Return what is left where so many bytes are taken of each device's memory."""
        left = (
            replace(device, memory_bytes=max(0, device.memory_bytes - taken.get(device.name, 0)))
            for device in self.devices
        )
        return replace(self, devices=tuple(left))

    @classmethod
    def here(
        cls,
        info: ModelInfo | None = None,
        *,
        memory: Mapping[str, Size] | None = None,
        n_threads: int | None = None,
        measure: bool = True,
        refresh: bool = False,
        kv_type: str = "f16",
        no_host: bool = False,
        progress: Report | None = None,
    ) -> Hardware:
        """Return this machine, with RPC servers that were added; what is not known of it is measured.

        A measurement takes about 0.1 s for each device and type of weights. Results are kept in ``hardware.json`` in
        the user's cache folder, so that the next call measures nothing. They hold for a device, or the endpoint of
        an RPC server, for the number of threads and for this version of llama.cpp. What was measured of the CPU beside
        other programs that kept it busy is not kept.

        Parameters
        ----------
        info
            The model to be planned: the shapes and types of its weights are what is measured.
        memory
            The most that a model may use of a device, by its name, ``"cpu"`` or ``"gpu"``.
        n_threads
            Threads of the CPU, default the number of physical cores.
        measure
            False takes what is kept, and assumes the rest.
        refresh
            Measure anew, for example after an RPC server was started with other options.
        kv_type
            The type of the KV cache.
        no_host
            As the model will be loaded, see llama.cpp's ``--no-host``: it decides how its weights lie in RAM.
        progress
            Called before each measurement.

        Raises
        ------
        ValueError
            A device of ``memory`` is not there, or a size is none.
        Error
            A device cannot be used.
        """
        n_threads = physical_cores() if n_threads is None else as_integer("n_threads", n_threads, 1, 512)
        found = _usable(devices())
        caps = _caps(memory or {}, found)
        cache = _Cache(cache_folder() / "hardware.json")
        questions = [
            question for device in found for question in _questions(device, info, found, n_threads, kv_type, no_host)
        ]
        if measure:
            missing = [question for question in questions if refresh or question.key not in cache.figures]
            _answer(missing, cache, found, n_threads, no_host, progress)
        free_bytes = {device.name: device.free_bytes for device in found}
        free_bytes[found[-1].name] = available_ram_bytes() or free_bytes[found[-1].name]
        specs = []
        for device in found:
            known = {q.figure: cache.figures[q.key] for q in questions if q.device is device and q.key in cache.figures}
            cap = caps.get(device.name)
            # A backend that does not tell what is free says 0.
            room = free_bytes[device.name] if cap is None else min(cap, free_bytes[device.name] or cap)
            specs.append(_spec(device, room, known))
        complete = all(question.key in cache.figures for question in questions)
        return cls(tuple(specs), "measured" if complete else "assumed", n_threads)

    @classmethod
    def given(
        cls,
        *,
        ram: Size,
        vram: Size | Sequence[Size] = 0,
        gpu_bandwidth: Rate | Sequence[Rate] | None = None,
        ram_bandwidth: Rate | None = None,
        link: Rate | Sequence[Rate] | None = None,
        hop_s: float | None = None,
        op_s: float | None = None,
        roofline: bool = False,
        n_threads: int | None = None,
    ) -> Hardware:
        """Return hardware that is not there.

        ================================  ======================================================================
        dual-channel DDR4-2933, -3200     46.9, 51.2 GB/s (channels x 8 bytes x transfers)
        dual-channel DDR5-5600, -6400     89.6, 102.4 GB/s
        RTX 3060 12 GB, 3090, 4090, 5090  360, 936, 1008, 1792 GB/s (NVIDIA's data sheets)
        PCIe 3, 4, 5, x16                 12, 25, 50 GB/s of 15.8, 31.5, 63 (assumed: what copies reach)
        a hop to a GPU                    20 to 40 µs (assumed: launch, two copies and the waits for them)
        ================================  ======================================================================

        Parameters
        ----------
        ram
            Of it the model may use this much.
        vram
            The same of each GPU; 0: no GPU.
        gpu_bandwidth
            Of each GPU, or of all; default 936 GB/s, an RTX 3090's.
        ram_bandwidth
            Default 47 GB/s, dual-channel DDR4-2933.
        link
            Between host and GPU, of each or of all; default 25 GB/s, PCIe 4 x16.
        hop_s
            Seconds for moving to a GPU and back, default 30e-6.
        op_s
            Seconds for each small operation, default 3e-6 on a GPU and 2e-6 on a CPU.
        roofline
            Bytes over bandwidth alone: ``hop_s`` and ``op_s`` default to 0.
        n_threads
            Default the number of physical cores of this machine.

        Raises
        ------
        ValueError
            A size or a rate is none, or the lists are not of one length.
        """
        sizes = [parse_bytes("vram", size) for size in _listed(vram)]
        sizes = [] if sizes == [0] else sizes
        bandwidths = _for_each("gpu_bandwidth", gpu_bandwidth, "936GB/s", len(sizes))
        links = _for_each("link", link, "25GB/s", len(sizes))
        assumed = ram_bandwidth is None or (sizes and (gpu_bandwidth is None or link is None or hop_s is None))
        assumed = assumed or op_s is None
        if roofline:
            hop_s, op_s = hop_s or 0.0, op_s or 0.0
        gpus = [
            DeviceSpec(
                name=f"GPU{i}",
                kind="gpu",
                memory_bytes=size,
                bandwidth_bytes_per_s=bandwidth,
                op_s=3e-6 if op_s is None else op_s,
                hop_s=30e-6 if hop_s is None else hop_s,
                link_bytes_per_s=link_rate,
                copies_host_weights=True,
            )
            for i, (size, bandwidth, link_rate) in enumerate(zip(sizes, bandwidths, links, strict=True))
        ]
        cpu = DeviceSpec(
            name="CPU",
            kind="cpu",
            memory_bytes=parse_bytes("ram", ram),
            bandwidth_bytes_per_s=parse_rate("ram_bandwidth", "47GB/s" if ram_bandwidth is None else ram_bandwidth),
            op_s=2e-6 if op_s is None else op_s,
        )
        n_threads = physical_cores() if n_threads is None else as_integer("n_threads", n_threads, 1, 512)
        return cls((*gpus, cpu), "assumed" if assumed else "given", n_threads)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it; a link without limit is null."""
        listed = [asdict(device) for device in self.devices]
        for device in listed:
            device["rates"] = dict(device["rates"])
            if device["link_bytes_per_s"] == math.inf:
                device["link_bytes_per_s"] = None
        return {"devices": listed, "source": self.source, "n_threads": self.n_threads}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hardware:
        """Return what :meth:`to_dict` gave.

        Raises
        ------
        ValueError
            It is not of that form.
        """
        try:
            specs = tuple(
                DeviceSpec(**{**device, "link_bytes_per_s": _or_infinite(device["link_bytes_per_s"])})
                for device in data["devices"]
            )
            source = data["source"]
            if source not in ("measured", "given", "assumed"):
                raise ValueError(f"source must be measured, given or assumed, not {source!r}")
            return cls(specs, source, as_integer("n_threads", data["n_threads"], 1, 512))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no hardware that was saved: {error!r}") from None

    def __str__(self) -> str:
        """Return one line for each device."""
        return "\n".join(map(str, self.devices))


def _or_infinite(rate: float | None) -> float:
    return math.inf if rate is None else rate


def _listed(values: Any) -> list[Any]:
    return [values] if isinstance(values, str) or not isinstance(values, Sequence) else list(values)


def _for_each(name: str, values: Rate | Sequence[Rate] | None, default: str, n: int) -> list[float]:
    rates = [parse_rate(name, rate) for rate in _listed(default if values is None else values)]
    if len(rates) == 1:
        return rates * n
    if len(rates) != n:
        raise ValueError(f"{name} must be one rate, or one for each of the {n} GPUs, not {len(rates)}")
    return rates


def _index_of(argument: str, name: str, names: Sequence[str]) -> int:
    """Return which of ``names``, GPUs and then the CPU, is meant by a name in any case, "gpu" or "cpu"."""
    wanted = name.casefold()
    if wanted == "cpu":
        return len(names) - 1
    if wanted == "gpu" and len(names) > 1:
        return 0
    for i, known in enumerate(names):
        if wanted == known.casefold():
            return i
    raise ValueError(f"{argument} must be one of {', '.join(names)}, not {name}")


# --- this machine ------------------------------------------------------------------------------


def _usable(found: Sequence[Device]) -> list[Device]:
    """Return the devices that llama.cpp puts layers on, in its order, and the CPU last."""
    # src/llama.cpp, llama_prepare_model_devices: servers, then GPUs, integrated ones only where there is no other.
    servers = []
    for device in (device for device in found if device.backend == "RPC"):
        if device.total_bytes:
            servers.append(device)
        else:
            logger.warning("%s is left out: no RPC server answers at %s", device.name, device.description)
    gpus = [device for device in found if device.kind == "gpu" and device.backend != "RPC"]
    integrated = [device for device in found if device.kind == "integrated_gpu"]
    cpus = [device for device in found if device.kind == "cpu"]
    if not cpus:
        raise _core.Error("no CPU backend of llama.cpp was found: the installation is damaged, install overspill anew")
    return [*servers, *(gpus or integrated), cpus[0]]


def _caps(memory: Mapping[str, Size], found: Sequence[Device]) -> dict[str, int]:
    names = [device.name for device in found]
    return {
        names[_index_of("memory", name, names)]: parse_bytes(f"memory[{name!r}]", size) for name, size in memory.items()
    }


def available_ram_bytes(root: Path = Path("/")) -> int | None:
    """Return what new processes can have without swapping, as far as Linux and its control groups say."""
    try:
        available = re.search(r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    limits = [int(available[1]) * 1024] if available else []
    limits.extend(_group_rooms(root))
    return max(0, min(limits)) if limits else None


def control_groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the control groups that this process is in, and whether they are of version 2."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        unified = controllers == ""
        if not unified and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("" if unified else controller)
        folder = mount / path.lstrip("/")
        # In a container the path may be the host's, of which only the own part is mounted.
        for group in [folder, *folder.parents]:
            if group != mount and mount not in group.parents:
                break
            yield group, unified


def _group_rooms(root: Path) -> Iterator[int]:
    """Yield what each control group that this process is in leaves, file caches not counted as used."""
    for group, unified in control_groups(root, "memory"):
        if unified:
            limit, usage, caches = "memory.max", "memory.current", ("inactive_file", "active_file")
        else:
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            caches = ("total_inactive_file", "total_active_file")
        try:
            most = int((group / limit).read_text())  # "max" where there is no limit
            used = int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield most - used + sum(int(stat.get(cache, 0)) for cache in caches)
        except (OSError, ValueError):
            continue


def _last_level_cache_bytes() -> int:
    """Return the size of the CPU's last caches together, or of a large one if it is not known."""
    sizes = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]"):
        try:
            level = int((folder / "level").read_text())
            kib = int((folder / "size").read_text().strip().removesuffix("K"))
            sizes[level, (folder / "shared_cpu_list").read_text()] = kib * 1024
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) if last >= 2 else 32 << 20


# --- measuring ---------------------------------------------------------------------------------


class _Question(NamedTuple):
    """One figure of one device, and how it is called in the cache."""

    device: Device
    figure: str
    """A key of ``DeviceSpec.rates``, or one of the other figures."""
    key: tuple[str, str]
    text: str
    ask: Callable[[_core.DeviceMeter], float]


def _weight_shapes(info: ModelInfo) -> dict[str, tuple[str, int, int, int, int]]:
    """Return the shape that most bytes of each kind of weights have: type, n_in, n_out, n_experts, n_used."""
    sizes: defaultdict[str, Counter[tuple[str, int, int, int, int]]] = defaultdict(Counter)
    for name, kind, shape, n_bytes in info.tensors:
        looked_up = name.startswith("token_embd.") and not info.tied_embedding
        if len(shape) < 2 or looked_up or not name.endswith(".weight") or kind in ("i8", "i16", "i32", "i64", "f64"):
            continue
        n_in, n_out, *rest = shape
        if rest and re.search(r"_(ch)?exps\b", name):
            used = max(1, info.n_experts_used)
            sizes[f"{kind}:experts"][kind, n_in, n_out, rest[0], min(used, rest[0])] += n_bytes * used // rest[0]
        else:
            sizes[kind][kind, n_in, n_out * math.prod(rest), 0, 0] += n_bytes
    return {figure: counts.most_common(1)[0][0] for figure, counts in sizes.items()}


def _questions(
    device: Device, info: ModelInfo | None, found: Sequence[Device], n_threads: int, kv_type: str, no_host: bool
) -> Iterator[_Question]:
    is_cpu = device is found[-1]
    if device.backend == "RPC":
        others = [other for other in found if other.description == device.description]
        identity = f"RPC {device.description}, device {others.index(device)}"
    else:
        identity = f"{device.name}, {device.description}"
    if is_cpu:
        beside = _local_gpus(found)
        identity += f", {n_threads} threads" + (f", beside {'+'.join(beside)}" if beside else "")
        identity += ", no_host" if no_host else ""
    identity += f", llama.cpp {_core.LLAMA_CPP_COMMIT}"

    def question(figure: str, key: str, text: str, ask: Callable[[_core.DeviceMeter], float]) -> _Question:
        return _Question(device, figure, (identity, key), f"{device.name}: {text}", ask)

    def weights(figure: str, shape: tuple[str, int, int, int, int]) -> _Question:
        kind, n_in, n_out, n_experts, n_used = shape
        key = f"{kind} {n_in}x{n_out}" + (f"x{n_experts}, {n_used} used" if n_experts else "")
        return question(figure, key, f"weights in {kind.upper()}", lambda meter: meter.weight_rate(*shape)[0])

    yield weights("bandwidth", ("f16", 4096, 4096, 0, 0))
    n_embd = 4096
    if info is not None:
        n_embd = info.n_embd or n_embd
        for figure, shape in _weight_shapes(info).items():
            yield weights(figure, shape)
        heads = _heads(info)
        if heads is not None:
            yield question(
                f"{kv_type}:kv",
                f"{kv_type} KV cache, {heads[0]} of {heads[1]} heads of {heads[2]}",
                f"a KV cache in {kv_type.upper()}",
                lambda meter: meter.attention_bytes_per_s(kv_type, *heads, 1024),
            )
    yield question("op_s", f"operation {n_embd}", "small operations", lambda meter: meter.operation_s(n_embd))
    if not is_cpu:
        key = f"visit {n_embd}, {n_threads} threads"
        yield question("hop_s", key, "moving there and back", lambda meter: meter.visit_s(n_embd))
        yield question("link_bytes_per_s", "link", "the link", lambda meter: meter.link_bytes_per_s(16 << 20))


def _local_gpus(found: Sequence[Device]) -> list[str]:
    return [device.name for device in found[:-1] if device.backend != "RPC"]


def _heads(info: ModelInfo) -> tuple[int, int, int] | None:
    """Return heads, heads of the KV cache and their width, where they are the same in every layer."""
    key = f"{info.architecture}.attention."
    n_heads = info.metadata.get(f"{key}head_count")
    n_heads_kv = info.metadata.get(f"{key}head_count_kv", n_heads)
    if not isinstance(n_heads, int) or not isinstance(n_heads_kv, int) or not n_heads_kv or n_heads % n_heads_kv:
        return None
    width = info.metadata.get(f"{key}key_length", info.n_embd // n_heads)
    return (n_heads, n_heads_kv, width) if isinstance(width, int) and width else None


def _answer(
    questions: Sequence[_Question],
    cache: _Cache,
    found: Sequence[Device],
    n_threads: int,
    no_host: bool,
    progress: Report | None,
) -> None:
    meter: _core.DeviceMeter | None = None
    measured: Device | None = None
    disturbed = 0
    try:
        for i, question in enumerate(questions):
            if progress is not None:
                progress(question.text, i / len(questions))
            if question.device is not measured:
                meter = None  # lets go of its memory first
                measured = question.device
                meter = _core.DeviceMeter(
                    measured.name,
                    n_threads=n_threads,
                    working_set_bytes=_working_set_bytes(measured),
                    gpus=_local_gpus(found),
                    host_buffers=not no_host,
                    budget_s=0.08,
                )
            assert meter is not None
            try:
                start, interruptions = time.perf_counter(), _interruptions()
                figure = question.ask(meter)
                per_s = (_interruptions() - interruptions) / (time.perf_counter() - start)
                # On an idle machine a thread is hardly ever put aside; beside another program, 100 times a second.
                is_disturbed = measured.kind == "cpu" and per_s > _MOST_INTERRUPTIONS_PER_S * n_threads
                cache.put(question, figure, keep=not is_disturbed)
                disturbed += is_disturbed
            except _core.Error as error:
                # A type that the device cannot compute with, say; llama.cpp will say so if it matters.
                logger.warning("%s could not be measured: %s", question.text, error)
                continue
            logger.debug("measured %s, %s: %.4g", *question.key, cache.figures[question.key])
    finally:
        cache.save()
    if disturbed:
        logger.warning(
            "other programs kept the CPU busy while its speed was measured: %d of the figures are used now and will be "
            "measured again next time",
            disturbed,
        )


def _interruptions() -> int:
    """Return how often the system put a thread of this process aside for something else; 0 if it does not say."""
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _working_set_bytes(device: Device) -> int:
    """Return how much memory keeps every cache from holding the weights, or less if there is little."""
    wanted = min(max(128 << 20, 3 * _last_level_cache_bytes()), 1 << 30)
    if device.kind != "cpu":
        wanted = 256 << 20 if device.backend == "RPC" else 512 << 20
    return max(16 << 20, min(wanted, device.free_bytes // 4 or wanted))


def _spec(device: Device, memory_bytes: int, known: Mapping[str, float]) -> DeviceSpec:
    kind: Literal["cpu", "gpu"] = "cpu" if device.kind == "cpu" else "gpu"
    figures = dict(known)
    if kind == "cpu":
        assumed = {"op_s": 2e-6, "hop_s": 0.0, "link_bytes_per_s": math.inf, "bandwidth": 40e9}
    elif device.backend == "RPC":
        assumed = {"op_s": 3e-6, "hop_s": 300e-6, "link_bytes_per_s": 0.1e9, "bandwidth": 100e9}
    else:
        assumed = {"op_s": 3e-6, "hop_s": 30e-6, "link_bytes_per_s": 12e9, "bandwidth": 400e9}
    op_s, hop_s, link, bandwidth = (figures.pop(figure, otherwise) for figure, otherwise in assumed.items())
    copies = kind == "gpu" and device.backend != "RPC"
    return DeviceSpec(
        device.name, kind, memory_bytes, bandwidth, figures, op_s, hop_s, link, device.description, copies
    )


# --- what was measured before -------------------------------------------------------------------


def user_folder(variable: str, unix: str, mac: str) -> Path:
    """Return our folder in one of the user's; it need not be there yet.

    Parameters
    ----------
    variable
        The environment variable that names the user's folder.
    unix, mac
        Where it is otherwise, from the home folder on; on Windows it is the one for local data.
    """
    if variable in os.environ or sys.platform not in ("win32", "darwin"):
        folder = Path(os.environ.get(variable) or Path.home() / unix)
    elif sys.platform == "darwin":
        folder = Path.home() / mac
    else:
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return folder / "overspill"


def cache_folder() -> Path:
    """Return the folder of what is kept of this machine."""
    return user_folder("XDG_CACHE_HOME", ".cache", "Library/Caches")


def replace_json(file: Path, data: object) -> None:
    """Write a file, of which readers see the old content or the new, and nothing in between."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f"{file.stem}-", delete=False
    ) as draft:
        json.dump(data, draft, indent=1, allow_nan=False)
    Path(draft.name).replace(file)


class _Cache:
    """Figures by device and quantity, in a file."""

    _FORMAT = 1

    def __init__(self, file: Path) -> None:
        self._file = file
        self.figures = self._read()
        self._new: dict[tuple[str, str], float] = {}

    def _read(self) -> dict[tuple[str, str], float]:
        try:
            data = json.loads(self._file.read_text(encoding="utf-8"))
            if data["format"] != self._FORMAT:
                return {}
            return {
                (device, key): float(value)
                for device, figures in data["devices"].items()
                for key, value in figures.items()
                if math.isfinite(value) and value >= 0
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.info("%s is not readable, so it is written anew: %r", self._file, error)
            return {}

    def put(self, question: _Question, figure: float, *, keep: bool) -> None:
        self.figures[question.key] = figure
        if keep:
            self._new[question.key] = figure

    def save(self) -> None:
        """Add what is new to the file, which others may have written to in the meantime."""
        if not self._new:
            return
        devices: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for (device, key), figure in sorted({**self._read(), **self._new}.items()):
            devices[device][key] = figure
        try:
            replace_json(self._file, {"format": self._FORMAT, "devices": devices})
        except OSError as error:
            logger.warning("what was measured could not be kept: %s", error)
