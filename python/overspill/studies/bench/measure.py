"""Measuring a model: prompts, decoding, each device's part of a token, and the speed of its memory."""

from __future__ import annotations

import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from overspill._core import DeviceMeter
from overspill.base.checks import as_function, as_integer
from overspill.base.host import logical_cpus
from overspill.base.values import (
    DEFAULT_CACHE_TYPE,
    DEFAULT_LOAD_MODE,
    DEFAULT_SWITCH,
    Breakdown,
    CacheType,
    Experts,
    ExpertStats,
    LoadMode,
    Switch,
)
from overspill.engine.loading import wait_for_pinning
from overspill.engine.model import Model
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import layer_caches
from overspill.header.tensor_names import part_of
from overspill.hub import resolve
from overspill.machine.devices import devices
from overspill.machine.measure import weight_shapes
from overspill.placement.device_names import CPU
from overspill.placement.placement import Placement
from overspill.planning.offload import Offload
from overspill.studies.bench.result import Bench
from overspill.studies.bench.samples import DeviceShare, Samples, WeightSpeed

__all__ = ["bench", "device_bandwidth", "read_bytes_by_device"]

_WORKING_SET_BYTES = 512 << 20  # more than any cache holds


def device_bandwidth(device: str) -> float:
    """Return how fast a device reads its memory, in bytes per second; measuring takes up to a second.

    The CPU scans 512 MiB with a thread on each logical CPU. Other devices can only be asked to compute: theirs is the
    fastest product of a large matrix and a vector, in F32, F16 or Q8_0.
    """
    meter = DeviceMeter(
        device,
        n_threads=min(logical_cpus(), 512),
        working_set_bytes=_WORKING_SET_BYTES,
        gpus=[],
        budget_s=0.3,
    )
    if device == CPU:
        return meter.memory_bytes_per_s()
    return max(meter.weight_rate(kind, 4096, 8192, 0, 0).bytes_per_s for kind in ("f32", "f16", "q8_0"))


def read_bytes_by_device(
    info: ModelInfo, placement: Placement, depth: int, type_k: str = "f16", type_v: str = "f16"
) -> dict[str, int]:
    """Return the bytes of weights and KV cache that decoding one token reads on each device.

    That is one row of the embedding, the experts that are used, and ``depth`` tokens of the cache, or a window of them.
    """
    n_bytes: Counter[str] = Counter()
    where = _where_read(info, placement)
    for tensor in info.tensors:
        n_bytes[where[tensor[0]]] += info.read_bytes(tensor)
    for cache, device in zip(layer_caches(info), placement.kv, strict=True):
        n_bytes[device] += cache.bytes_read(depth, type_k, type_v)
    return dict(n_bytes)


def _where_read(info: ModelInfo, placement: Placement) -> dict[str, str]:
    """Return the device that reads each tensor; an embedding that is the output matrix as well, as that."""
    where = placement.tensors()
    return {
        name: placement.output_matrix if info.tied_embedding and part_of(name) == "embedding" else where.get(name, CPU)
        for name, *_ in info.tensors
    }


def weight_speeds(info: ModelInfo, placement: Placement, settings: Mapping[str, Any]) -> tuple[WeightSpeed, ...]:
    """Return how fast weights in RAM are read, by type, with products and threads as a model of these settings has."""
    in_ram = {name for name, device in _where_read(info, placement).items() if device == CPU}
    shapes = weight_shapes(info, in_ram)
    if not shapes:
        return ()
    meter = DeviceMeter(
        CPU,
        n_threads=settings["n_threads"],
        working_set_bytes=_WORKING_SET_BYTES,
        gpus=[device for device in placement.devices_used if device != CPU],
        budget_s=0.1,
    )
    meter.use_products(settings["kernels"], {"auto": None, "on": True, "off": False}[settings["repack"]])
    speeds = []
    for weights, shape in shapes.items():
        rate = meter.weight_rate(*shape)
        speeds.append(WeightSpeed(weights, rate.bytes_per_s, meter.memory_bytes_per_s(), rate.kernels))
    return tuple(speeds)


def bench(
    path: str | os.PathLike[str],
    *,
    n_prompt: int = 512,
    n_gen: int = 128,
    n_depth: int = 0,
    repetitions: int = 5,
    offload: Offload = "auto",
    experts: Experts = "auto",
    rpc: Sequence[str] = (),
    n_batch: int | None = None,
    n_ubatch: int | None = None,
    n_threads: int | None = None,
    type_k: CacheType = DEFAULT_CACHE_TYPE,
    type_v: CacheType = DEFAULT_CACHE_TYPE,
    flash_attention: Switch = DEFAULT_SWITCH,
    load_mode: LoadMode = DEFAULT_LOAD_MODE,
    memory: Mapping[str, int | str] | None = None,
    progress: Callable[[str, float], object] | None = None,
) -> Bench:
    """Return a model's speed on this machine, measured as llama-bench does, and its share of the possible speed.

    :meth:`Model.stream` makes the tokens, with the sampling options of the file: the times include sampler and text.
    Each device's time is measured afterwards, in a run of its own that waits after each piece of the graph.

    Parameters
    ----------
    path
        A GGUF file, or ``hf:OWNER/REPOSITORY/FILE.gguf``.
    n_prompt
        Tokens of the prompt whose reading is measured; 0 for no prompt.
    n_gen
        Tokens to decode, at least 4.
    n_depth
        Tokens in the context before decoding.
    repetitions
        Measured runs of each test, 1 to 1000, after one that does not count.
    offload, experts, rpc, n_batch, n_ubatch, n_threads, type_k, type_v, flash_attention, load_mode, memory
        As for :class:`Model`.
    progress
        Called with the current step, in words, and the share of all steps that are done, 0.0 to 1.0.

    Raises
    ------
    ValueError, TypeError, Error
        As for :class:`Model`.
    """
    n_prompt = as_integer("n_prompt", n_prompt, 0, 2**31 - 1)
    n_gen = as_integer("n_gen", n_gen, 4, 2**31 - 1)
    n_depth = as_integer("n_depth", n_depth, 0, 2**31 - 1)
    repetitions = as_integer("repetitions", repetitions, 1, 1000)
    file = resolve(path)
    if progress is not None:
        as_function("progress", progress)
    n_ctx = max(n_prompt, max(1, n_depth) + n_gen) + 1
    n_steps = 3 + (repetitions + 1) * (1 + (n_prompt > 0))
    done = 0

    def step(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(what, done / n_steps)
        done += 1

    step("loading")
    options: dict[str, Any] = {"n_batch": n_batch, "n_ubatch": n_ubatch, "type_k": type_k, "type_v": type_v}
    with Model(
        path if isinstance(path, ModelInfo) else file,
        offload=offload,
        experts=experts,
        rpc=rpc,
        n_ctx=n_ctx,
        n_threads=n_threads,
        flash_attention=flash_attention,
        load_mode=load_mode,
        memory=memory,
        **options,
    ) as model:
        model._remembers_experts = False
        wait_for_pinning(model._core)
        random_ids = random.Random(0)
        prompt = [random_ids.randrange(model.n_vocab) for _ in range(max(n_prompt, n_depth, 1))]
        ends = {token: -math.inf for token in range(model.n_vocab) if model.is_end_of_generation(token)}
        bias = {**dict(model.sampling.logit_bias), **ends}
        prefill, decode = [], []
        breakdowns: list[Breakdown] = []
        hits: list[ExpertStats | None] = []
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
            hits.append(stream.stats.experts)
        step("timing each device")
        n_timed = min(n_gen - 2, 64)
        times = model._core.time_devices([*prompt[: max(1, n_depth)], *ids[: n_gen - 1]], n_timed)
        placement, info, settings = model.placement, model.info, asdict(model._settings)
    # With the model gone, there is memory to measure with.
    step("measuring memory")
    depth = max(1, n_depth) + n_gen // 2
    read = read_bytes_by_device(info, placement, depth, settings["type_k"], settings["type_v"])
    answered = _sum_of_experts(hits[1:])
    if answered is not None and answered.requests:
        n_tokens = answered.requests / (info.n_experts_used * len(info.expert_layers))
        _move_hits(read, answered.hit_bytes / n_tokens, placement.expert_cache)
    shares = [
        DeviceShare(device, read.get(device, 0), device_bandwidth(device), part.seconds, part.n_pieces)
        for device, part in sorted(times.devices.items(), key=lambda item: item[0] == CPU)
    ]
    weights = weight_speeds(info, placement, settings)
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
        weights=weights,
        moving_s=times.moving_s,
        around_s=times.total_s - times.moving_s - sum(part.seconds for part in times.devices.values()),
        experts=answered,
    )


def _sum(breakdowns: Sequence[Breakdown]) -> Breakdown:
    sums: dict[str, Any] = {}
    for name in (name for name in Breakdown.__slots__ if name != "graph_splits"):
        values = [getattr(one, name) for one in breakdowns]
        sums[name] = None if None in values else sum(values)
    return Breakdown(**sums, graph_splits=breakdowns[0].graph_splits)


def _sum_of_experts(runs: Sequence[ExpertStats | None]) -> ExpertStats | None:
    """Return what was counted in all runs, and how the cache was after the last."""
    counted = [one for one in runs if one is not None]
    if not counted:
        return None
    names = ("requests", "hits", "insertions", "hit_bytes", "miss_bytes")
    return replace(counted[-1], **{name: sum(getattr(one, name) for one in counted) for name in names})


def _move_hits(read: dict[str, int], hit_bytes: float, pools: Mapping[str, int]) -> None:
    """Count what a token reads of cached experts as read on the GPUs, by the sizes of their pools."""
    total = sum(pools.values())
    for device, n_bytes in pools.items():
        share = round(hit_bytes * n_bytes / total)
        read[device] = read.get(device, 0) + share
        read[CPU] -= share
