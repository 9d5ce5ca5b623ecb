"""What the machine can do, as the planner needs it: memory, and the speed of decoding on each device."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from overspill import _core
from overspill.base.checks import as_integer
from overspill.base.files import cache_folder
from overspill.base.host import available_ram_bytes, physical_cores
from overspill.base.units import Rate, Size, parse_bytes, parse_rate
from overspill.base.values import Device
from overspill.header.info import ModelInfo
from overspill.machine.devices import devices
from overspill.machine.measure import Report, _answer, _Cache, _questions

__all__ = ["DeviceSpec", "Hardware"]

logger = logging.getLogger("overspill")


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


# --- measuring ---------------------------------------------------------------------------------


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
