"""Measurements of devices: the speed and the fixed costs of decoding, and the file that keeps them.

A question asks for one figure of one device. The file answers it, or a measurement does.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeAlias

from overspill._core import LLAMA_CPP_COMMIT, DeviceMeter, Error, UnusableError, cpu_kernels
from overspill.base.checks import as_real
from overspill.base.files import cache_folder, read_json, replace_json
from overspill.base.host import available_ram_bytes, last_level_cache_bytes
from overspill.base.values import Device, Kernels
from overspill.header.info import ModelInfo

__all__ = [
    "EXCHANGE",
    "FLOPS_OF",
    "PLAIN_READS_BESIDE",
    "DeviceFigures",
    "Report",
    "known_figures",
    "products_name",
    "weight_shapes",
    "weights_name",
]

logger = logging.getLogger("overspill")

Report: TypeAlias = Callable[[str, float], object]
"""Called before each measurement with its name and the share that is done, 0 to 1."""
WeightShape: TypeAlias = tuple[str, int, int, int, int]
"""Type, elements in, elements out, experts and experts used; both 0 for a plain matrix."""

FLOPS_OF = "flops of "
"""What the key of a rate is preceded by where it stands for operations per second."""

EXCHANGE = "exchange_s"
"""The key of what having experts computed on a device costs."""

PLAIN_READS_BESIDE = "plain reads beside "
"""What the key of a rate is preceded by where it stands for reads that compute nothing."""

_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 256, 2048
_LINK_BLOCK_BYTES = 64 << 20
_MOST_INTERRUPTIONS_PER_S = 40  # for each second that a thread runs
_MOST_ATTEMPTS = 2  # of a measurement that other programs disturb
_INTEGER_AND_DOUBLE_TYPES = ("i8", "i16", "i32", "i64", "f64")


class DeviceFigures(NamedTuple):
    """The figures of every device that was asked about."""

    by_device: list[dict[str, float]]
    """For each device, the figures that are known: rates in bytes per second, by the keys of
    :attr:`overspill.DeviceSpec.rates`, after :data:`PLAIN_READS_BESIDE` those of
    :attr:`overspill.DeviceSpec.plain_reads`, and after :data:`FLOPS_OF` those of :attr:`overspill.DeviceSpec.flops`;
    ``"bandwidth"``; ``"op_s"``, ``"hop_s"``, and the four links of a :class:`overspill.DeviceSpec`."""
    complete: bool
    """Whether no figure is missing."""


class _Question(NamedTuple):
    device: Device
    figure: str
    """Its key in :attr:`DeviceFigures.by_device`."""
    key: tuple[str, str]
    """The device and the quantity, as the file calls them."""
    text: str
    """As the user reads it."""
    ask: Callable[[DeviceMeter], float]


def known_figures(
    devices: Sequence[Device],
    info: ModelInfo | None,
    *,
    n_threads: int,
    kv_type: str,
    no_host: bool,
    kernels: Kernels,
    measure: bool,
    refresh: bool,
    progress: Report | None,
) -> DeviceFigures:
    """Return the figures of ``devices``, GPUs and then the CPU, for the weights of the model ``info``.

    Parameters are those of :meth:`overspill.Hardware.here`.
    """
    cache = _Cache(cache_folder() / "hardware.json")
    questions = [
        list(_questions(device, info, devices, n_threads=n_threads, kv_type=kv_type, no_host=no_host, kernels=kernels))
        for device in devices
    ]
    every = list(chain.from_iterable(questions))
    if measure:
        missing = [question for question in every if refresh or question.key not in cache.figures]
        _answer(missing, cache, devices, n_threads, no_host, kernels, progress)
    found = [
        {question.figure: cache.figures[question.key] for question in of_device if question.key in cache.figures}
        for of_device in questions
    ]
    return DeviceFigures(found, all(question.key in cache.figures for question in every))


# --- questions


def weight_shapes(info: ModelInfo, among: Container[str] | None = None) -> dict[str, WeightShape]:
    """Return the shape of most bytes that a token reads of each kind of weights, ``among`` tensors of these names.

    Keys are a type, such as ``"q8_0"``, or a type of experts, such as ``"mxfp4:experts"``.
    """
    sizes: defaultdict[str, Counter[WeightShape]] = defaultdict(Counter)
    for name, kind, shape, n_bytes in info.tensors:
        looked_up = name.startswith("token_embd.") and not info.tied_embedding
        if among is not None and name not in among:
            continue
        if len(shape) < 2 or looked_up or not name.endswith(".weight") or kind in _INTEGER_AND_DOUBLE_TYPES:
            continue
        n_in, n_out, *rest = shape
        if rest and re.search(r"_(ch)?exps\b", name):
            used = max(1, info.n_experts_used)
            sizes[f"{kind}:experts"][kind, n_in, n_out, rest[0], min(used, rest[0])] += n_bytes * used // rest[0]
        else:
            sizes[kind][kind, n_in, n_out * math.prod(rest), 0, 0] += n_bytes
    return {figure: counts.most_common(1)[0][0] for figure, counts in sizes.items()}


def weights_name(figure: str) -> str:
    """Return a key of :func:`weight_shapes` as the user reads it."""
    kind, _, part = figure.partition(":")
    return f"{kind.upper()} {part}".rstrip()


def products_name(kernels: str) -> str:
    """Return as the user reads it whose products weights are multiplied with, ``"llama.cpp"`` or a set of ours."""
    return kernels if kernels == "llama.cpp" else f"Overspill, {kernels}"


def _questions(
    device: Device,
    info: ModelInfo | None,
    devices: Sequence[Device],
    *,
    n_threads: int,
    kv_type: str,
    no_host: bool,
    kernels: Kernels,
) -> Iterator[_Question]:
    is_cpu = device is devices[-1]
    if device.backend == "RPC":
        others = [other for other in devices if other.description == device.description]
        identity = f"RPC {device.description}, device {others.index(device)}"
    else:
        identity = f"{device.name}, {device.description}"
    if is_cpu:
        beside = _local_gpus(devices)
        identity += f", {n_threads} threads" + (f", beside {'+'.join(beside)}" if beside else "")
        identity += ", no_host" if no_host else ""
        identity += f", kernels {cpu_kernels() if kernels == 'auto' else kernels}"
    identity += f", llama.cpp {LLAMA_CPP_COMMIT}"

    def question(figure: str, key: str, text: str, ask: Callable[[DeviceMeter], float]) -> _Question:
        return _Question(device, figure, (identity, key), f"{device.name}: {text}", ask)

    def weights(figure: str, shape: WeightShape) -> _Question:
        kind, n_in, n_out, n_experts, n_used = shape
        key = f"{kind} {n_in}x{n_out}" + (f"x{n_experts}, {n_used} used" if n_experts else "")
        return question(figure, key, f"weights in {kind.upper()}", lambda meter: meter.weight_rate(*shape).bytes_per_s)

    def plain_reads(weights: _Question) -> _Question:
        key = f"{PLAIN_READS_BESIDE}{weights.key[1]}"
        text = "memory, without computing"
        return question(PLAIN_READS_BESIDE + weights.figure, key, text, lambda meter: meter.memory_bytes_per_s())

    n_tokens = _CPU_BATCH_TOKENS if is_cpu else _GPU_BATCH_TOKENS

    def batch(figure: str, shape: WeightShape) -> _Question:
        kind, n_in, n_out, n_experts, n_used = shape
        key = f"batch of {n_tokens}, {kind} {n_in}x{n_out}" + (f"x{n_experts}, {n_used} used" if n_experts else "")
        text = f"a batch with weights in {kind.upper()}"
        return question(FLOPS_OF + figure, key, text, lambda meter: meter.batch_flops(*shape, n_tokens))

    def links(*, pinned: bool) -> Iterator[_Question]:
        memory, prefix = ("pinned memory", "") if pinned else ("memory that is not pinned", "unpinned_")
        yield question(
            f"{prefix}link_bytes_per_s",
            f"link from {memory}",
            f"the link from {memory}",
            lambda meter: meter.link_rates(_LINK_BLOCK_BYTES, pinned).to_device_bytes_per_s,
        )
        yield question(
            f"{prefix}link_back_bytes_per_s",
            f"link to {memory}",
            f"the link to {memory}",
            lambda meter: meter.link_rates(_LINK_BLOCK_BYTES, pinned).from_device_bytes_per_s,
        )

    yield weights("bandwidth", ("f16", 4096, 4096, 0, 0))
    n_embd = 4096
    if info is not None:
        n_embd = info.n_embd or n_embd
        for figure, shape in weight_shapes(info).items():
            yield (rate := weights(figure, shape))
            if is_cpu:
                yield plain_reads(rate)
            yield batch(figure, shape)
        heads = _heads(info)
        if heads is not None:
            yield question(
                f"{FLOPS_OF}{kv_type}:kv",
                f"batch of {n_tokens}, {kv_type} KV cache, {heads[0]} of {heads[1]} heads of {heads[2]}",
                f"a batch's attention in {kv_type.upper()}",
                lambda meter: meter.attention_flops(kv_type, *heads, n_tokens),
            )
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
        experts = None if info is None or device.backend == "RPC" else _expert_shape(info)
        if experts is not None:
            yield question(
                EXCHANGE,
                f"exchange with an expert, {experts[0]} {experts[1]}x{experts[2]}",
                "sending activations to experts there, and their results back",
                lambda meter: meter.exchange_s(*experts, 1),
            )
        yield from links(pinned=True)
        yield from links(pinned=False)


def _expert_shape(info: ModelInfo) -> tuple[str, int, int] | None:
    """Return type, input and output of the first matrix of most layers' experts; None without experts."""
    firsts = [
        name for name, *_ in info.tensors if re.search(r"ffn_gate(_up)?_exps\.weight$|ffn_up_exps\.weight$", name)
    ]
    found = [shape for figure, shape in weight_shapes(info, firsts).items() if figure.endswith(":experts")]
    return None if not found else (found[0][0], found[0][1], found[0][2])


def _local_gpus(devices: Sequence[Device]) -> list[str]:
    return [device.name for device in devices[:-1] if device.backend != "RPC"]


def _heads(info: ModelInfo) -> tuple[int, int, int] | None:
    """Return heads, heads of the KV cache and their width; None where layers differ in them."""
    key = f"{info.architecture}.attention."
    n_heads = info.metadata.get(f"{key}head_count")
    n_heads_kv = info.metadata.get(f"{key}head_count_kv", n_heads)
    if not (isinstance(n_heads, int) and isinstance(n_heads_kv, int) and n_heads > 0 and n_heads_kv > 0):
        return None
    if n_heads % n_heads_kv:
        return None
    width = info.metadata.get(f"{key}key_length", info.n_embd // n_heads)
    return (n_heads, n_heads_kv, width) if isinstance(width, int) and width else None


# --- answers


def _answer(
    questions: Sequence[_Question],
    cache: _Cache,
    devices: Sequence[Device],
    n_threads: int,
    no_host: bool,
    kernels: Kernels,
    progress: Report | None,
) -> None:
    """Measure the answers to ``questions``, which are sorted by device, and put them into the cache and its file."""
    meter: DeviceMeter | None = None
    measured: Device | None = None
    disturbed = 0
    try:
        for i, question in enumerate(questions):
            if progress is not None:
                progress(question.text, i / len(questions))
            if question.device is not measured:
                meter = None  # frees its memory before the next one takes some
                measured = question.device
                meter = DeviceMeter(
                    measured.name,
                    n_threads=n_threads,
                    working_set_bytes=_working_set_bytes(measured),
                    gpus=_local_gpus(devices),
                    budget_s=0.08,
                )
                meter.use_products(kernels, True if no_host else None)
            assert meter is not None
            try:
                for _ in range(_MOST_ATTEMPTS):
                    figure, is_disturbed = _ask(question, meter)
                    if not is_disturbed:
                        break
                cache.put(question, figure, keep=not is_disturbed)
                disturbed += is_disturbed
            except Error as error:
                # For example a type that the device cannot compute with; llama.cpp reports it if it matters.
                logger.warning("%s could not be measured: %s", question.text, error)
                if isinstance(error, UnusableError):
                    measured = None  # another meter for the next one
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


def _ask(question: _Question, meter: DeviceMeter) -> tuple[float, bool]:
    """Return the figure, and whether other programs kept the CPU busy meanwhile, if it is the CPU's."""
    start_s, interruptions = time.process_time(), _interruptions()
    figure = question.ask(meter)
    most = _MOST_INTERRUPTIONS_PER_S * (time.process_time() - start_s)
    # On an idle machine a thread is hardly ever interrupted, on a virtual one up to 30 times a second; beside another
    # program, 100 times.
    return figure, question.device.kind == "cpu" and _interruptions() - interruptions > most


def _interruptions() -> int:
    """Return how often the system has interrupted a thread of this process for another program; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _working_set_bytes(device: Device) -> int:
    """Return so many bytes of weights that caches of the device do not count; fewer where little memory is free.

    Caches of CPUs keep a part of what is read again and again, as much of it as they can hold: with four times as much,
    reads were a sixth faster than memory is. Each layout of weights has a working set of its own.
    """
    if device.kind == "cpu":
        wanted = max(1 << 30, min(8 * last_level_cache_bytes(), 4 << 30))
        free = available_ram_bytes() or device.free_bytes
        return max(16 << 20, min(wanted, free // 8 or wanted))
    wanted = 256 << 20 if device.backend == "RPC" else 512 << 20
    return max(16 << 20, min(wanted, device.free_bytes // 4 or wanted))


# --- the file


class _Cache:
    """Figures by device and quantity, kept in a file."""

    _FORMAT = 2

    def __init__(self, file: Path) -> None:
        self._file = file
        self.figures = self._read()
        self._new: dict[tuple[str, str], float] = {}

    def _read(self) -> dict[tuple[str, str], float]:
        try:
            if not self._file.exists():
                return {}
            data = read_json(self._file)
            if data["format"] != self._FORMAT:
                return {}
            return {
                (device, key): float(value)
                for device, figures in data["devices"].items()
                for key, value in figures.items()
                if as_real(key, value) > 0
            }
        except (Error, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.info("%s is not readable, so it is written anew: %r", self._file, error)
            return {}

    def put(self, question: _Question, figure: float, *, keep: bool) -> None:
        """Remember an answer; :meth:`save` writes it if it is to be kept."""
        self.figures[question.key] = figure
        if keep:
            self._new[question.key] = figure

    def save(self) -> None:
        """Add new figures to the file; other programs may have written to it meanwhile."""
        if not self._new:
            return
        devices: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for (device, key), figure in sorted({**self._read(), **self._new}.items()):
            devices[device][key] = figure
        try:
            replace_json(self._file, {"format": self._FORMAT, "devices": devices})
        except OSError as error:
            logger.warning("the measurements could not be kept: %s", error)
