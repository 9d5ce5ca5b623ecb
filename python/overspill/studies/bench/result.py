"""A model's measured speed on a machine, as tables, as a picture and as llama-bench's JSON."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from overspill._core import LLAMA_CPP_COMMIT, repacks
from overspill.base import html
from overspill.base.cached import cached_property
from overspill.base.tables import plain_table
from overspill.base.text import short_repr
from overspill.base.units import format_bytes, format_count, format_rate
from overspill.base.values import Breakdown, Device, ExpertStats
from overspill.header.info import ModelInfo
from overspill.machine.measure import products_name, weights_name
from overspill.placement.device_names import memory_name
from overspill.placement.placement import Placement
from overspill.studies.bench.plot import draw_token
from overspill.studies.bench.samples import DeviceShare, Samples, WeightSpeed

__all__ = ["Bench"]


@dataclass(frozen=True)
class Bench:
    """A model's measured speed on this machine; :func:`bench` returns it."""

    info: ModelInfo
    path: Path
    placement: Placement
    settings: dict[str, Any]
    """The settings of :class:`Model`: ``n_ctx``, ``n_batch``, ``n_threads`` and so on."""
    found: tuple[Device, ...]
    """The devices of this machine."""
    prefill: Samples | None
    decode: Samples
    breakdown: Breakdown
    """The sum over the decoded tokens of all runs."""
    devices: tuple[DeviceShare, ...]
    """The devices that hold parts of the model."""
    weights: tuple[WeightSpeed, ...]
    """The types of the weights in RAM that a token reads."""
    moving_s: float
    """Seconds of a token for copies between devices, and for waiting for them."""
    around_s: float
    """Seconds of a token for starting the graph, and for fetching the logits."""
    experts: ExpertStats | None = None
    """What a cache of experts answered in all measured runs. The tokens are a reply to random ones, not to a text."""
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def token_s(self) -> float:
        """Seconds of a decoded token: the median of all runs."""
        return statistics.median(self.decode.seconds) / self.decode.n_gen

    @property
    def roofline_s(self) -> float:
        """Least seconds of a token: the devices work one after the other, each at the speed of its memory."""
        return sum(device.floor_s for device in self.devices)

    @property
    def share(self) -> float:
        """``roofline_s / token_s``: the share of the possible speed."""
        return self.roofline_s / self.token_s

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of a token by part, such as ``sampler``; the rest is last."""
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
        """The part that takes most of a token's time."""
        if self.share > 1:
            return "the processor's caches: they keep weights from token to token, so memory is not the limit"
        return max(self.parts, key=lambda part: self.parts[part])

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a mapping for each test, with the fields of llama-bench's ``--output json``.

        The one for decoding also has ``overspill``, with ``roofline_s``, ``devices``, ``weights``, ``parts_s``,
        ``breakdown``, ``experts`` and ``limit``.
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
            "weights": [{**asdict(one), "share": one.share} for one in self.weights],
            "parts_s": self.parts,
            "experts": asdict(self.experts) if self.experts is not None else None,
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
            "build_commit": LLAMA_CPP_COMMIT[:9],
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
            "repack": settings["repack"] == "on" or (settings["repack"] == "auto" and repacks(settings["kernels"])),
            "fit_target": 0,
            "fit_min_ctx": 0,
        }

    def __rich__(self) -> Group:
        """Return tables for a terminal."""
        tables = [self._tests(), self._roofline(), *([self._weights()] if self.weights else []), self._parts()]
        return Group(self._heading(), *(line for table in tables for line in ("", table)), "", self._verdict())

    def _repr_html_(self) -> str:
        """Return the tables for a notebook."""
        return html.from_rich(self.__rich__().renderables)

    def __repr__(self) -> str:
        """Return the model, where it is, and the speeds in brackets."""
        speeds = ", ".join(f"{one.name} {one.tokens_per_s:.2f} tok/s" for one in (self.prefill, self.decode) if one)
        return short_repr(self, f"{speeds}: {self._heading().plain}")

    def _heading(self) -> Text:
        name = self.info.name or self.info.architecture
        where = " + ".join(memory_name(device.device) for device in self.devices)
        size = format_bytes(self.info.file_bytes, digits=2, unit="GiB")
        threads = format_count(self.settings["n_threads"], "thread")
        text = f"{name}, {self.info.quantisation}, {size}, on {where}, {threads}"
        return Text(text, "bold")

    def _tests(self) -> Table:
        table = plain_table("test", "tok/s", "±")
        for samples in (self.prefill, self.decode):
            if samples is not None:
                table.add_row(samples.name, f"{samples.tokens_per_s:.2f}", f"{samples.deviation:.2f}")
        return table

    def _roofline(self) -> Table:
        table = plain_table("device", "reads a token", "bandwidth", "at least", "takes", "reads", "of roofline")
        for one in self.devices:
            table.add_row(
                memory_name(one.device),
                f"{one.read_bytes / 1e6:.1f} MB",
                format_rate(one.bandwidth_bytes_per_s),
                f"{one.floor_s * 1e3:.3f} ms",
                f"{one.busy_s * 1e3:.3f} ms",
                format_rate(one.read_bytes / one.busy_s) if one.busy_s else "–",
                f"{one.share:.0%}",
            )
        read = sum(one.read_bytes for one in self.devices)
        row = (f"{read / 1e6:.1f} MB", "", f"{self.roofline_s * 1e3:.3f} ms", f"{self.token_s * 1e3:.3f} ms")
        table.add_row("all", *row, format_rate(read / self.token_s), f"{self.share:.0%}", style="bold")
        return table

    def _weights(self) -> Table:
        table = plain_table("weights in RAM", "reads", "plain reads", "share", "products of")
        for one in self.weights:
            rates = (format_rate(one.bytes_per_s), format_rate(one.plain_reads_bytes_per_s))
            table.add_row(weights_name(one.weights), *rates, f"{one.share:.2f}", products_name(one.kernels))
        return table

    def _parts(self) -> Table:
        table = plain_table("where a token's time goes", "µs", "share", "")
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
            f"The limit is {self.limit}{disk}.{self._hits()}"
        )

    def _hits(self) -> str:
        if self.experts is None or self.experts.hit_share is None:
            return ""
        if self.experts.is_off:
            return " A cache of experts was tried, and decoding was faster without it."
        share = self.experts.resident / self.experts.experts
        return f" A cache with {share:.0%} of the experts answered {self.experts.hit_share:.0%} of the requests."

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw the time of a token, beside what the memory allows, into a PNG, SVG or PDF file.

        Raises
        ------
        Error
            matplotlib is not installed.
        ValueError
            The file's ending is none of matplotlib's formats.
        """
        name = self.info.name or self.info.architecture
        title = (
            f"{name}: {self.decode.tokens_per_s:.1f} tok/s, {self.share:.0%} of the {1 / self.roofline_s:.1f} that the "
            "memory allows"
        )
        draw_token(file, title, {one.device: one.floor_s for one in self.devices}, self.parts)
