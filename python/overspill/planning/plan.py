"""The fastest placement that fits, and what to expect of it.

A token's time is the sum, over all tensors, of the bytes that it reads of each divided by the rate of the device, of
the KV cache likewise, of a fixed cost of each operation, and of one for each change of the device; docs/offload.md has
the arithmetic. A prompt's time is that of its batches: weights that are copied to a GPU, arithmetic, attention.
:func:`plan` looks for the placement, the size of batches and the way to hold weights in RAM that make a whole exchange
shortest, and still fit.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from rich.console import Group
from rich.text import Text

from overspill._core import Error
from overspill.base import html
from overspill.base.checks import as_instance, as_integer, as_mapping, as_path, as_real, check_choice, naming
from overspill.base.units import format_bytes, format_count
from overspill.base.values import Experts, LoadMode
from overspill.header.info import ModelInfo
from overspill.header.tensor_names import layer_of, part_of
from overspill.machine.hardware import Hardware
from overspill.placement.assignment import Assignment
from overspill.placement.device_names import CPU
from overspill.placement.memory_map import memory_map
from overspill.placement.placement import Placement
from overspill.placement.rules import mapping_rules
from overspill.placement.table import placement_table
from overspill.planning.forecast import Estimate, Forecast, device_number
from overspill.planning.prompt import Prompts
from overspill.planning.residency import experts_bytes
from overspill.planning.search import Pins, Search, excess_bytes, whole_layers
from overspill.planning.settings import (
    DEFAULT_UBATCH,
    PROMPT_TOKENS,
    REPLY_TOKENS,
    Settings,
    checked_settings,
    is_mapped,
    prompt_length,
)
from overspill.planning.workload import Arrangement, Workload

__all__ = ["UBATCHES", "Plan", "before_loading", "plan", "plan_for", "prompt_line"]

UBATCHES = (256, 512, 1024, 2048, 4096, 8192)
_WORTH_A_CACHE = 1.05  # so much faster decoding must be: hits depend on the text
_SLOWER_DECODING = 1.02  # so much may be given up for prompts
_LONGEST_PIECE_S = 0.7  # of a GPU's work, which cannot be interrupted: Ctrl-C is to be answered within a second


class Plan(Placement):
    """A placement that was planned: it knows for what hardware and settings, and what to expect of it.

    It may be edited like any other; :meth:`forecast` speaks of it as it is then.
    """

    def __init__(self, info: ModelInfo, hardware: Hardware, settings: Settings) -> None:
        """Put everything on the CPU; :func:`plan` makes better ones."""
        super().__init__(info, [device.name for device in hardware.gpus])
        self.info, self.hardware, self.settings = info, hardware, settings
        self.pins: Mapping[str, Any] = {}
        """What was decided before it was planned, as for :func:`plan`."""
        self.chosen: frozenset[str] = frozenset()
        """The settings that were planned, and not given."""
        self.experts: Experts = "static"
        """What was asked for, as for :func:`plan`; whether there is a cache is said by :attr:`expert_cache`."""
        self.worth_of_cache = 1.0
        """With less than so much of a token's time with all experts in RAM, a cache of them is faster than no cache."""
        self._kept: tuple[Assignment, Estimate] | None = None
        self._whole_layers: Workload | float | None = None

    def _keep(self, estimate: Estimate) -> Estimate:
        self._kept = (self._assignment, estimate)
        return estimate

    def estimate(self) -> Estimate:
        """Return the workload, the arrangement and the forecast, which are kept until the plan is edited."""
        if self._kept is not None and self._kept[0] is self._assignment:
            kept = self._kept[1]
            if kept.work.hardware is self.hardware and kept.work.settings is self.settings:
                return kept
        return self._keep(Estimate.of(self.info, self, self.hardware, self.settings))

    def forecast(self) -> Forecast:
        """Return how fast it is and what it needs; see :class:`Forecast`."""
        return self.estimate().forecast

    @property
    def whole_layers_tokens_per_s(self) -> float | None:
        """Decoding with the best split by whole layers; None if something was pinned, or no such split fits."""
        if isinstance(self._whole_layers, Workload):
            work = self._whole_layers
            whole = whole_layers(work)
            self._whole_layers = None if whole is None else 1 / work.evaluate(whole).seconds
        return self._whole_layers

    @whole_layers_tokens_per_s.setter
    def whole_layers_tokens_per_s(self, tokens_per_s: float | None) -> None:
        self._whole_layers = None if tokens_per_s is None else as_real("whole_layers_tokens_per_s", tokens_per_s)

    def _lines(self, *memory: str) -> list[str]:
        """Return the forecast in lines, with those of memory among them."""
        outlook = self.forecast()
        depth = f"{self.settings.depth} of {self.settings.n_ctx} tokens into the context"
        speeds = [f"{outlook.verdict}: {outlook.tokens_per_s:.1f} tokens/s, {depth}", prompt_line(outlook)]
        reasons = [outlook.reason, *([outlook.weights_in_ram] if outlook.weights_in_ram else [])]
        return [*speeds, *memory, *reasons, *(f"- {remedy}" for remedy in outlook.remedies)]

    def __rich__(self) -> Group:
        """Return the table of the placement, and the forecast."""
        uses = " · ".join(
            f"{name} {format_bytes(use.total_bytes)} of {format_bytes(use.free_bytes)}"
            for name, use in self.forecast().memory.items()
        )
        return Group(super().__rich__(), "", *(Text(line) for line in self._lines(uses)))

    def _repr_html_(self) -> str:
        """Return the memory of each device, the forecast and the table, for a notebook."""
        memory = self.forecast().memory
        free = {name: use.free_bytes for name, use in memory.items()}
        table = placement_table(self._assignment).as_html()
        return memory_map(self._assignment, memory, free) + html.lines(self._lines()) + table

    def for_hardware(self, hardware: Hardware) -> Plan:
        """Return a plan for other hardware with the same settings, and with nothing pinned."""
        as_instance("hardware", hardware, Hardware)
        return plan_for(self.info, hardware, self.settings, {}, self.chosen, self.experts)

    def static(self) -> Plan:
        """Return a plan for the same without a cache of experts."""
        return plan_for(self.info, self.hardware, self.settings, self.pins, self.chosen, "static")

    def copy(self) -> Plan:
        """Return an equal plan, to edit."""
        copy = Plan(self.info, self.hardware, self.settings)
        copy.__dict__.update(self.__dict__ | super().copy().__dict__)
        return copy


def prompt_line(outlook: Forecast) -> str:
    """Return the speed of prompts in a line."""
    used = outlook.settings
    return (
        f"prompts: {outlook.prompt_tokens_per_s:.0f} tokens/s, {outlook.time_to_first_token_s:.2g} s to the first "
        f"token after {prompt_length(used)}, in batches of {used.n_ubatch}"
    )


def before_loading(outlook: Forecast) -> str:
    """Return in a line what a model will do: whether it fits, how fast it will be, and the memory it takes."""
    used = {name: use.total_bytes for name, use in outlook.memory.items() if use.total_bytes}
    memory = ", ".join(f"{format_bytes(n_bytes)} on {name}" for name, n_bytes in used.items())
    return (
        f"{outlook.verdict}: about {outlook.tokens_per_s:.1f} tok/s, {outlook.time_to_first_token_s:.2g} s to the "
        f"first token after a prompt of {format_count(prompt_length(outlook.settings), 'token')}, {memory}"
    )


def plan(
    model: str | os.PathLike[str] | ModelInfo,
    *,
    hardware: Hardware | None = None,
    n_ctx: int | None = None,
    n_parallel: int | None = None,
    depth: int | None = None,
    n_ubatch: int | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    pins: Mapping[str, Any] | None = None,
    margin_bytes: int = 1 << 30,
    load_mode: LoadMode = "mmap",
    prompt_tokens: int = PROMPT_TOKENS,
    reply_tokens: int = REPLY_TOKENS,
    pin_weights: bool | None = None,
    offload_min_batch: int | None = None,
    experts: Experts = "auto",
) -> Plan:
    """Return the placement with which an exchange is shortest and that fits, planned from the header of a file alone.

    Decoding is at most 2 % slower than with the placement that decodes fastest with batches of ``n_ubatch`` tokens, by
    default 512.

    Parameters
    ----------
    model
        The GGUF file (of a split model, its first), a name of :func:`overspill.hub.resolve`, or a header.
    hardware
        What there is, or what is supposed. Default: this machine, measured once.
    n_ctx, n_parallel, depth, type_k, type_v, margin_bytes, load_mode, prompt_tokens, reply_tokens
        As for :func:`forecast`. What is given is kept to, not made smaller.
    n_ubatch
        Tokens of a prompt that are computed at once, 1 to 65536. Default: what is planned, of 256 to 8192.
    pin_weights
        Whether mapped weights in RAM are registered with the driver of the GPU that copies them. Default: where the
        driver can and RAM has room.
    offload_min_batch
        From so many tokens on, 1 to 65536, a GPU computes with weights in RAM. Default: from where that is faster.
    experts
        Where experts are: ``"static"``, each on one device; ``"cached"``, all in RAM, and what the GPUs have room for
        besides is a cache of those that tokens used lately; or ``"auto"``, cached where it decodes 5 % faster.
    pins
        What is decided already, as for :meth:`Placement.apply`: ``{"experts": "cpu", "layers 0-9 attention": "gpu"}``.
        The rest is planned around it, also if it cannot fit; the forecast then says so.

    Returns
    -------
    Plan
        A placement; its ``forecast()`` has the expected speeds, the bytes on each device, and the reasons, and its
        ``settings`` what was planned besides.

    Raises
    ------
    ModelLoadError
        The file cannot be read.
    ValueError
        A pin names what is not there, or what llama.cpp cannot do; or a number is out of range.
    Error
        ``experts="cached"``, and the model has none, or there is no GPU or no room on it.
    """
    check_choice("experts", experts, get_args(Experts))
    as_path("model", model)
    info = ModelInfo.from_file(model)
    hardware = Hardware.here(info) if hardware is None else as_instance("hardware", hardware, Hardware)
    if pins is not None:
        as_mapping("pins", pins, "a mapping from parts to devices")
    if offload_min_batch is not None:
        offload_min_batch = as_integer("offload_min_batch", offload_min_batch, 1, 65536)
    optional = {"n_ubatch": n_ubatch, "pin_weights": pin_weights, "offload_min_batch": offload_min_batch}
    settings = checked_settings(
        info,
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        depth=depth,
        type_k=type_k,
        type_v=type_v,
        margin_bytes=margin_bytes,
        load_mode=load_mode,
        prompt_tokens=prompt_tokens,
        reply_tokens=reply_tokens,
        **optional,
    )
    chosen = frozenset(name for name, value in optional.items() if value is None)
    return plan_for(info, hardware, settings, pins or {}, chosen, experts)


def plan_for(
    info: ModelInfo,
    hardware: Hardware,
    settings: Settings,
    pins: Mapping[str, Any],
    chosen: frozenset[str],
    experts: Experts,
) -> Plan:
    """Return the best plan; ``chosen`` has the names of settings that are to be chosen. See :func:`plan`."""
    cached = None if experts == "static" else _cached_plan(info, hardware, settings, pins, chosen)
    if experts == "cached":
        if cached is None:
            name = info.name or info.architecture
            raise Error(
                f"{name} has no experts to cache: only a mixture of experts has"
                if not info.expert_layers
                else f"there is no GPU with room for a cache of the experts of {name}"
            )
        best = cached
    else:
        best = _best_plan(info, hardware, settings, pins, chosen)
        if cached is not None:
            now, then = best.forecast(), cached.forecast()
            # Copies into the cache from memory that is not pinned keep the CPU from decoding.
            is_pinned = cached.settings.pin_weights or not is_mapped(settings)
            is_faster = is_pinned and then.tokens_per_s > _WORTH_A_CACHE * now.tokens_per_s
            if is_faster and not any(use.missing_bytes for use in then.memory.values()):
                # Against a token with all experts in RAM, which can be measured beside the cache.
                in_ram_s = replace(cached.estimate(), pools={}).forecast.tokens_per_s ** -1
                cached.worth_of_cache = min(1.0, 1 / now.tokens_per_s / in_ram_s)
                cached._whole_layers, best = best._whole_layers, cached
    best.experts, best.pins = experts, pins
    return best


def _cached_plan(
    info: ModelInfo, hardware: Hardware, settings: Settings, pins: Mapping[str, Any], chosen: frozenset[str]
) -> Plan | None:
    """Return the plan with all experts in RAM, and caches of them on the GPUs; None if there can be none."""
    if (
        not info.expert_layers
        or not info.n_experts
        or not info.n_experts_used
        or not any(gpu.copies_host_weights for gpu in hardware.gpus)
    ):
        return None
    planned = _best_plan(info, hardware, settings, {"experts": CPU, **pins}, chosen, caches=True)
    estimate = planned.estimate()
    pools = estimate.room_for_experts()
    # An expert of each layer, or it is not worth a visit.
    if sum(pools.values()) < experts_bytes(info) // info.n_experts:
        return None
    planned.expert_cache = {hardware.devices[gpu].name: n_bytes for gpu, n_bytes in pools.items()}
    planned._keep(replace(estimate, pools=pools))
    return planned


def _best_plan(
    info: ModelInfo,
    hardware: Hardware,
    settings: Settings,
    pins: Mapping[str, Any],
    chosen: frozenset[str],
    *,
    caches: bool = False,
) -> Plan:
    """Return the best static plan; or with ``caches`` the one that is best with what is left for a cache of experts."""
    pinned, fixed = _pins(info, hardware, pins)
    # Whatever an earlier plan may have chosen.
    anew: dict[str, Any] = {"n_ubatch": DEFAULT_UBATCH, "pin_weights": False, "offload_min_batch": 0}
    settings = replace(settings, **{name: value for name, value in anew.items() if name in chosen})
    work = Workload(info, hardware, settings, pinned)
    best = Search(work, fixed).best()
    whole = work
    if hardware.gpus:
        work, best = _for_exchanges(work, best, fixed, pinned, chosen, caches=caches)
    if "offload_min_batch" in chosen:
        least = Prompts(work).least_batch(best)
        work = Workload(info, hardware, replace(work.settings, offload_min_batch=least), pinned)
    result = Plan(info, hardware, work.settings)
    _apply(result, work, best)
    result.pins, result.chosen, result.kv_bytes_by_layer = pins, chosen, work.kv_bytes
    result._keep(Estimate(work, best))
    result._whole_layers = None if pins else whole
    return result


def _for_exchanges(
    work: Workload,
    fastest: Arrangement,
    fixed: Pins,
    pinned: Mapping[str, int],
    chosen: frozenset[str],
    *,
    caches: bool,
) -> tuple[Workload, Arrangement]:
    """Return the best arrangement for exchanges, with its workload, beside the one that decodes fastest."""
    settings = work.settings
    is_open = "pin_weights" in chosen and is_mapped(settings)
    may_pin = is_open and any(gpu.registers_host_memory for gpu in work.hardware.gpus)
    found: list[_Candidate] = []
    for n_ubatch in _ubatches(settings) if "n_ubatch" in chosen else [settings.n_ubatch]:
        for pins in (True, False) if may_pin else (settings.pin_weights,):
            one = Workload(work.info, work.hardware, replace(settings, n_ubatch=n_ubatch, pin_weights=pins), pinned)
            prompts = Prompts(one)
            arranged = [Search(one, fixed, prompts).best(), *([fastest] if n_ubatch == settings.n_ubatch else [])]
            possible = [trial for trial in arranged if not (may_pin and pins) or _can_pin(one, prompts, trial)]
            found += [_Candidate.of(one, trial, prompts, caches=caches) for trial in possible]
            if possible:
                break
    if any(one.fits for one in found):
        found = [one for one in found if one.fits]
    else:
        found = [one for one in found if one.work.settings.n_ubatch == settings.n_ubatch]
    as_today = [one.token_s for one in found if one.arranged is fastest]
    slowest_s = _SLOWER_DECODING * min(as_today or [one.token_s for one in found])
    found = [one for one in found if one.token_s <= slowest_s]
    quick = [one for one in found if one.longest_piece_s <= _LONGEST_PIECE_S]
    best = min(quick, key=lambda one: one.exchange_s) if quick else min(found, key=lambda one: one.longest_piece_s)
    return best.work, best.arranged


def _can_pin(work: Workload, prompts: Prompts, arranged: Arrangement) -> bool:
    """Return whether the GPU that copies weights from RAM can register them, and RAM has room for that."""
    taker = work.takes_over(arranged)
    if taker is None or not work.devices[taker].registers_host_memory or not prompts.copies(arranged, taker):
        return False
    return work.pinning_room_bytes(work.evaluate(arranged)) >= 0


class _Candidate(NamedTuple):
    """An arrangement for one size of batches."""

    work: Workload
    arranged: Arrangement
    fits: bool
    token_s: float
    exchange_s: float
    longest_piece_s: float

    @classmethod
    def of(cls, work: Workload, arranged: Arrangement, prompts: Prompts, *, caches: bool) -> _Candidate:
        token = work.evaluate(arranged)
        prompt = prompts.use(arranged, token)
        token_s = token.seconds
        if caches:
            token_s += Estimate(work, arranged, Estimate(work, arranged).room_for_experts()).cache_s
        exchange_s = prompt.seconds + work.settings.reply_tokens * token_s
        fits = excess_bytes(work, arranged, token) <= 0
        return cls(work, arranged, fits, token_s, exchange_s, prompt.longest_piece_s)


def _ubatches(settings: Settings) -> list[int]:
    """Return the sizes of batches to look at: none is twice as large as the prompt, or larger."""
    return [n for n in UBATCHES if n <= DEFAULT_UBATCH or n < 2 * prompt_length(settings)]


def _pins(info: ModelInfo, hardware: Hardware, mapping: Mapping[str, Any]) -> tuple[dict[str, int], Pins]:
    """Return the pinned tensors, and the other pins, in numbers of devices."""
    # Raises the errors for parts and devices that are not there.
    trial = Placement(info, [device.name for device in hardware.gpus])
    with naming("pins"):
        trial.apply(mapping)
    rules = mapping_rules(mapping, info.n_layers)
    kv: list[int | None] = [None] * info.n_layers
    output: int | None = None
    embedding: int | None = None
    by_part: dict[str, int] = {}
    by_name: dict[str, int] = {}
    for rule in rules:
        number = device_number(hardware, rule.device)
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
    layers_by_part: dict[tuple[str, int], list[int]] = {}
    overrides: list[tuple[str, str]] = []
    for layer, (kv, devices) in enumerate(zip(arranged.kv, arranged.groups, strict=True)):
        layers_by_part.setdefault(("kv", kv), []).append(layer)
        kind = work.kinds[layer]
        places: dict[str, dict[str, int]] = {}
        for stem, weight in kind.weights.items():
            places.setdefault(kind.parts[weight.name], {})[stem] = devices[kind.group_of[weight.name]]
        for part, by_stem in places.items():
            counts = Counter(by_stem.values())
            most = counts.most_common(1)[0][0]
            layers_by_part.setdefault((part, most), []).append(layer)
            for device in set(counts) - {most}:
                # A matrix and its bias go together.
                stems = sorted({stem.split(".")[0] for stem, place in by_stem.items() if place == device})
                choice = stems[0] if len(stems) == 1 else f"({'|'.join(stems)})"
                overrides.append((rf"^blk\.{layer}\.{choice}\.", names[device]))
    for (part, device), layers in layers_by_part.items():
        placement.assign(layers=layers, part=part, device=names[device])
    for pattern, name in overrides:
        placement.override(pattern, name)
    placement.output = names[arranged.output]
    placement.embedding = names[arranged.embedding]
