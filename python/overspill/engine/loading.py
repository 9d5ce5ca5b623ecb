"""Load a model: choose the placement, check the memory, and put less on a GPU that refuses."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overspill._core import CacheType as NativeCacheType
from overspill._core import CpuKernels as NativeKernels
from overspill._core import (
    Error,
    ExpertCacheOptions,
    MemoryReport,
    Model,
    ModelOptions,
    OutOfMemoryError,
    PinnedMemory,
    cpu_kernel_types,
    cpu_kernels,
)
from overspill._core import LoadMode as NativeLoadMode
from overspill._core import Placement as NativePlacement
from overspill._core import Switch as NativeSwitch
from overspill.base.host import available_ram_bytes
from overspill.base.units import format_bytes
from overspill.base.values import MemoryUse, Progress
from overspill.engine.load_settings import LoadSettings
from overspill.header.info import ModelInfo, Tensor
from overspill.header.kv_cache import layer_caches
from overspill.machine.devices import devices
from overspill.machine.hardware import Hardware
from overspill.placement.device_names import CPU
from overspill.placement.placement import Placement
from overspill.planning.expert_profile import ExpertProfile, load_expert_profile
from overspill.planning.forecast import Estimate, Forecast
from overspill.planning.graph.schedule import OFFLOAD_TOKENS
from overspill.planning.offload import Offload, placement_for
from overspill.planning.plan import Plan, before_loading
from overspill.planning.settings import Settings as PlanSettings
from overspill.planning.workload import pinning_room_bytes

__all__ = [
    "LoadSettings",
    "Loaded",
    "check_ram_for_caches",
    "load",
    "memory_by_device",
    "wait_for_pinning",
]

logger = logging.getLogger("overspill")
forecast_logger = logging.getLogger("overspill.forecast")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model."""

    native: Model
    settings: LoadSettings
    """The settings as asked for, with what was planned; without repacking if RAM is short."""
    placement: Placement | None
    """The placement as asked of llama.cpp; None for the CPU alone."""


def load(
    path: Path,
    info: ModelInfo | None,
    offload: Offload,
    settings: LoadSettings,
    memory: Mapping[str, int | str],
    progress: Progress | None,
) -> Loaded:
    """Return the loaded model; its vocabulary alone without ``info``.

    Each time that a GPU refuses memory, a plan puts less on it.
    """
    if info is None:
        return Loaded(Model(os.fsencode(path), _options(settings, None), progress), settings, None)
    wanted = _with_cache(info, settings, _placement(info, offload, settings, memory), memory)
    profile = None
    if wanted is not None and wanted.expert_cache:
        profile = load_expert_profile(info)
        if settings.experts == "auto" and isinstance(wanted, Plan):
            completed = _completed(info, settings, wanted)
            # RAM has no room to pin the weights, or the driver cannot; or it was tried, and was slower.
            if (completed.is_mapped and not completed.pin_weights) or profile.is_faster is False:
                wanted = wanted.static()
    if isinstance(wanted, Plan):
        wanted = _fitted(path, info, settings, wanted)
    asked = settings
    refusals: list[str] = []
    while True:
        settings = _mind_ram(path, info, _completed(info, asked, wanted), wanted)
        if not refusals:
            _tell(wanted, settings)
        options = _options(settings, wanted, profile)
        options.share_of_reading = _share_of_reading(info, settings, wanted)
        try:
            native = Model(os.fsencode(path), options, progress)
            break
        except OutOfMemoryError as error:
            smaller = _with_less(wanted, error.device, 0.1 * 2 ** len(refusals)) if isinstance(wanted, Plan) else None
            if smaller is not None and settings.expert_cache:
                given = wanted.expert_cache if wanted is not None else {}
                smaller.expert_cache = {name: min(n, given.get(name, 0)) for name, n in smaller.expert_cache.items()}
            if smaller is None:
                raise
            refusals.append(str(error))
            wanted = smaller
    if refusals:
        _tell(wanted, settings, refusals)
    return Loaded(native, settings, wanted)


def _tell(wanted: Placement | None, settings: LoadSettings, refusals: Sequence[str] = ()) -> None:
    """Log what is to be expected of a plan: before it is loaded, and again if it was not loaded as planned."""
    level = logging.WARNING if refusals else logging.INFO
    if not isinstance(wanted, Plan) or not forecast_logger.isEnabledFor(level):
        return
    forecast = _forecast(wanted, settings)
    retreat = f" (after {len(refusals)} tries, the last: {refusals[-1]})" if refusals else ""
    fits = {"fits": forecast.verdict == "fits on the GPU"}
    forecast_logger.log(level, "offload: %s%s", before_loading(forecast), retreat, extra=fits)


def _placement(
    info: ModelInfo, offload: Offload, settings: LoadSettings, memory: Mapping[str, int | str]
) -> Placement | None:
    """Return the placement that ``offload`` stands for here; None for the CPU alone."""
    if offload == "auto" and not 0 < info.n_layers <= len(info.tensors):
        return None  # a damaged header, or a vocabulary alone: llama.cpp's error says how
    gpus = [] if offload == "cpu" else [device for device in devices() if device.is_gpu]

    def hardware() -> Hardware:
        found = Hardware.here(
            info,
            memory=memory,
            n_threads=settings.n_threads,
            kv_type=settings.type_k,
            no_host=settings.repack == "on",
            kernels=settings.kernels,
        )
        return found.without({CPU: settings.prompt_cache}) if settings.prompt_cache else found

    placement = placement_for(
        info,
        offload,
        gpus,
        hardware,
        n_ctx=settings.n_ctx or None,
        n_parallel=settings.n_parallel or None,
        n_ubatch=None if "n_ubatch" in settings.chosen else settings.n_ubatch,
        type_k=settings.type_k,
        type_v=settings.type_v,
        load_mode=settings.load_mode,
        prompt_tokens=settings.prompt_tokens,
        reply_tokens=settings.reply_tokens,
        pin_weights=None if "pin_weights" in settings.chosen else settings.pin_weights,
        offload_min_batch=settings.offload_min_batch or None,
        experts="static" if settings.experts == "auto" and not _can_cache(info, settings) else settings.experts,
    )
    if isinstance(offload, int) and offload > 0 and not gpus:
        logger.warning("offload=%d has no effect: there is no GPU here, the model runs on the CPU", offload)
    return placement


def _can_cache(info: ModelInfo, settings: LoadSettings) -> bool:
    """Return whether the CPU computes the experts with our own products, beside which a GPU can compute some."""
    types = {kind for name, kind, *_ in info.tensors if re.search(r"ffn_(gate|up|gate_up|down)_exps\.weight$", name)}
    return settings.kernels == "auto" and cpu_kernels() != "llama.cpp" and types <= {*cpu_kernel_types()}


def _with_cache(
    info: ModelInfo, settings: LoadSettings, wanted: Placement | None, memory: Mapping[str, int | str]
) -> Placement | None:
    """Return the placement with the cache of experts that the settings ask for."""
    if settings.experts != "cached":
        is_usable = settings.experts == "auto" and _can_cache(info, settings)
        if wanted is None or not wanted.expert_cache or is_usable:
            return wanted
        if isinstance(wanted, Plan):
            return wanted.static()
        logger.warning("the placement has all experts in RAM and a cache of them, which is not used here")
        wanted = wanted.copy()
        wanted.expert_cache = {}
        return wanted
    if wanted is None:
        raise Error('experts="cached" needs a GPU, and none is used here')
    if not info.expert_layers:
        raise Error(f"{info.name or info.architecture} has no experts to cache: only a mixture of experts has")
    if not _can_cache(info, settings):
        raise Error(
            "experts=\"cached\" needs overspill's own kernels for the experts' type of weights, which "
            + ('kernels="llama.cpp" switches off' if settings.kernels != "auto" else "this CPU has not")
        )
    pools: Mapping[str, int] = settings.expert_cache
    servers = {device.name.lower() for device in devices() if device.backend == "RPC"}
    if remote := [name for name in pools if name.lower() in servers]:
        raise ValueError(f"expert_cache must be on GPUs of this machine, and {remote[0]} is an RPC server's")
    if not pools and not (isinstance(wanted, Plan) and wanted.expert_cache):
        hardware = Hardware.here(info, memory=memory, n_threads=settings.n_threads, measure=False)
        n_ctx = settings.n_ctx or info.default_n_ctx
        caches = settings.type_k, settings.type_v
        used = PlanSettings(n_ctx, n_ctx // 2, settings.n_ubatch, *caches, n_parallel=settings.n_parallel or 1)
        room = Estimate.of(info, wanted, hardware, used).room_for_experts()
        if not room:
            raise Error(f"there is no GPU with room for a cache of the experts of {info.name or info.architecture}")
        pools = {hardware.devices[gpu].name: n_bytes for gpu, n_bytes in room.items()}
    if pools:
        wanted = wanted.copy()
        wanted.expert_cache = pools
    return wanted


def _uses_gpus(placement: Placement) -> bool:
    return placement.devices_used != (CPU,) or bool(placement.expert_cache)


def _completed(info: ModelInfo, settings: LoadSettings, wanted: Placement | None) -> LoadSettings:
    """Return the settings with what the plan says of those that the caller has left to it."""
    if wanted is None or not _uses_gpus(wanted):
        return settings
    planned: dict[str, Any] = {"pin_weights": settings.is_mapped and _can_pin(info, settings, wanted)}
    if isinstance(wanted, Plan):
        used = wanted.settings
        planned |= {"n_batch": used.n_ubatch, "n_ubatch": used.n_ubatch}
        if "pin_weights" not in wanted.chosen:
            planned["pin_weights"] = used.pin_weights
        if "n_ubatch" in settings.chosen or settings.n_ubatch == used.n_ubatch:
            # Found for these batches; of larger ones it may say too little.
            planned["offload_min_batch"] = used.offload_min_batch
    return replace(settings, **{name: value for name, value in planned.items() if name in settings.chosen})


def _forecast(wanted: Plan, settings: LoadSettings) -> Forecast:
    """Return what is expected of a plan that is loaded with these settings."""
    loaded = replace(
        wanted.settings,
        n_ubatch=settings.n_ubatch,
        load_mode=settings.load_mode,
        pin_weights=settings.pin_weights,
        offload_min_batch=settings.offload_min_batch or OFFLOAD_TOKENS,
    )
    if loaded == wanted.settings:
        return wanted.forecast()
    return Estimate.of(wanted.info, wanted, wanted.hardware, loaded).forecast


def _can_pin(info: ModelInfo, settings: LoadSettings, wanted: Placement) -> bool:
    """Return whether a GPU of the placement can register the mapped weights that stay in RAM, and RAM has room."""
    used = {*wanted.devices_used, *wanted.expert_cache}
    if not any(device.registers_host_memory for device in devices() if device.name in used):
        return False
    available = available_ram_bytes()
    needed = _weights_in_ram_bytes(info, wanted)
    needed += settings.prompt_cache
    needed += _kv_in_ram_bytes(info, settings, wanted, settings.n_ctx or info.default_n_ctx) * max(
        1, settings.n_parallel
    )
    return available is not None and pinning_room_bytes(available, needed) >= 0


def _options(settings: LoadSettings, wanted: Placement | None, profile: ExpertProfile | None = None) -> ModelOptions:
    """Return settings and placement as the core takes them."""
    options = ModelOptions()
    options.n_ctx = settings.n_ctx
    options.n_parallel = settings.n_parallel
    options.prompt_cache_bytes = settings.prompt_cache
    options.max_pause_s = settings.max_pause_s
    options.n_batch = settings.n_batch
    options.n_ubatch = settings.n_ubatch
    options.n_threads = settings.n_threads
    options.adapt_threads = settings.adapt_threads
    options.type_k = NativeCacheType[settings.type_k]
    options.type_v = NativeCacheType[settings.type_v]
    options.flash_attention = NativeSwitch[settings.flash_attention]
    options.repack = NativeSwitch[settings.repack]
    options.kernels = NativeKernels[settings.kernels.replace(".", "_")]
    options.load_mode = NativeLoadMode[settings.load_mode.replace("+", "_").replace("-", "_")]
    options.vocab_only = settings.vocab_only
    options.check_tensors = settings.check_tensors
    options.metadata = list(settings.metadata.items())
    options.pin_weights = settings.pin_weights and settings.is_mapped
    options.offload_min_batch = settings.offload_min_batch
    if wanted is not None:
        arguments = wanted.llama_arguments()
        placement = NativePlacement()
        placement.devices = arguments.devices
        placement.tensor_split = arguments.tensor_split
        placement.n_gpu_layers = arguments.n_gpu_layers
        placement.overrides = arguments.overrides
        options.placement = placement
        cache = ExpertCacheOptions()
        cache.pools = list(wanted.expert_cache.items())
        cache.most_insertions = settings.expert_insertions
        if profile is not None:
            cache.profile = profile.experts
            cache.is_trusted = settings.experts == "cached" or profile.is_faster is True
            if isinstance(wanted, Plan):
                cache.worth = wanted.worth_of_cache
        options.experts = cache
    return options


def _dry_run(path: Path, settings: LoadSettings, wanted: Placement | None) -> dict[str, MemoryUse]:
    """Return what llama.cpp would take on each device, without loading."""
    options = _options(settings, wanted)
    options.dry_run = True
    pools = {} if wanted is None else wanted.expert_cache
    return memory_by_device(Model(os.fsencode(path), options, None).memory(), pools)


def memory_by_device(
    report: MemoryReport, pools: Mapping[str, int], pinned: PinnedMemory | None = None
) -> dict[str, MemoryUse]:
    """Return what a model takes of each device, and how much of the mapped weights in RAM is registered.

    ``pools`` has the bytes of a cache of experts, which count as weights.
    """
    uses = {
        device: MemoryUse(use.weights_bytes + pools.get(device, 0), use.kv_bytes, use.compute_bytes)
        for device, use in report.devices.items()
    }
    uses |= {device: MemoryUse(n_bytes, 0, 0) for device, n_bytes in pools.items() if device not in uses}
    if pinned is not None and (pinned.wanted_bytes or pinned.reason):
        size = f"{format_bytes(pinned.registered_bytes)} of {format_bytes(pinned.wanted_bytes)} are registered"
        state = f"given up: {pinned.reason}" if pinned.reason else "done" if pinned.finished else "going on"
        pinning = f"{size} with the GPU's driver; {state}"
        uses[CPU] = replace(uses[CPU], pinned_bytes=pinned.registered_bytes, pinning=pinning)
    return uses


def wait_for_pinning(native: Model) -> None:
    """Wait until the weights in RAM are registered, or given up: what is measured meanwhile is neither way."""
    while not native.pinned().finished:
        time.sleep(0.02)


def _fitted(path: Path, info: ModelInfo, settings: LoadSettings, wanted: Plan) -> Plan:
    """Return the plan, or one with less on a GPU if llama.cpp would ask more memory of it than it has."""
    if not _uses_gpus(wanted):
        return wanted
    for _ in range(2):
        needed = _dry_run(path, _completed(info, settings, wanted), wanted)
        over = {
            gpu.name: needed[gpu.name].total_bytes - gpu.memory_bytes
            for gpu in wanted.hardware.gpus
            if gpu.name in needed and needed[gpu.name].total_bytes > gpu.memory_bytes
        }
        for name, n_bytes in over.items():
            share = n_bytes / max(1, wanted.forecast().memory[name].total_bytes)
            wanted = _with_less(wanted, name, share) or wanted
        if not over:
            break
    return wanted


def _with_less(planned: Plan, device: str, share: float) -> Plan | None:
    """Return a plan with less on a GPU, by ``share`` of its bytes there; None if it has nothing there."""
    use = planned.forecast().memory.get(device)
    if use is None or device == CPU or not (device in planned.devices_used or device in planned.expert_cache):
        return None
    room = max(0, int(use.total_bytes * (1 - share)) + use.margin_bytes if share < 1 else 0)
    devices = tuple(
        replace(one, memory_bytes=min(one.memory_bytes, room)) if one.name == device else one
        for one in planned.hardware.devices
    )
    return planned.for_hardware(replace(planned.hardware, devices=devices))


# --- RAM


def _mind_ram(path: Path, info: ModelInfo, settings: LoadSettings, wanted: Placement | None) -> LoadSettings:
    """Return the settings, without repacking if RAM has no room for copies of the weights.

    A model that RAM has no room for is an OutOfMemoryError here: Linux would grant the memory, and end the process
    when it is written to.
    """
    use = _use_of_ram(info, settings, wanted)
    if use is None:
        return settings
    n_ctx = settings.n_ctx or info.default_n_ctx
    available, weights_bytes, kv_bytes = use
    if kv_bytes + weights_bytes <= available:
        return settings
    if settings.repack == "auto" and settings.is_mapped:
        settings = replace(settings, repack="off")  # the pages of a mapped file that are used stay in RAM
    needed = kv_bytes + (0 if settings.is_mapped else weights_bytes)
    if available < needed < 4 * available:
        # For an unknown architecture, the bytes from the header are an upper bound; llama.cpp knows them.
        taken = _dry_run(path, settings, wanted)[CPU]
        needed = (
            settings.prompt_cache
            + taken.kv_bytes
            + taken.compute_bytes
            + (0 if settings.is_mapped else taken.weights_bytes)
        )
    if needed > available:
        times = f"{settings.n_parallel} times " if settings.n_parallel > 1 else ""
        what, less = ("", "") if settings.is_mapped else ("the weights and ", 'load_mode="mmap", ')
        beside, smaller = (" and the prompt cache", "a smaller prompt_cache, ") if settings.prompt_cache else ("", "")
        raise _too_little_ram(
            available,
            needed,
            f"{what}the KV cache of {times}{n_ctx} tokens{beside}",
            f'{less}{smaller}a smaller n_ctx, or type_k and type_v such as "q8_0"',
        )
    if settings.is_mapped and weights_bytes > 0:
        _warn_of_reading(info, wanted, weights_bytes, available - needed)
    return settings


def _warn_of_reading(info: ModelInfo, wanted: Placement | None, weights_bytes: int, room_bytes: int) -> None:
    """Log that weights are read from the disk for every token: how much, and what would help."""
    missing_bytes = weights_bytes - room_bytes
    if missing_bytes <= 0:
        return
    used_bytes = sum(map(info.read_bytes, _tensors_in_ram(info, wanted)))
    logger.warning(
        "RAM has room for %s of the %s of weights that stay there: every token may read %s from the disk. A smaller "
        "quantization or model, more of it on a GPU, or less running beside it would help",
        format_bytes(room_bytes),
        format_bytes(weights_bytes),
        format_bytes(round(missing_bytes / weights_bytes * used_bytes)),
    )


def _share_of_reading(info: ModelInfo, settings: LoadSettings, wanted: Placement | None) -> float:
    """Return the share of the weights that is mapped, stays in RAM, and has room there beside the KV cache."""
    use = _use_of_ram(info, settings, wanted) if settings.is_mapped else None
    if use is None:
        return 0.0
    available, weights_bytes, kv_bytes = use
    total_bytes = sum(n for *_, n in info.tensors)
    return weights_bytes / total_bytes if total_bytes and weights_bytes + kv_bytes <= available else 0.0


def check_ram_for_caches(
    info: ModelInfo, settings: LoadSettings, placement: Placement | None, n_prompts: int, n_ctx: int
) -> None:
    """Raise an OutOfMemoryError if RAM has no room for KV caches of ``n_prompts`` times ``n_ctx`` tokens."""
    needed = n_prompts * _kv_in_ram_bytes(info, settings, placement, n_ctx)
    available = available_ram_bytes()
    if available is not None and needed > available:
        what = f"KV caches for {n_prompts} prompts of {n_ctx} tokens"
        raise _too_little_ram(available, needed, what, "fewer in parallel, or max_tokens")


def _use_of_ram(info: ModelInfo, settings: LoadSettings, wanted: Placement | None) -> tuple[int, int, int] | None:
    """Return the bytes that are free, and those of weights and caches there; None if free ones are not known.

    None stands for a damaged header, too: llama.cpp's error says how.
    """
    available = available_ram_bytes()
    if available is None or info.n_layers > len(info.tensors):
        return None
    n_ctx = settings.n_ctx or info.default_n_ctx
    kv_bytes = max(1, settings.n_parallel) * _kv_in_ram_bytes(info, settings, wanted, n_ctx) + settings.prompt_cache
    return available, _weights_in_ram_bytes(info, wanted), kv_bytes


def _tensors_in_ram(info: ModelInfo, placement: Placement | None) -> list[Tensor]:
    devices_by_tensor = {} if placement is None else placement.tensors()
    return [tensor for tensor in info.tensors if devices_by_tensor.get(tensor[0], CPU) == CPU]


def _weights_in_ram_bytes(info: ModelInfo, placement: Placement | None) -> int:
    return sum(n for *_, n in _tensors_in_ram(info, placement))


def _kv_in_ram_bytes(info: ModelInfo, settings: LoadSettings, placement: Placement | None, n_ctx: int) -> int:
    return sum(
        cache.n_bytes(n_ctx, settings.n_ubatch, settings.type_k, settings.type_v)
        for layer, cache in enumerate(layer_caches(info))
        if placement is None or placement.kv[layer] == CPU
    )


def _too_little_ram(available: int, needed: int, what: str, instead: str) -> OutOfMemoryError:
    error = OutOfMemoryError(
        f"{format_bytes(available)} of RAM are free, and {what} would take {format_bytes(needed)}: give {instead}"
    )
    error.device, error.needed_bytes = CPU, needed
    return error
