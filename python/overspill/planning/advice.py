"""Why a placement is as fast as it is, and what would make more of it fit, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from overspill.base.units import format_bytes, format_count, format_rate
from overspill.placement.device_names import memory_name
from overspill.planning.residency import ExpertForecast
from overspill.planning.settings import is_mapped
from overspill.planning.verdict import MemoryForecast, Verdict
from overspill.planning.workload import Arrangement, Use, Workload, matrix_layers

__all__ = ["experts_on_gpus", "reason_for", "remedies_for", "weights_in_ram"]


_SMALLEST_CONTEXT = 1024  # that is worth recommending


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_READING = {
    "attention": "the weights of attention",
    "dense": "the feed-forward matrices",
    "experts": "experts",
    "kv": "the KV cache",
    "output": "the output head",
    "page faults": "the disk",
}


def reason_for(
    work: Workload,
    arranged: Arrangement,
    terms: Mapping[str, Mapping[str, float]],
    memory: Mapping[str, MemoryForecast],
    verdict: Verdict,
) -> str:
    """Return in a sentence or two why an arrangement is as fast as it is, or what has no room.

    ``terms`` has the seconds of a token by device and part.
    """
    token_s = sum(sum(of_device.values()) for of_device in terms.values())
    info, cpu = work.info, work.devices[work.cpu].name
    needed = sum(place.total_bytes for place in memory.values())
    subject = f"{info.name or info.architecture} needs {format_bytes(needed)}"
    gpus = [device.name for device in work.devices[: work.cpu]]
    if verdict == "does not fit":
        short = [name for name, place in memory.items() if place.missing_bytes]
        text = "; ".join(
            f"{memory_name(name)} has {format_bytes(memory[name].free_bytes)} and would need "
            f"{format_bytes(memory[name].total_bytes + memory[name].margin_bytes)}"
            for name in short
        )
        if short == [cpu]:
            text += (
                ". What has no place there is read from the disk again for every token"
                if work.settings.load_mode == "mmap"
                else ". Loading would fail, or the machine would swap"
            )
        return f"{text}."
    if verdict == "fits on the GPU":
        used = [name for name in gpus if memory[name].weights_bytes]
        spare = sum(memory[name].free_bytes - memory[name].total_bytes for name in used)
        return f"{subject} with its KV cache, and {_names(used)} can hold it all, with {format_bytes(spare)} to spare."
    if verdict == "CPU only":
        if not gpus:
            return f"{subject}, and there is no GPU: RAM has {format_bytes(memory[cpu].free_bytes)}."
        return f"{subject}, and what {_names(gpus)} could hold of it would not make it much faster."
    n_all, n_whole, n_some = matrix_layers(work, arranged)
    what = "experts" if info.n_experts else "feed-forward matrices"
    n_attention = sum(device != work.cpu for device in arranged.kv)
    room = sum(max(0, memory[name].free_bytes - memory[name].margin_bytes) for name in gpus)
    parts = []
    if n_attention:
        all_layers = (
            "all layers" if n_attention == work.n_layers else f"the last {n_attention} of {work.n_layers} layers"
        )
        parts.append(f"attention and KV cache of {all_layers}")
    if n_whole or n_some:
        some = f" and a part of {'one' if n_some == 1 else n_some} more" if n_some else ""
        parts.append(f"the {what} of {n_whole} of {n_all} layers{some}")
    if arranged.output != work.cpu:
        parts.append("the output head")
    slowest, seconds = max(
        terms.get(cpu, {}).items(),
        key=lambda term: term[1],
        default=("", 0.0),
    )
    text = f"{subject}, and {_names(gpus)} can take {format_bytes(room)} of it: {_names(parts)}."
    if seconds > token_s / 4:
        reading = _READING.get(slowest, f"its {slowest}")
        share = f", {info.n_experts_used} of {info.n_experts}," if slowest == "experts" else ""
        verb = "Waiting for" if slowest == "page faults" else "Reading"
        where = "" if slowest == "page faults" else " in RAM"
        text += f" {verb} {reading}{share}{where} takes {seconds * 1e3:.0f} of a token's {token_s * 1e3:.0f} ms."
    return text


def experts_on_gpus(found: ExpertForecast | None) -> str:
    """Return what is expected of a cache of experts in a sentence; empty without one."""
    if found is None:
        return ""
    return (
        f"A cache of experts, {format_bytes(found.cache_bytes)}, has room for {found.resident_share:.0%} of them, and "
        f"is expected to have {found.hit_share:.0%} of those that a token uses ({found.assumption})."
    )


def weights_in_ram(work: Workload, arranged: Arrangement, use: Use) -> str:
    """Return in a sentence how weights in RAM are held for the GPU that copies them; empty if none does."""
    taker = work.takes_over(arranged)
    here = work.copied_bytes(arranged, use)
    if taker is None or here <= 0:
        return ""
    gpu, settings = work.devices[taker], work.settings
    fast, slow = (format_rate(gpu.copy_bytes_per_s(pinned=pinned)) for pinned in (True, False))
    what = f"{format_bytes(here)} of weights in RAM"
    if not is_mapped(settings):
        return f"{what} are a copy that {gpu.name} reads at {fast}."
    if settings.pin_weights and gpu.registers_host_memory:
        return (
            f"{what} stay mapped and are registered with the driver of {gpu.name}, which copies them at {fast}, "
            f"not {slow}."
        )
    if gpu.copy_bytes_per_s(pinned=True) == gpu.copy_bytes_per_s(pinned=False):
        return f"{what} stay mapped, and {gpu.name} copies them at {slow}."
    if gpu.registers_host_memory:
        why = "RAM has no room to pin them" if work.pinning_room_bytes(use) < 0 else "pinning them is off"
    else:
        why = 'its driver cannot pin a mapped file; load_mode="read" would make a copy that is pinned'
    return f"{what} stay mapped, and {gpu.name} copies them at {slow}, not {fast}: {why}."


def remedies_for(
    work: Workload, arranged: Arrangement, memory: Mapping[str, MemoryForecast], verdict: Verdict
) -> list[str]:
    """Return what would make an arrangement fit, or more of it fit on the GPUs; a phrase for each remedy."""
    if verdict == "fits on the GPU":
        return []
    cpu, found = work.devices[work.cpu].name, list[str]()
    gpus = [device.name for device in work.devices[: work.cpu]]
    short = {name: place.missing_bytes for name, place in memory.items() if place.missing_bytes}
    short_gpus = {name: missing for name, missing in short.items() if name != cpu}
    if short_gpus:
        found += _room_on_gpus(work, arranged, short_gpus)
    elif gpus and not short:
        found += _all_on_gpus(work, memory, gpus)
    if cpu in short:
        found.append(f"{format_bytes(short[cpu])} more RAM, or a file with fewer bits per weight")
        if gpus and not short_gpus:
            found.append("a GPU with more memory, which would take experts off the RAM" if work.info.n_experts else
                         "a GPU with more memory")  # fmt: skip
    return found


def _with_cache(work: Workload, n_ctx: int, type_k: str, type_v: str) -> int:
    """Return what a context saves on all devices together, against the settings'; masks are part of it."""
    settings = work.settings
    smaller = settings.n_parallel * sum(
        cache.n_bytes(n_ctx, settings.n_ubatch, type_k, type_v) for cache in work.caches
    )
    return sum(work.kv_bytes) - smaller + 2 * settings.n_ubatch * (settings.n_ctx - n_ctx)


def _smaller_caches(work: Workload, missing: int, share: float = 1.0) -> list[str]:
    """Return what about the KV cache would make up for ``missing`` bytes on GPUs that hold ``share`` of it."""
    settings, found = work.settings, []
    contexts = range(settings.n_ctx // 1024 * 1024, _SMALLEST_CONTEXT - 1, -1024)
    for n_ctx in contexts:
        if n_ctx < settings.n_ctx and share * _with_cache(work, n_ctx, settings.type_k, settings.type_v) >= missing:
            found.append(f"n_ctx of {n_ctx} instead of {settings.n_ctx}")
            break
    saved = _with_cache(work, settings.n_ctx, "q8_0", "q8_0")
    if saved > 0 and share * saved >= missing:
        found.append(f"KV types q8_0, which save {format_bytes(int(share * saved))}")
    return found


def _all_on_gpus(work: Workload, memory: Mapping[str, MemoryForecast], gpus: Sequence[str]) -> list[str]:
    needed = sum(place.weights_bytes + place.kv_bytes for place in memory.values()) - work.fixed_bytes["embedding"]
    needed += max(memory[name].compute_bytes for name in gpus)
    missing = needed - sum(max(0, memory[name].free_bytes - memory[name].margin_bytes) for name in gpus)
    if missing <= 0:
        return []
    found = [f"{one} would leave room for all of it on the GPU" for one in _smaller_caches(work, missing)]
    return [*found, f"{format_bytes(missing)} more GPU memory would hold all of it"]


def _room_on_gpus(work: Workload, arranged: Arrangement, short: Mapping[str, int]) -> list[str]:
    found = []
    for name, missing in short.items():
        gpu = next(number for number, device in enumerate(work.devices) if device.name == name)
        caches = sum(n for n, device in zip(work.kv_bytes, arranged.kv, strict=True) if device == gpu)
        share = caches / max(1, sum(work.kv_bytes))
        found += [f"{one} would make it fit on {name}" for one in _smaller_caches(work, missing, share)]
        n_layers = freed = 0
        for layer, devices in enumerate(arranged.groups):
            kind = work.kinds[layer]
            here = [group for group, device in enumerate(devices) if device == gpu and kind.is_matrix_group(group)]
            if here and freed < missing:
                freed += sum(kind.group_bytes[group] for group in here)
                n_layers += 1
        if freed >= missing:
            what = "experts" if work.info.n_experts else "feed-forward matrices"
            found.append(f"the {what} of {format_count(n_layers, 'layer')} on the CPU instead of {name}")
        found.append(f"{format_bytes(missing)} more memory on {name}")
    return found
