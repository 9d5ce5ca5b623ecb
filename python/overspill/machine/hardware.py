"""The hardware that a plan is for: memory, speed and fixed costs of each device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from overspill.base import html
from overspill.base.checks import (
    as_flag,
    as_function,
    as_instance,
    as_integer,
    as_list,
    as_mapping,
    as_real,
    as_text,
    check_choice,
    device_index,
    shown,
)
from overspill.base.host import available_ram_bytes, physical_cores
from overspill.base.text import short_repr
from overspill.base.units import (
    Rate,
    Size,
    format_bytes,
    format_count,
    format_rate,
    parse_bytes,
    parse_memory,
    parse_rate,
)
from overspill.base.values import Device, Kernels
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import CACHE_TYPES
from overspill.machine.devices import by_device, devices, devices_for_layers
from overspill.machine.measure import EXCHANGE, FLOPS_OF, PLAIN_READS_BESIDE, Report, known_figures

__all__ = ["DeviceSpec", "Hardware"]

_LINKS = (
    "link_bytes_per_s",
    "link_back_bytes_per_s",
    "unpinned_link_bytes_per_s",
    "unpinned_link_back_bytes_per_s",
)
_UNLIMITED = ("link_bytes_per_s", "flops_per_s")
# Measured beside an H100 on PCIe 5: one thread copies what is not pinned into the driver's own pinned memory first.
_UNPINNED_BYTES_PER_S = 8.3e9
# Of an RTX 3090 and of ten cores with AVX2, roughly what llama.cpp reaches in quantized products of large batches.
_GPU_FLOPS, _CPU_FLOPS = 30e12, 0.3e12
_ASSUMED_CPU = {"bandwidth": 40e9, "op_s": 2e-6, "hop_s": 0.0, "flops": _CPU_FLOPS, "link_bytes_per_s": math.inf}
_ASSUMED_GPU = {
    "bandwidth": 400e9,
    "op_s": 3e-6,
    "hop_s": 30e-6,
    "flops": _GPU_FLOPS / 2,
    **dict.fromkeys(_LINKS[:2], 12e9),
    **dict.fromkeys(_LINKS[2:], _UNPINNED_BYTES_PER_S),
}
_ASSUMED_RPC = {
    "bandwidth": 100e9,
    "op_s": 3e-6,
    "hop_s": 300e-6,
    "flops": _GPU_FLOPS / 2,
    **dict.fromkeys(_LINKS, 0.1e9),
}


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device: its memory, and its speed and fixed costs in decoding."""

    name: str
    """llama.cpp's name, such as ``CPU``, ``CUDA0`` or ``RPC0``; ``GPU0`` and so on for given hardware."""
    kind: Literal["cpu", "gpu"]
    memory_bytes: int
    """Bytes of memory that a model may use: those free now, or those given."""
    bandwidth_bytes_per_s: float
    """Rate of reading weights for one token where ``rates`` has none. It is measured in F16: little arithmetic."""
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Measured rates in bytes per second, each operation's fixed cost included.

    ============================  ================================================
    ``"q8_0"``, any other type    weights of that type
    ``"mxfp4:experts"``           the experts that a token uses, of that type
    ``"f16:kv"``                  attention to a KV cache of that type
    ============================  ================================================
    """
    op_s: float = 0.0
    """Seconds of each other operation of the graph: norms, additions, activations."""
    hop_s: float = 0.0
    """Seconds for going to this device and back within a token. 0 for the CPU."""
    link_bytes_per_s: float = math.inf
    """Rate of copies to the device, over PCIe or the network, from pinned memory if it has that."""
    description: str = ""
    """The hardware's own name, or a server's endpoint."""
    copies_host_weights: bool = False
    """Whether the device computes large batches with weights that are in RAM, and keeps room for copies of them. CUDA
    does, RPC servers do not."""
    registers_host_memory: bool = False
    """Whether its driver can pin a mapped file, so that copies from there are as fast as from pinned memory."""
    link_back_bytes_per_s: float | None = None
    """Rate of copies from the device to pinned memory. None: as to it."""
    unpinned_link_bytes_per_s: float | None = None
    """Rate of copies to the device from memory that is not pinned, such as a mapped file. None: as from pinned."""
    unpinned_link_back_bytes_per_s: float | None = None
    """Rate of copies back to memory that is not pinned."""
    flops: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Measured floating-point operations per second in a large batch, by the keys of ``rates``: a product with weights
    takes 2 for each weight and row, attention 4 for each pair of tokens, head and element of its width."""
    flops_per_s: float = math.inf
    """Floating-point operations per second in a large batch where ``flops`` has none."""
    plain_reads: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Measured rates in bytes per second of reads that compute nothing, by the keys of ``rates``: for weights on a CPU,
    with the same threads and just after, since others use the memory more at one time than at another."""
    exchange_s: float | None = None
    """Seconds for having experts computed there while the CPU computes others, beside reading them: activations there,
    results back. None: as ``hop_s``."""

    def __post_init__(self) -> None:
        """Check the figures; they may come from a file."""
        if not as_text("name", self.name) or not isinstance(self.kind, str) or self.kind not in ("cpu", "gpu"):
            raise ValueError(
                f'a device must have a name and the kind "cpu" or "gpu", not {shown(self.name)} {shown(self.kind)}'
            )
        as_text("description", self.description)
        for flag in ("copies_host_weights", "registers_host_memory"):
            as_flag(flag, getattr(self, flag))
        as_integer(f"{self.name}: memory_bytes", self.memory_bytes, 0, 2**63 - 1)
        for rates in ("rates", "flops", "plain_reads"):
            as_mapping(rates, getattr(self, rates), "a mapping from kinds of weights to numbers")
        figures: dict[str, tuple[float, bool]] = {
            "memory_bytes": (self.memory_bytes, False),
            "bandwidth_bytes_per_s": (self.bandwidth_bytes_per_s, True),
            "op_s": (self.op_s, False),
            "hop_s": (self.hop_s, False),
            **({} if self.exchange_s is None else {"exchange_s": (self.exchange_s, False)}),
            "flops_per_s": (self.flops_per_s, True),
            "link_bytes_per_s": (self.link_bytes_per_s, True),
            **{name: (rate, True) for name in _LINKS[1:] if (rate := getattr(self, name)) is not None},
            **{f"rates[{key!r}]": (rate, True) for key, rate in self.rates.items()},
            **{f"flops[{key!r}]": (rate, True) for key, rate in self.flops.items()},
            **{f"plain_reads[{key!r}]": (rate, True) for key, rate in self.plain_reads.items()},
        }
        for key, (given, positive) in figures.items():
            value = as_real(f"{self.name}: {key:.80}", given)
            # Copies and arithmetic may take no time; all else was measured.
            finite = key not in _UNLIMITED
            if not (value > 0 or (value == 0 and not positive)) or (finite and value == math.inf):
                wanted = ("over 0" if positive else "at least 0") + (" and finite" if finite else "")
                raise ValueError(f"{self.name}: {key:.80} must be {wanted}, not {value}")

    def rate(self, weights: str) -> float:
        """Return the bytes per second for a key of ``rates``; the bandwidth if it was not measured."""
        return self.rates.get(as_text("weights", weights), self.bandwidth_bytes_per_s)

    def batch_flops(self, weights: str) -> float:
        """Return the floating-point operations per second in a large batch for a key of ``rates``."""
        as_text("weights", weights)
        return self.flops.get(weights, self.flops.get(weights.partition(":")[0], self.flops_per_s))

    def copy_bytes_per_s(self, *, pinned: bool) -> float:
        """Return the rate of copies to the device from memory that is pinned or not."""
        unpinned = self.unpinned_link_bytes_per_s
        return self.link_bytes_per_s if as_flag("pinned", pinned) or unpinned is None else unpinned

    def __str__(self) -> str:
        """Return one line, such as ``CPU: 120.0 GiB · 47.0 GB/s``."""
        hop = f" · {self.hop_s * 1e6:.0f} µs a visit" if self.hop_s else ""
        about = f" ({self.description})" if self.description else ""
        size = format_bytes(self.memory_bytes, digits=1, unit="GiB")
        return f"{self.name}{about}: {size} · {format_rate(self.bandwidth_bytes_per_s)}{hop}"

    def __repr__(self) -> str:
        """Return that line in brackets."""
        return short_repr(self, str(self))


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices that a model can be placed on."""

    devices: tuple[DeviceSpec, ...]
    """GPUs in llama.cpp's order, the CPU last."""
    source: Literal["measured", "given", "assumed"]
    """``"assumed"`` if any figure is neither measured nor given."""
    n_threads: int
    """Threads of the CPU."""

    def __post_init__(self) -> None:
        """Check that there is one CPU, and that it is the last device."""
        listed = as_list("devices", self.devices, "overspill.DeviceSpec")
        object.__setattr__(self, "devices", tuple(as_instance("devices", one, DeviceSpec) for one in listed))
        check_choice("source", self.source, ("measured", "given", "assumed"))
        as_integer("n_threads", self.n_threads, 1, 512)
        if [device.kind for device in self.devices] != ["gpu"] * (len(self.devices) - 1) + ["cpu"]:
            raise ValueError("hardware must be any number of GPUs and then one CPU: see its devices")
        if len({device.name for device in self.devices}) < len(self.devices):
            raise ValueError("the devices must have different names")

    @property
    def cpu(self) -> DeviceSpec:
        """The CPU and its RAM."""
        return self.devices[-1]

    @property
    def gpus(self) -> tuple[DeviceSpec, ...]:
        """All other devices, those of RPC servers included."""
        return self.devices[:-1]

    def device(self, name: str) -> DeviceSpec:
        """Return the device of that name, in any case; ``"gpu"`` is the first GPU.

        Raises
        ------
        ValueError
            There is no such device.
        """
        return self.devices[_index_of("device", name, [device.name for device in self.devices])]

    def without(self, taken: Mapping[str, int]) -> Hardware:
        """Return the same hardware with less memory: ``taken`` has the bytes to subtract, by device."""
        as_mapping("taken", taken, "a mapping from devices to bytes")
        names = [device.name for device in self.devices]
        taken = {
            names[_index_of("taken", name, names)]: as_integer("taken", n_bytes, -(2**63), 2**63 - 1)
            for name, n_bytes in taken.items()
        }
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
        kernels: Kernels = "auto",
        progress: Report | None = None,
    ) -> Hardware:
        """Return this machine, with the RPC servers that were added; unknown figures are measured.

        A measurement takes about 0.1 s for each device and type of weights. The results are kept in ``hardware.json``
        in the user's cache folder, so the next call measures nothing. They hold for one device, or the endpoint of an
        RPC server, for one number of threads, and for this version of llama.cpp. Figures of the CPU are not kept if
        other programs kept it busy meanwhile.

        Parameters
        ----------
        info
            The model to plan for: the shapes and types of its weights are measured.
        memory
            The most that a model may use of a device, by the device's name, ``"cpu"`` or ``"gpu"``, which is the first
            GPU, if there is one.
        n_threads
            Threads of the CPU, 1 to 512. Default: the number of physical cores.
        measure
            False measures nothing: figures that are not kept are assumed.
        refresh
            Measure everything again, for example after an RPC server was started with other options.
        kv_type
            The type of the KV cache, such as ``"f16"`` or ``"q8_0"``.
        no_host
            Whether the model will be loaded with llama.cpp's ``--no-host``, which decides how its weights are kept in
            RAM.
        kernels
            Those that the model will be loaded with: ``"auto"`` or ``"llama.cpp"``.
        progress
            Called before each measurement with its name and the share that is done, 0 to 1.

        Raises
        ------
        ValueError
            ``memory`` names an unknown device or has a bad size, ``kv_type`` is no type of a KV cache,
            ``kernels`` is unknown, or ``n_threads`` is out of range.
        Error
            A device cannot be used.
        """
        n_threads = physical_cores() if n_threads is None else as_integer("n_threads", n_threads, 1, 512)
        check_choice("kv_type", kv_type, CACHE_TYPES)
        check_choice("kernels", kernels, get_args(Kernels))
        measure, refresh, no_host = (
            as_flag(name, flag) for name, flag in (("measure", measure), ("refresh", refresh), ("no_host", no_host))
        )
        if info is not None:
            as_instance("info", info, ModelInfo)
        if progress is not None:
            as_function("progress", progress)
        sizes = parse_memory(memory)
        found = devices_for_layers(devices())
        caps = by_device("memory", sizes, found)
        figures, complete = known_figures(
            found,
            info,
            n_threads=n_threads,
            kv_type=kv_type,
            no_host=no_host,
            kernels=kernels,
            measure=measure,
            refresh=refresh,
            progress=progress,
        )
        free_bytes = [device.free_bytes for device in found]
        free_bytes[-1] = available_ram_bytes() or free_bytes[-1]
        specs = []
        for device, free, known in zip(found, free_bytes, figures, strict=True):
            cap = caps.get(device.name)
            # 0 bytes are free where the backend does not tell.
            specs.append(_spec(device, free if cap is None else min(cap, free or cap), known))
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
        unpinned_link: Rate | Sequence[Rate] | None = None,
        gpu_flops: float | None = None,
        cpu_flops: float | None = None,
        hop_s: float | None = None,
        op_s: float | None = None,
        roofline: bool = False,
        n_threads: int | None = None,
    ) -> Hardware:
        """Return hardware of given figures, which need not be there.

        ================================  ======================================================================
        dual-channel DDR4-2933, -3200     46.9, 51.2 GB/s (channels x 8 bytes x transfers)
        dual-channel DDR5-5600, -6400     89.6, 102.4 GB/s
        RTX 3060 12 GB, 3090, 4090, 5090  360, 936, 1008, 1792 GB/s (NVIDIA's data sheets)
        PCIe 3, 4, 5, x16                 12, 25, 50 GB/s of 15.8, 31.5, 63 (assumed: the speed of copies)
        a hop to a GPU                    20 to 40 µs (assumed: launch, two copies and the waits for them)
        ================================  ======================================================================

        Parameters
        ----------
        ram
            RAM that the model may use.
        vram
            Memory of each GPU that the model may use; 0 for no GPU.
        gpu_bandwidth
            Bandwidth of each GPU, or of all. Default: 936 GB/s, an RTX 3090's.
        ram_bandwidth
            Bandwidth of the RAM. Default: 47 GB/s, dual-channel DDR4-2933.
        link
            Rate between host and GPU, of each GPU or of all. Default: 25 GB/s, PCIe 4 x16.
        unpinned_link
            The same for memory that is not pinned, such as a mapped file. Default: 8.3 GB/s, as measured beside an
            H100, or ``link`` if that is less.
        gpu_flops, cpu_flops
            Floating-point operations per second in a large batch. Default: 30e12 on a GPU and 0.3e12 on a CPU, about
            what llama.cpp reaches with quantized weights on an RTX 3090 and on ten cores with AVX2 (assumed).
        hop_s
            Seconds for going to a GPU and back. Default: 30e-6.
        op_s
            Seconds of each small operation. Default: 3e-6 on a GPU and 2e-6 on a CPU.
        roofline
            Count bytes over bandwidth alone: ``hop_s`` and ``op_s`` default to 0, arithmetic takes no time.
        n_threads
            Threads of the CPU, 1 to 512. Default: the number of physical cores of this machine.

        Raises
        ------
        ValueError
            A size or a rate cannot be read, or the lists differ in length.
        """
        roofline = as_flag("roofline", roofline)
        for name, figure in (("gpu_flops", gpu_flops), ("cpu_flops", cpu_flops), ("hop_s", hop_s), ("op_s", op_s)):
            least = 0.0 if name.endswith("_s") else 1.0
            if figure is not None and not as_real(name, figure) >= least:
                raise ValueError(f"{name} must be at least {least:.0f}, not {figure}")
        sizes = [parse_bytes("vram", size) for size in _listed(vram)]
        sizes = [] if sizes == [0] else sizes
        bandwidths = _for_each("gpu_bandwidth", gpu_bandwidth, "936GB/s", len(sizes))
        links = _for_each("link", link, "25GB/s", len(sizes))
        unpinned_links = _for_each("unpinned_link", unpinned_link, _UNPINNED_BYTES_PER_S, len(sizes))
        if unpinned_link is None:
            unpinned_links = [min(pair) for pair in zip(unpinned_links, links, strict=True)]
        figures: list[Any] = [ram_bandwidth, op_s]
        figures += [] if roofline else [cpu_flops]
        if sizes:
            figures += [gpu_bandwidth, link, hop_s, *([] if roofline else [gpu_flops, unpinned_link])]
        assumed = any(figure is None for figure in figures)
        if roofline:
            hop_s, op_s = hop_s or 0.0, op_s or 0.0
            gpu_flops, cpu_flops = gpu_flops or math.inf, cpu_flops or math.inf
        gpus = [
            DeviceSpec(
                name=f"GPU{i}",
                kind="gpu",
                memory_bytes=size,
                bandwidth_bytes_per_s=bandwidth,
                op_s=3e-6 if op_s is None else op_s,
                hop_s=30e-6 if hop_s is None else hop_s,
                link_bytes_per_s=link_rate,
                unpinned_link_bytes_per_s=unpinned,
                copies_host_weights=True,
                registers_host_memory=True,
                flops_per_s=_GPU_FLOPS if gpu_flops is None else gpu_flops,
            )
            for i, (size, bandwidth, link_rate, unpinned) in enumerate(
                zip(sizes, bandwidths, links, unpinned_links, strict=True)
            )
        ]
        cpu = DeviceSpec(
            name="CPU",
            kind="cpu",
            memory_bytes=parse_bytes("ram", ram),
            bandwidth_bytes_per_s=parse_rate("ram_bandwidth", "47GB/s" if ram_bandwidth is None else ram_bandwidth),
            op_s=2e-6 if op_s is None else op_s,
            flops_per_s=_CPU_FLOPS if cpu_flops is None else cpu_flops,
        )
        n_threads = physical_cores() if n_threads is None else as_integer("n_threads", n_threads, 1, 512)
        return cls((*gpus, cpu), "assumed" if assumed else "given", n_threads)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON; what has no limit is null."""
        listed = [asdict(device) for device in self.devices]
        for device in listed:
            for name in ("rates", "flops", "plain_reads"):
                device[name] = dict(device[name])
            for name in _UNLIMITED:
                if device[name] == math.inf:
                    device[name] = None
        return {"devices": listed, "source": self.source, "n_threads": self.n_threads}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hardware:
        """Return the hardware that :meth:`to_dict` gave ``data`` for.

        Raises
        ------
        ValueError
            ``data`` is not of that form.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"this is no hardware that was saved: {shown(data)}")
        try:
            specs = tuple(
                DeviceSpec(**{**device, **{name: _or_infinite(device.get(name)) for name in _UNLIMITED}})
                for device in data["devices"]
            )
            return cls(specs, data["source"], data["n_threads"])
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"this is no hardware that was saved: {shown(error)}") from None

    def __str__(self) -> str:
        """Return one line for each device."""
        return "\n".join(map(str, self.devices))

    def __repr__(self) -> str:
        """Return where the figures are from, and each device's memory and bandwidth, in brackets."""
        devices = ", ".join(
            f"{device.name} {format_bytes(device.memory_bytes)} {format_rate(device.bandwidth_bytes_per_s)}"
            for device in self.devices
        )
        return short_repr(self, f"{self.source}: {devices}, {format_count(self.n_threads, 'thread')}")

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        rows = ["".join(map(html.heading, ("device", "memory", "bandwidth")))]
        for device in self.devices:
            name = " ".join(filter(None, (device.name, device.description)))
            texts = (name, format_bytes(device.memory_bytes), format_rate(device.bandwidth_bytes_per_s))
            rows.append("".join(html.cell(html.escape(text)) for text in texts))
        return html.table(rows, f"{self.source}, {format_count(self.n_threads, 'thread')}")


def _or_infinite(rate: float | None) -> float:
    return math.inf if rate is None else rate


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, Sequence) and not isinstance(values, str | bytes) else [values]


def _for_each(name: str, values: Rate | Sequence[Rate] | None, default: Rate, n: int) -> list[float]:
    rates = [parse_rate(name, rate) for rate in _listed(default if values is None else values)]
    if len(rates) == 1:
        return rates * n
    if len(rates) != n:
        raise ValueError(f"{name} must be one rate, or one for each of the {n} GPUs, not {len(rates)}")
    return rates


def _index_of(argument: str, name: str, names: Sequence[str]) -> int:
    if (index := device_index(names, as_text(argument, name))) is None:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, not {name:.80}")
    return index


def _spec(device: Device, memory_bytes: int, figures: Mapping[str, float]) -> DeviceSpec:
    """Return the spec of a device of this machine; missing figures are assumed."""
    is_cpu, is_rpc = device.kind == "cpu", device.backend == "RPC"
    assumed = _ASSUMED_CPU if is_cpu else _ASSUMED_RPC if is_rpc else _ASSUMED_GPU
    fixed = {name: figures.get(name, value) for name, value in assumed.items()}

    def named(prefix: str) -> dict[str, float]:
        return {name.removeprefix(prefix): rate for name, rate in figures.items() if name.startswith(prefix)}

    prefixes = (FLOPS_OF, PLAIN_READS_BESIDE)
    return DeviceSpec(
        name=device.name,
        kind="cpu" if is_cpu else "gpu",
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_s=fixed["bandwidth"],
        rates={
            name: rate
            for name, rate in figures.items()
            if name not in assumed and name != EXCHANGE and not name.startswith(prefixes)
        },
        op_s=fixed["op_s"],
        hop_s=fixed["hop_s"],
        exchange_s=figures.get(EXCHANGE),
        description=device.description,
        copies_host_weights=not is_cpu and not is_rpc,
        registers_host_memory=device.registers_host_memory,
        flops=named(FLOPS_OF),
        flops_per_s=fixed["flops"],
        plain_reads=named(PLAIN_READS_BESIDE),
        **{name: fixed[name] for name in _LINKS if name in fixed},
    )
