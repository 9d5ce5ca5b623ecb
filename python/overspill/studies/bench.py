"""Measure how fast a model reads prompts and decodes, and what share that is of what the memory allows."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from overspill import _core
from overspill.base.checks import as_integer
from overspill.base.values import Breakdown, CacheType, Device, LoadMode
from overspill.engine.model import Model, Offload
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import layer_caches
from overspill.header.tensor_names import part_of
from overspill.machine.devices import devices
from overspill.placement.device_names import CPU
from overspill.placement.placement import Placement

__all__ = ["Bench", "DeviceShare", "Samples", "bench", "check_plotting", "device_bandwidth", "read_bytes_by_device"]

_WORKING_SET_BYTES = 512 << 20  # more than any cache holds


@dataclass(frozen=True, slots=True)
class Samples:
    """The same, measured several times."""

    n_prompt: int
    """Tokens of a prompt that were read at once; 0 for decoding."""
    n_gen: int
    """Tokens that were decoded one after the other; 0 for a prompt."""
    n_depth: int
    """Tokens in the context before that."""
    seconds: tuple[float, ...]
    """Of each time."""

    @property
    def name(self) -> str:
        """llama-bench's name, such as ``tg128 @ d4096``."""
        test = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{test} @ d{self.n_depth}" if self.n_depth else test

    @property
    def rates(self) -> list[float]:
        """Tokens per second, each time."""
        return [(self.n_prompt + self.n_gen) / seconds for seconds in self.seconds]

    @property
    def tokens_per_s(self) -> float:
        """Their mean, as llama-bench has it."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Their standard deviation in tokens per second; 0 for one time."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What one device does for a token, and how near it comes to the speed of its memory."""

    device: str
    read_bytes: int
    """Weights and KV cache that a token reads there, from the header."""
    bandwidth_bytes_per_s: float
    """Of its memory, measured; see :func:`device_bandwidth`."""
    busy_s: float
    """It computes so long for a token."""
    n_pieces: int
    """So many pieces of the graph, between changes of device."""

    @property
    def floor_s(self) -> float:
        """What reading takes at least."""
        return self.read_bytes / self.bandwidth_bytes_per_s

    @property
    def share(self) -> float:
        """``floor_s`` over ``busy_s``: 1 is the roofline. More where caches keep what was read before."""
        return self.floor_s / self.busy_s if self.busy_s > 0 else 0.0


@dataclass(frozen=True)
class Bench:
    """What :func:`bench` found."""

    info: ModelInfo
    path: Path
    placement: Placement
    settings: dict[str, Any]
    """As :class:`Model` has them: ``n_ctx``, ``n_batch``, ``n_threads`` and so on."""
    found: tuple[Device, ...]
    """The devices of this machine."""
    prefill: Samples | None
    decode: Samples
    breakdown: Breakdown
    """Of the decoded tokens of all times together."""
    devices: tuple[DeviceShare, ...]
    """Those that the model lies on."""
    moving_s: float
    """Of a token: copies between devices, and waiting for them."""
    around_s: float
    """Of a token: starting the graph, and fetching the logits."""
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def token_s(self) -> float:
        """Seconds of a decoded token: the median of all times."""
        return statistics.median(self.decode.seconds) / self.decode.n_gen

    @property
    def roofline_s(self) -> float:
        """What a token takes at least: the devices work one after the other, each at the speed of its memory."""
        return sum(device.floor_s for device in self.devices)

    @property
    def share(self) -> float:
        """The roofline's time over the measured one."""
        return self.roofline_s / self.token_s

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of a token by what they go to, the rest last."""
        parts: dict[str, float] = {}
        for device in self.devices:
            parts[f"memory bandwidth of {device.device}"] = min(device.floor_s, device.busy_s)
            parts[f"computing on {device.device}, beyond reading"] = max(0.0, device.busy_s - device.floor_s)
        n = max(1, self.breakdown.tokens)
        parts["moving between devices"] = self.moving_s
        parts["starting the graph, fetching logits"] = self.around_s
        parts["sampler"] = (self.breakdown.sample_s + self.breakdown.python_s) / n
        parts["text"] = self.breakdown.text_s / n
        parts["the rest"] = max(0.0, self.token_s - sum(parts.values()))
        return parts

    @property
    def limit(self) -> str:
        """What most of the time goes to."""
        if self.share > 1:
            return "the processor's caches: they keep weights from token to token, so memory is not the limit"
        return max(self.parts, key=lambda part: self.parts[part])

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return what llama-bench's ``--output json`` has, a mapping for each test, so that its readers take it.

        The one for decoding has ``overspill`` besides: ``roofline``, ``devices``, ``breakdown``, ``limit``.
        """
        common, found = self._common(), []
        for samples in (self.prefill, self.decode):
            if samples is None:
                continue
            times = [round(seconds * 1e9) for seconds in samples.seconds]
            found.append(
                {
                    **common,
                    "n_prompt": samples.n_prompt,
                    "n_gen": samples.n_gen,
                    "n_depth": samples.n_depth,
                    "test_time": self.at.strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "avg_ns": round(statistics.fmean(times)),
                    "stddev_ns": round(statistics.stdev(times)) if len(times) > 1 else 0,
                    "avg_ts": samples.tokens_per_s,
                    "stddev_ts": samples.deviation,
                    "samples_ns": times,
                    "samples_ts": samples.rates,
                }
            )
        found[-1]["overspill"] = {
            "token_s": self.token_s,
            "roofline_s": self.roofline_s,
            "share": self.share,
            "limit": self.limit,
            "devices": [
                {**asdict(device), "floor_s": device.floor_s, "share": device.share} for device in self.devices
            ],
            "parts_s": self.parts,
            "breakdown": {**asdict(self.breakdown), "gigabytes_per_s": self.breakdown.gigabytes_per_s},
        }
        return found

    def _common(self) -> dict[str, Any]:
        placed, settings = self.placement.llama_arguments(), self.settings
        gpus = [device for device in self.found if device.is_gpu]
        cpus = [device for device in self.found if not device.is_gpu]
        overrides = ";".join(f"{pattern}={device}" for pattern, device in placed.overrides)
        split = [n for n in placed.tensor_split if n]
        return {
            "build_commit": _core.LLAMA_CPP_COMMIT[:9],
            "build_number": 0,
            "cpu_info": ", ".join(device.description for device in cpus),
            "gpu_info": ", ".join(device.description for device in gpus),
            "backends": ",".join(dict.fromkeys(device.backend for device in (*gpus, *cpus))),
            "model_filename": str(self.path),
            "model_type": f"{self.info.name or self.info.architecture} {self.info.quantisation}",
            "model_size": sum(n_bytes for *_, n_bytes in self.info.tensors),
            "model_n_params": self.info.n_parameters,
            "n_batch": settings["n_batch"],
            "n_ubatch": settings["n_ubatch"],
            "n_threads": settings["n_threads"],
            "cpu_mask": "0x0",
            "cpu_strict": False,
            "poll": 50,
            "type_k": settings["type_k"],
            "type_v": settings["type_v"],
            "n_gpu_layers": placed.n_gpu_layers,
            "n_cpu_moe": 0,
            "split_mode": "layer",
            "main_gpu": 0,
            "no_kv_offload": False,
            "flash_attn": {"auto": -1, "off": 0, "on": 1}[settings["flash_attention"]],
            "devices": "/".join(placed.devices) or "none",
            "tensor_split": "/".join(f"{n:.2f}" for n in split) or "0.00",
            "tensor_buft_overrides": overrides or "none",
            "load_mode": {"read": "none", "direct-io": "dio"}.get(settings["load_mode"], settings["load_mode"]),
            "lazy_mode": "auto",
            "embeddings": False,
            "no_op_offload": 0,
            "no_host": False,
            "repack": settings["repack"] != "off",
            "fit_target": 0,
            "fit_min_ctx": 0,
        }

    def __rich__(self) -> Group:
        """Return tables."""
        return Group(self._heading(), "", self._tests(), "", self._roofline(), "", self._parts(), "", self._verdict())

    def _heading(self) -> Text:
        name = self.info.name or self.info.architecture
        where = " + ".join("RAM" if device.device == CPU else device.device for device in self.devices)
        size = f"{self.info.file_bytes / 2**30:.2f} GiB"
        threads = self.settings["n_threads"]
        text = f"{name}, {self.info.quantisation}, {size}, on {where}, {threads} thread{'' if threads == 1 else 's'}"
        return Text(text, "bold")

    def _tests(self) -> Table:
        table = _table("test", "tok/s", "±")
        for samples in (self.prefill, self.decode):
            if samples is not None:
                table.add_row(samples.name, f"{samples.tokens_per_s:.2f}", f"{samples.deviation:.2f}")
        return table

    def _roofline(self) -> Table:
        table = _table("device", "reads a token", "bandwidth", "at least", "takes", "reads", "of roofline")
        for one in self.devices:
            table.add_row(
                "RAM" if one.device == CPU else one.device,
                f"{one.read_bytes / 1e6:.1f} MB",
                f"{one.bandwidth_bytes_per_s / 1e9:.1f} GB/s",
                f"{one.floor_s * 1e3:.3f} ms",
                f"{one.busy_s * 1e3:.3f} ms",
                f"{one.read_bytes / one.busy_s / 1e9:.1f} GB/s" if one.busy_s else "–",
                f"{one.share:.0%}",
            )
        read = sum(one.read_bytes for one in self.devices)
        row = (f"{read / 1e6:.1f} MB", "", f"{self.roofline_s * 1e3:.3f} ms", f"{self.token_s * 1e3:.3f} ms")
        table.add_row("all", *row, f"{read / self.token_s / 1e9:.1f} GB/s", f"{self.share:.0%}", style="bold")
        return table

    def _parts(self) -> Table:
        table = _table("where a token's time goes", "µs", "share", "")
        for name, seconds in self.parts.items():
            if seconds >= 5e-8:
                share = min(1.0, seconds / self.token_s)
                table.add_row(name, f"{seconds * 1e6:.1f}", f"{share:.1%}", "█" * round(30 * share))
        return table

    def _verdict(self) -> Text:
        splits = self.breakdown.graph_splits
        more = f", in {splits} pieces of the graph" if splits > 1 else ""
        faults = self.breakdown.major_page_faults
        disk = f"; weights were read from the disk again, {faults} page faults" if faults else ""
        allowed = 1 / self.roofline_s if self.roofline_s > 0 else math.inf
        return Text(
            f"{self.decode.tokens_per_s:.2f} of the {allowed:.2f} tok/s that the memory allows{more}. "
            f"The limit is {self.limit}{disk}."
        )

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw the time of a token, beside what the memory allows, into a PNG, SVG or PDF file.

        Raises
        ------
        Error
            matplotlib is not installed.
        ValueError
            It has no such format.
        """
        check_plotting(file)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots()
        # Reading in full colour, what a device does beyond that in the same colour, hatched.
        colours = dict(
            zip((one.device for one in self.devices), ("#d98a29", "#2f9e63", "#2b8cbe", "#8856a7"), strict=False)
        )
        rest = ("moving between devices", "starting the graph, fetching logits", "sampler", "text", "the rest")
        greys = dict(zip(rest, ("#c0392b", "#e6a39b", "#5b6770", "#8f9aa3", "#c4ccd2"), strict=True))
        allowed_ms, measured_ms = 0.0, 0.0
        for one in self.devices:
            colour = colours.get(one.device, "#777777")
            axes.barh("allowed", one.floor_s * 1e3, left=allowed_ms, color=colour)
            allowed_ms += one.floor_s * 1e3
        for name, seconds in self.parts.items():
            device = next((one.device for one in self.devices if f" {one.device}" in name), None)
            beyond = name.startswith("computing")
            colour = greys[name] if device is None else colours.get(device, "#777777")
            axes.barh(
                "measured",
                seconds * 1e3,
                left=measured_ms,
                color=colour,
                alpha=0.55 if beyond else 1.0,
                hatch="///" if beyond else None,
                edgecolor="white",
                linewidth=0,
                label=f"{name}: {seconds * 1e3:.3g} ms" if seconds >= 5e-8 else None,
            )
            measured_ms += seconds * 1e3
        axes.axvline(allowed_ms, color="#222222", linestyle="--", linewidth=1)
        axes.set_xlabel("milliseconds a token")
        axes.set_title(
            f"{self.info.name or self.info.architecture}: {self.decode.tokens_per_s:.1f} tok/s, {self.share:.0%} of "
            f"the {1 / self.roofline_s:.1f} that the memory allows",
            fontsize=11,
        )
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        figure.savefig(file, dpi=150)


def check_plotting(file: str | os.PathLike[str]) -> None:
    """Raise what :meth:`Bench.plot` would, before much time is spent on what it is to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise _core.Error("a picture needs matplotlib: pip install 'overspill[plot]'") from None
    formats = Figure().canvas.get_supported_filetypes()
    if Path(file).suffix.removeprefix(".").lower() not in formats:
        raise ValueError(
            f"the picture must end in one of {', '.join(f'.{one}' for one in sorted(formats))}, not {file}"
        )


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i and heading else "left", no_wrap=True)
    return table


def device_bandwidth(device: str) -> float:
    """Return how fast a device reads its memory, in bytes per second, as measured; takes up to a second.

    The CPU's: a plain scan of 512 MiB with all cores. Of other devices, the fastest of the products of a large matrix
    and a vector in F32, F16 and Q8_0, since a computation is all that can be asked of them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    meter = _core.DeviceMeter(
        device,
        n_threads=min(cores, 512),
        working_set_bytes=_WORKING_SET_BYTES,
        gpus=[],
        host_buffers=True,
        budget_s=0.3,
    )
    if device == CPU:
        return meter.memory_bytes_per_s()
    return max(meter.weight_rate(kind, 4096, 8192, 0, 0)[0] for kind in ("f32", "f16", "q8_0"))


def read_bytes_by_device(
    info: ModelInfo, placement: Placement, depth: int, type_k: str = "f16", type_v: str = "f16"
) -> dict[str, int]:
    """Return the bytes of weights and KV cache that decoding one token reads on each device.

    Of an embedding one row, of a layer's experts those that are used, of the cache ``depth`` tokens, or a window of
    them.
    """
    n_bytes: Counter[str] = Counter()
    where = placement.tensors()
    for tensor in info.tensors:
        is_output = info.tied_embedding and part_of(tensor[0]) == "embedding"
        n_bytes[placement.output_matrix if is_output else where.get(tensor[0], CPU)] += info.read_bytes(tensor)
    for cache, device in zip(layer_caches(info), placement.kv, strict=True):
        n_bytes[device] += cache.bytes_read(depth, type_k, type_v)
    return dict(n_bytes)


def bench(
    path: str | os.PathLike[str],
    *,
    n_prompt: int = 512,
    n_gen: int = 128,
    n_depth: int = 0,
    repetitions: int = 5,
    offload: Offload = "auto",
    rpc: Sequence[str] = (),
    n_batch: int = 512,
    n_threads: int | None = None,
    type_k: CacheType = "f16",
    type_v: CacheType = "f16",
    load_mode: LoadMode = "mmap",
    memory: Mapping[str, int | str] | None = None,
    progress: Callable[[str, float], object] | None = None,
) -> Bench:
    """Measure a model on this machine, as llama-bench does, and how much of the hardware it uses.

    Tokens are streamed by :meth:`Model.stream` with the sampling options of the file, so sampler and text are part of
    the time. Which device takes how long is measured afterwards, in a run of its own that waits after each piece of
    the graph.

    Parameters
    ----------
    path
        A GGUF file, or ``hf:OWNER/REPOSITORY/FILE.gguf``.
    n_prompt
        Tokens of the prompt whose reading is measured; 0 leaves that out.
    n_gen
        Tokens to decode, at least 4.
    n_depth
        Tokens in the context before decoding.
    repetitions
        Times that each is measured, 1 to 1000, after one that does not count.
    offload, rpc, n_batch, n_threads, type_k, type_v, load_mode, memory
        As :class:`Model` has them.
    progress
        Called with what is being done, and the share of all that is done.

    Raises
    ------
    ValueError, TypeError, Error
        As :class:`Model` does.
    """
    n_prompt = as_integer("n_prompt", n_prompt, 0, 2**31 - 1)
    n_gen = as_integer("n_gen", n_gen, 4, 2**31 - 1)
    n_depth = as_integer("n_depth", n_depth, 0, 2**31 - 1)
    repetitions = as_integer("repetitions", repetitions, 1, 1000)
    n_ctx = max(n_prompt, max(1, n_depth) + n_gen) + 1
    n_steps = 3 + (repetitions + 1) * (1 + (n_prompt > 0))
    done = 0

    def step(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(what, done / n_steps)
        done += 1

    step("loading")
    options: dict[str, Any] = {"n_batch": n_batch, "n_threads": n_threads, "type_k": type_k, "type_v": type_v}
    with Model(path, offload=offload, rpc=rpc, n_ctx=n_ctx, load_mode=load_mode, memory=memory, **options) as model:
        random_ids = random.Random(0)
        prompt = [random_ids.randrange(model.n_vocab) for _ in range(max(n_prompt, n_depth, 1))]
        ends = {token: -math.inf for token in range(model.n_vocab) if model.is_end_of_generation(token)}
        bias = {**dict(model.sampling.logit_bias), **ends}
        prefill, decode = [], []
        breakdowns: list[Breakdown] = []
        for i in range(repetitions + 1):
            if n_prompt:
                step(f"reading {n_prompt} tokens, {'warming up' if i == 0 else f'{i} of {repetitions}'}")
                with model.stream(prompt[:n_prompt], max_tokens=1) as stream:
                    next(stream)
                prefill.append(stream.stats.prefill_s)
            step(f"decoding {n_gen} tokens, {'warming up' if i == 0 else f'{i} of {repetitions}'}")
            with model.stream(prompt[: max(1, n_depth)], max_tokens=n_gen + 1, logit_bias=bias, seed=1) as stream:
                ids = [next(stream).id]
                start = time.perf_counter()
                ids += [token.id for token in stream]
                decode.append(time.perf_counter() - start)
            breakdowns.append(stream.stats.breakdown)
        step("timing each device")
        n_timed = min(n_gen - 2, 64)
        times = model._core.time_devices([*prompt[: max(1, n_depth)], *ids[: n_gen - 1]], n_timed)
        placement, info, settings = model.placement, model.info, dict(model._settings)
    # With the model gone, there is memory to measure with.
    step("measuring memory")
    read = read_bytes_by_device(info, placement, max(1, n_depth) + n_gen // 2, type_k, type_v)
    used = sorted((device for device in times["devices"]), key=lambda device: device == CPU)
    shares = [
        DeviceShare(device, read.get(device, 0), device_bandwidth(device), *times["devices"][device]) for device in used
    ]
    if progress is not None:
        progress("done", 1.0)
    return Bench(
        info=info,
        path=model.path,
        placement=placement,
        settings=settings,
        found=tuple(devices()),
        prefill=Samples(n_prompt, 0, 0, tuple(prefill[1:])) if n_prompt else None,
        decode=Samples(0, n_gen, n_depth, tuple(decode[1:])),
        breakdown=_sum(breakdowns[1:]),
        devices=tuple(shares),
        moving_s=times["moving_s"],
        around_s=times["total_s"] - times["moving_s"] - sum(seconds for seconds, _ in times["devices"].values()),
    )


def _sum(breakdowns: Sequence[Breakdown]) -> Breakdown:
    sums: dict[str, Any] = {}
    for name in (name for name in Breakdown.__slots__ if name != "graph_splits"):
        values = [getattr(one, name) for one in breakdowns]
        sums[name] = None if None in values else sum(values)
    return Breakdown(**sums, graph_splits=breakdowns[0].graph_splits)
