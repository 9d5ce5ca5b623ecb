"""Decide what lies where, and say how fast that will be and why.

A token's time is the sum, over all tensors, of the bytes that it reads of each divided by the rate of the device, of
the KV cache likewise, of a fixed cost of each operation, and of one for each change of the device; docs/offload.md has
the arithmetic. :func:`plan` looks for the placement that makes it least and still fits.
"""

from __future__ import annotations

import html
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from rich.console import Group
from rich.text import Text

from overspill.base.checks import as_integer
from overspill.base.units import format_bytes, format_count
from overspill.base.values import LoadMode, MemoryUse
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import CACHE_TYPES
from overspill.header.tensor_names import layer_of, part_of
from overspill.machine.hardware import Hardware
from overspill.placement.placement import Placement
from overspill.placement.rules import mapping_rules
from overspill.planning.graph.build import OFFLOAD_TOKENS
from overspill.planning.search import Pins, Search
from overspill.planning.workload import Arrangement, Settings, Use, Workload

__all__ = [
    "Forecast",
    "MemoryForecast",
    "Plan",
    "Settings",
    "UbatchTrade",
    "Verdict",
    "forecast",
    "plan",
    "ubatch_trade",
]

Verdict: TypeAlias = Literal["fits on the GPU", "partial GPU offload possible", "CPU only", "does not fit"]

_SMALLEST_CONTEXT = 1024  # that is worth recommending
_UBATCHES = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class MemoryForecast(MemoryUse):
    """What a placement needs on a device, in bytes, and what is there."""

    free_bytes: int
    """That the device has for it, before anything."""
    margin_bytes: int = 0
    """Of these, what is to be left."""

    @property
    def missing_bytes(self) -> int:
        """What there is too little, 0 if it fits."""
        return max(0, self.total_bytes + self.margin_bytes - self.free_bytes) if self.total_bytes else 0


@dataclass(frozen=True)
class Forecast:
    """What a placement is expected to do."""

    tokens_per_s: float
    """Decoding, with ``settings.depth`` tokens in the context."""
    seconds_by_term: dict[str, dict[str, float]]
    """Seconds of one token by device and by what they are spent on: ``attention``, ``dense``, ``experts``, ``kv``,
    ``output``, ``operations`` (a fixed cost of each), ``hops`` (of the changes to this device), ``page faults``."""
    n_splits: int
    """Pieces of the graph, as llama.cpp's log counts them."""
    memory: dict[str, MemoryForecast]
    """By device."""
    verdict: Verdict
    reason: str
    """In a sentence or two."""
    remedies: list[str]
    """What would make more of it fit."""
    settings: Settings

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "tokens_per_s": self.tokens_per_s,
            "seconds_by_term": self.seconds_by_term,
            "n_splits": self.n_splits,
            "memory": {
                name: {
                    "weights_bytes": use.weights_bytes,
                    "kv_bytes": use.kv_bytes,
                    "compute_bytes": use.compute_bytes,
                    "free_bytes": use.free_bytes,
                    "margin_bytes": use.margin_bytes,
                }
                for name, use in self.memory.items()
            },
            "verdict": self.verdict,
            "reason": self.reason,
            "remedies": self.remedies,
            "settings": {name: getattr(self.settings, name) for name in Settings.__slots__},
        }


@dataclass(frozen=True, slots=True)
class UbatchTrade:
    """What a batch size costs: larger ones read a prompt faster and leave less room for experts."""

    n_ubatch: int
    compute_bytes: int
    """On all GPUs."""
    expert_layers: int
    """Layers whose experts (of a dense model: feed-forward matrices) are all on GPUs."""
    tokens_per_s: float
    prefill_ceiling_tokens_per_s: float
    """Where experts in RAM are copied to a GPU for each batch, the link allows no more; infinite if none are."""


# --- forecasts


def _settings(info: ModelInfo, **given: Any) -> Settings:
    """Check settings and fill in what is missing."""
    n_ctx = given.get("n_ctx")
    if n_ctx is None:
        n_ctx = info.default_n_ctx
    n_ctx = as_integer("n_ctx", n_ctx, 1, 2**31 - 1)
    depth = given.get("depth")
    depth = n_ctx // 2 if depth is None else as_integer("depth", depth, 0, n_ctx)
    n_ubatch = as_integer("n_ubatch", given.get("n_ubatch") or 512, 1, 65536)
    for name in ("type_k", "type_v"):
        if given[name] not in CACHE_TYPES:
            raise ValueError(f"{name} must be one of {', '.join(CACHE_TYPES)}, not {given[name]!r}")
    margin_bytes = as_integer("margin_bytes", given["margin_bytes"], 0, 2**62)
    if given["load_mode"] not in get_args(LoadMode):
        raise ValueError(f"load_mode must be one of {', '.join(get_args(LoadMode))}, not {given['load_mode']!r}")
    return Settings(n_ctx, depth, n_ubatch, given["type_k"], given["type_v"], margin_bytes, given["load_mode"])


def _fits(use: MemoryForecast) -> bool:
    return use.missing_bytes == 0


def _memory(work: Workload, use: Use, compute: Sequence[int]) -> dict[str, MemoryForecast]:
    margins = [work.settings.margin_bytes] * work.cpu + [0]
    return {
        device.name: MemoryForecast(
            use.weights_bytes[number], use.kv_bytes[number], compute[number], device.memory_bytes, margins[number]
        )
        for number, device in enumerate(work.devices)
    }


def _number_of(hardware: Hardware, device: str) -> int:
    return hardware.devices.index(hardware.device(device))


def _arrange(
    info: ModelInfo, placement: Placement, hardware: Hardware, settings: Settings
) -> tuple[Workload, Arrangement]:
    """Return a workload whose groups are as the placement has them, and the placement in its numbers."""
    pinned = {name: _number_of(hardware, device) for name, device in placement.tensors().items()}
    work = Workload(info, hardware, settings, pinned)
    groups = [tuple(device or 0 for _, device in kind.groups) for kind in work.kinds]
    kv = [_number_of(hardware, device) for device in placement.kv]
    embedding = pinned.get("token_embd.weight", work.cpu)
    return work, Arrangement(kv, groups, _number_of(hardware, placement.output_matrix), embedding)


def forecast(
    info: ModelInfo,
    placement: Placement,
    hardware: Hardware,
    *,
    n_ctx: int | None = None,
    depth: int | None = None,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    margin_bytes: int = 1 << 30,
    load_mode: LoadMode = "mmap",
) -> Forecast:
    """Say how fast any placement decodes on any hardware, and whether it fits.

    Parameters
    ----------
    info, placement, hardware
        The model, the placement, and what it is to run on; the placement's devices must be among the hardware's.
    n_ctx
        Tokens of context. Default: what the model was trained for, at most 8192.
    depth
        Tokens of context in use, 0 to ``n_ctx``. Default: half of it.
    n_ubatch
        Tokens of a prompt that are computed at once, 1 to 65536.
    type_k, type_v
        Types of the KV cache.
    margin_bytes
        What is to be left free on each GPU.
    load_mode
        As of :class:`overspill.Model`.

    Raises
    ------
    ValueError
        A device of the placement is not there, the placement is for another model, or a number is out of range.
    """
    placement.check(info)
    settings = _settings(
        info,
        n_ctx=n_ctx,
        depth=depth,
        n_ubatch=n_ubatch,
        type_k=type_k,
        type_v=type_v,
        margin_bytes=margin_bytes,
        load_mode=load_mode,
    )
    return _forecast(*_arrange(info, placement, hardware, settings))


def _forecast(work: Workload, arranged: Arrangement) -> Forecast:
    use = work.evaluate(arranged)
    memory = _memory(work, use, work.compute_bytes(arranged))
    verdict = _verdict(work, arranged, memory)
    return Forecast(
        1 / use.seconds if use.seconds else float("inf"),
        work.terms(arranged),
        use.n_splits,
        memory,
        verdict,
        _reason(work, arranged, use, memory, verdict),
        _remedies(work, arranged, memory, verdict),
        work.settings,
    )


def _verdict(work: Workload, arranged: Arrangement, memory: Mapping[str, MemoryForecast]) -> Verdict:
    if not all(map(_fits, memory.values())):
        return "does not fit"
    places = {*arranged.kv, arranged.output, *(device for layer in arranged.groups for device in layer)}
    if work.cpu not in places:
        return "fits on the GPU"
    return "CPU only" if places == {work.cpu} else "partial GPU offload possible"


# --- in words


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _matrix_layers(work: Workload, arranged: Arrangement) -> tuple[int, int, int]:
    """Return how many layers have experts (or feed-forward matrices), all of them on GPUs, and some of them."""
    n_all = n_whole = n_some = 0
    for kind, devices in zip(work.kinds, arranged.groups, strict=True):
        places = [device for group, device in enumerate(devices) if kind.is_matrix_group(group)]
        if places:
            n_all += 1
            on_gpus = sum(device != work.cpu for device in places)
            n_whole += on_gpus == len(places)
            n_some += 0 < on_gpus < len(places)
    return n_all, n_whole, n_some


_READING = {
    "attention": "the weights of attention",
    "dense": "the feed-forward matrices",
    "experts": "experts",
    "kv": "the KV cache",
    "output": "the output head",
    "page faults": "the disk",
}


def _reason(
    work: Workload, arranged: Arrangement, use: Use, memory: Mapping[str, MemoryForecast], verdict: Verdict
) -> str:
    info, cpu = work.info, work.devices[work.cpu].name
    needed = sum(place.total_bytes for place in memory.values())
    subject = f"{info.name or info.architecture} needs {format_bytes(needed)}"
    gpus = [device.name for device in work.devices[: work.cpu]]
    if verdict == "does not fit":
        short = [name for name, place in memory.items() if place.missing_bytes]
        text = "; ".join(
            f"{'RAM' if name == cpu else name} has {format_bytes(memory[name].free_bytes)} and would need "
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
    n_all, n_whole, n_some = _matrix_layers(work, arranged)
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
        ((part, seconds) for part, seconds in work.terms(arranged).get(cpu, {}).items()),
        key=lambda term: term[1],
        default=("", 0.0),
    )
    text = f"{subject}, and {_names(gpus)} can take {format_bytes(room)} of it: {_names(parts)}."
    if seconds > use.seconds / 4:
        reading = _READING.get(slowest, f"its {slowest}")
        share = f", {info.n_experts_used} of {info.n_experts}," if slowest == "experts" else ""
        verb = "Waiting for" if slowest == "page faults" else "Reading"
        where = "" if slowest == "page faults" else " in RAM"
        text += f" {verb} {reading}{share}{where} takes {seconds * 1e3:.0f} of a token's {use.seconds * 1e3:.0f} ms."
    return text


def _remedies(
    work: Workload, arranged: Arrangement, memory: Mapping[str, MemoryForecast], verdict: Verdict
) -> list[str]:
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
    smaller = sum(cache.n_bytes(n_ctx, settings.n_ubatch, type_k, type_v) for cache in work.caches)
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


# --- plans


class Plan(Placement):
    """A placement that was planned: it knows for what hardware and settings, and what to expect of it.

    It may be edited like any other; :meth:`forecast` speaks of it as it is then.
    """

    def __init__(self, info: ModelInfo, hardware: Hardware, settings: Settings) -> None:
        """Put everything on the CPU; :func:`plan` makes better ones."""
        super().__init__(info, [device.name for device in hardware.gpus])
        self.info, self.hardware, self.settings = info, hardware, settings
        self.whole_layers_tokens_per_s: float | None = None
        """What the best split by whole layers would do, if one was looked for."""

    def forecast(self) -> Forecast:
        """Say how fast it is and what it needs; see :class:`Forecast`."""
        return _forecast(*_arrange(self.info, self, self.hardware, self.settings))

    def _lines(self) -> list[str]:
        outlook = self.forecast()
        uses = " · ".join(
            f"{name} {format_bytes(use.total_bytes)} of {format_bytes(use.free_bytes)}"
            for name, use in outlook.memory.items()
        )
        depth = f"{self.settings.depth} of {self.settings.n_ctx} tokens into the context"
        lines = [f"{outlook.verdict}: {outlook.tokens_per_s:.1f} tokens/s, {depth}", uses, outlook.reason]
        return [*lines, *(f"- {remedy}" for remedy in outlook.remedies)]

    def __rich__(self) -> Group:
        """Return the table, and what to expect."""
        return Group(super().__rich__(), "", *(Text(line) for line in self._lines()))

    def _repr_html_(self) -> str:
        lines = "<br>".join(html.escape(line) for line in self._lines())
        return f"{super()._repr_html_()}<p>{lines}</p>"

    def for_hardware(self, hardware: Hardware) -> Plan:
        """Plan the same anew for other hardware, with nothing pinned."""
        return _plan(self.info, hardware, self.settings, {})

    def copy(self) -> Plan:
        """Return another one that is equal, to edit."""
        copy = Plan(self.info, self.hardware, self.settings)
        copy.__dict__.update(super().copy().__dict__)
        copy.whole_layers_tokens_per_s = self.whole_layers_tokens_per_s
        return copy


def plan(
    model: str | os.PathLike[str] | ModelInfo,
    *,
    hardware: Hardware | None = None,
    n_ctx: int | None = None,
    depth: int | None = None,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    pins: Mapping[str, Any] | None = None,
    margin_bytes: int = 1 << 30,
    load_mode: LoadMode = "mmap",
) -> Plan:
    """Find the placement that decodes fastest and fits, from the header of a file alone.

    Parameters
    ----------
    model
        The GGUF file (of a split model, its first) or its header.
    hardware
        What there is, or what is supposed. Default: this machine, measured once.
    n_ctx, depth, n_ubatch, type_k, type_v, margin_bytes, load_mode
        As for :func:`forecast`. What is given is kept to, not made smaller.
    pins
        What is decided already, as for :meth:`Placement.apply`: ``{"experts": "cpu", "layers 0-9 attention": "gpu"}``.
        The rest is planned around it, also if it cannot fit; the forecast then says so.

    Returns
    -------
    Plan
        A placement; its ``forecast()`` has the expected speed, the bytes on each device, and the reasons.

    Raises
    ------
    ModelLoadError
        The file cannot be read.
    ValueError
        A pin names what is not there, or what llama.cpp cannot do; or a number is out of range.
    """
    info = model if isinstance(model, ModelInfo) else ModelInfo.from_file(model)
    hardware = Hardware.here(info) if hardware is None else hardware
    settings = _settings(
        info,
        n_ctx=n_ctx,
        depth=depth,
        n_ubatch=n_ubatch,
        type_k=type_k,
        type_v=type_v,
        margin_bytes=margin_bytes,
        load_mode=load_mode,
    )
    return _plan(info, hardware, settings, pins or {})


def _plan(info: ModelInfo, hardware: Hardware, settings: Settings, pins: Mapping[str, Any]) -> Plan:
    pinned, fixed = _pins(info, hardware, pins)
    work = Workload(info, hardware, settings, pinned)
    search = Search(work, fixed)
    result = Plan(info, hardware, settings)
    _apply(result, work, search.best())
    result.kv_bytes_by_layer = work.kv_bytes
    if not pins and (whole := search.whole_layers()) is not None:
        result.whole_layers_tokens_per_s = 1 / work.evaluate(whole).seconds
    return result


def _pins(info: ModelInfo, hardware: Hardware, mapping: Mapping[str, Any]) -> tuple[dict[str, int], Pins]:
    """Return pinned tensors, and what else is pinned, in numbers of devices."""
    # Which complains of what is not there.
    trial = Placement(info, [device.name for device in hardware.gpus])
    trial.apply(mapping)
    rules = mapping_rules(mapping, info.n_layers)
    kv: list[int | None] = [None] * info.n_layers
    output: int | None = None
    embedding: int | None = None
    by_part: dict[str, int] = {}
    by_name: dict[str, int] = {}
    for rule in rules:
        number = _number_of(hardware, rule.device)
        if rule.pattern is not None:
            by_name |= {name: number for name, *_ in info.tensors if re.search(rule.pattern, name)}
            continue
        layers = range(info.n_layers) if rule.layers is None else rule.layers
        if "kv" in rule.parts:
            for layer in layers:
                kv[layer] = number
        output = number if "output" in rule.parts else output
        embedding = number if "embedding" in rule.parts else embedding
        chosen = set(layers)
        for name, *_ in info.tensors:
            if layer_of(name) in chosen and part_of(name) in rule.parts:
                by_part[name] = number
    pinned = by_part | by_name
    output = pinned.pop("output.weight", output)
    embedding = pinned.pop("token_embd.weight", embedding)
    if info.tied_embedding and embedding is not None and hardware.devices[embedding].kind == "gpu" and output is None:
        output = embedding  # llama.cpp moves both
    return pinned, Pins(tuple(kv), output, embedding)


def _apply(placement: Placement, work: Workload, arranged: Arrangement) -> None:
    """Put everything where the arrangement has it."""
    names = [device.name for device in work.devices]
    for layer, (kv, devices) in enumerate(zip(arranged.kv, arranged.groups, strict=True)):
        kind = work.kinds[layer]
        placement.assign(layers=layer, part="kv", device=names[kv])
        places: dict[str, Counter[int]] = {}
        by_stem = {stem: devices[group] for stem, group in kind.group_of.items()}
        for stem, device in by_stem.items():
            places.setdefault(part_of(f"blk.{layer}.{stem}"), Counter())[device] += 1
        for part, counts in places.items():
            most = counts.most_common(1)[0][0]
            placement.assign(layers=layer, part=part, device=names[most])
            for device in set(counts) - {most}:
                # A matrix and its bias go together.
                stems = sorted(
                    {stem.split(".")[0] for stem, place in by_stem.items()
                     if place == device and part_of(f"blk.{layer}.{stem}") == part}
                )  # fmt: skip
                choice = stems[0] if len(stems) == 1 else f"({'|'.join(stems)})"
                placement.override(rf"^blk\.{layer}\.{choice}\.", names[device])
    placement.output = names[arranged.output]
    placement.embedding = names[arranged.embedding]


def ubatch_trade(
    model: str | os.PathLike[str] | ModelInfo,
    *,
    hardware: Hardware | None = None,
    ubatches: Sequence[int] = _UBATCHES,
    pins: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[UbatchTrade]:
    """Plan with several batch sizes, and say what each costs and brings.

    Parameters are those of :func:`plan`; ``ubatches`` has values of ``n_ubatch``.
    """
    info = model if isinstance(model, ModelInfo) else ModelInfo.from_file(model)
    hardware = Hardware.here(info) if hardware is None else hardware
    first = plan(info, hardware=hardware, pins=pins, **(settings | {"n_ubatch": ubatches[0]}))
    found = []
    for n_ubatch in ubatches:
        chosen = replace(first.settings, n_ubatch=as_integer("ubatches", n_ubatch, 1, 65536))
        work, arranged = _arrange(info, _plan(info, hardware, chosen, pins or {}), hardware, chosen)
        use, compute = work.evaluate(arranged), work.compute_bytes(arranged)
        taker = work.takes_over(arranged.kv, arranged.output, arranged.groups)
        in_ram = use.weights_bytes[work.cpu] - work.fixed_bytes["embedding"] * (arranged.embedding == work.cpu)
        ceiling = float("inf")
        if taker is not None and in_ram > 0 and n_ubatch >= OFFLOAD_TOKENS:
            ceiling = n_ubatch * work.devices[taker].link_bytes_per_s / in_ram
        found.append(
            UbatchTrade(n_ubatch, sum(compute[: work.cpu]), _matrix_layers(work, arranged)[1], 1 / use.seconds, ceiling)
        )
    return found
