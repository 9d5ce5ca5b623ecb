"""What a placement costs: the seconds of a decoded token, and the bytes on each device."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from overspill.base.cached import cached_property
from overspill.base.checks import check_choice
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import CACHE_TYPES, layer_caches, n_computed_layers, padded_context, row_bytes
from overspill.machine.hardware import DeviceSpec, Hardware
from overspill.planning.graph.build import StepBuilder
from overspill.planning.graph.memory import compute_bytes
from overspill.planning.graph.nodes import GraphInputs, GraphLayer, Node, Step, Weight
from overspill.planning.graph.schedule import OFFLOAD_TOKENS, Piece, assign, pieces
from overspill.planning.layer_kinds import LayerKind, ModelTensors, aligned
from overspill.planning.settings import Settings, is_mapped

__all__ = ["PAGE_FAULT_BYTES_PER_S", "Arrangement", "Use", "Workload", "matrix_layers", "pinning_room_bytes"]

PAGE_FAULT_BYTES_PER_S = 1.5e9
"""Reading what has no place in RAM, page by page from a fast SSD."""
_FLOATS = ("f32", "f16", "bf16")
_ROUTERS = {"gpt-oss": "softmax of the chosen"}
_SCALED_EMBEDDING = ("gemma", "granite", "minicpm", "cohere2moe")


def pinning_room_bytes(ram_bytes: int, needed_bytes: int) -> int:
    """Return the bytes of RAM that are left when all that a model keeps there is pinned; less than 0 if too few.

    An eighth of it stays for other programs, since what is pinned cannot give way to them.
    """
    return ram_bytes * 7 // 8 - needed_bytes


@dataclass
class Arrangement:
    """A placement in numbers of devices: those of the hardware, the CPU last."""

    kv: list[int]
    """Of each layer."""
    groups: list[tuple[int, ...]]
    """Of each layer's groups of tensors."""
    output: int
    embedding: int


@dataclass(frozen=True, slots=True)
class _LayerCost:
    seconds: float
    first: int
    last: int
    n_splits: int
    """Changes of the device within the layer."""
    read_from_cpu: int
    weights_bytes: tuple[int, ...]
    """On each device."""
    terms: tuple[tuple[tuple[int, str], float], ...]
    """Seconds by device and part; ``"operations"`` and ``"hops"`` are among the parts."""


_PlacedLayer: TypeAlias = tuple[LayerKind, int, tuple[int, ...]]
"""A layer, the device of its cache, and those of its groups of tensors."""


@dataclass(frozen=True, slots=True)
class Use:
    """The seconds of a token, and the bytes on each device."""

    seconds: float
    n_splits: int
    weights_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]


class Workload:
    """A model on some hardware, with settings.

    ``pinned`` has a device's number for each tensor that must be there. Tensors that belong together are moved
    together: each of a layer's ``groups`` is its attention, its dense part, or one of its expert or feed-forward
    matrices with its bias, or what of that is pinned to one device.
    """

    def __init__(
        self, info: ModelInfo, hardware: Hardware, settings: Settings, pinned: Mapping[str, int] | None = None
    ) -> None:
        """Look through the header."""
        check_choice("type_k", settings.type_k, CACHE_TYPES)
        check_choice("type_v", settings.type_v, CACHE_TYPES)
        self.info, self.hardware, self.settings = info, hardware, settings
        self.devices: list[DeviceSpec] = list(hardware.devices)
        self.cpu = len(self.devices) - 1
        self.caches = layer_caches(info)
        self.n_layers = info.n_layers
        self.n_computed = n_computed_layers(info)
        tensors = ModelTensors(info, self.caches, self.n_computed, pinned or {})
        self.kinds, self.head, self.tied = tensors.kinds, tensors.head, tensors.tied
        self.fixed_bytes, self.types = tensors.fixed_bytes, tensors.types
        self._layers: dict[tuple[LayerKind, int], GraphLayer] = {}
        self._steps: dict[tuple[GraphLayer, int], Step] = {}
        self._costs: dict[tuple[object, ...], _LayerCost] = {}
        self._compute: dict[tuple[object, ...], list[int]] = {}

    # --- the graph

    def _layer(self, kind: LayerKind, kv: int) -> GraphLayer:
        """Return a layer for the graph whose cache is on a device."""
        device = kv if "rope_freqs" in self.head else 0
        if (kind, device) not in self._layers:
            cache, settings, info = kind.cache, self.settings, self.info
            cells = cache.cells(settings.n_ctx, settings.n_ubatch)
            heads = max(cache.n_heads_kv, 1)
            key_bytes = cells * row_bytes(settings.type_k, cache.key_width)
            normalised = info.metadata.get(f"{info.architecture}.expert_weights_norm")
            self._layers[kind, device] = GraphLayer(
                kind.weights,
                cache.key_width // heads,
                cache.value_width // heads,
                cache.n_heads_kv,
                key_bytes,
                cells * row_bytes(settings.type_v, cache.value_width) or key_bytes,
                cache.window is not None,
                info.n_experts_used,
                _ROUTERS.get(info.architecture, "normalised" if normalised else "plain"),
                device,
            )
        return self._layers[kind, device]

    @cached_property
    def _inputs(self) -> GraphInputs:
        settings = self.settings
        windows = [cache for cache in self.caches if cache.window is not None]
        cells = windows[0].cells(settings.n_ctx, settings.n_ubatch) if windows else None
        turn_k = turn_v = 0
        heads = {(cache.key_width // cache.n_heads_kv, cache.value_width // cache.n_heads_kv)
                 for cache in self.caches if cache.n_heads_kv}  # fmt: skip
        if len(heads) == 1:
            ((key, value),) = heads
            if settings.type_k not in _FLOATS and key % 64 == 0:
                turn_k = key & -key  # the largest power of two that it is a multiple of
            if settings.type_v not in _FLOATS and value % 64 == 0:
                turn_v = 64
        return GraphInputs(padded_context(settings.n_ctx), cells, turn_k, turn_v)

    @cached_property
    def _batches(self) -> StepBuilder:
        """Builds steps that read a batch of a prompt."""
        n_tokens = min(padded_context(self.settings.n_ctx), self.settings.n_ubatch)
        scales = self.info.architecture.startswith(_SCALED_EMBEDDING)
        return StepBuilder(n_tokens, self.head, self._inputs, scales_embedding=scales)

    def step(self, kind: LayerKind, kv: int, n_tokens: int) -> Step:
        """Return the step of some tokens through one layer, and into the next one unless it is the last."""
        layer = self._layer(kind, kv)
        if (layer, n_tokens) not in self._steps:
            names = ("rope_freqs", *(("output", "output_norm") if kind.last else ()))
            head = {name: self.head[name] for name in names if name in self.head}
            step = StepBuilder(n_tokens, head, self._inputs).step([layer])
            if not kind.last:
                end = Node("end", (1,), place=1)
                end.forced = True
                step.nodes.append(end)
            self._steps[layer, n_tokens] = step
        return self._steps[layer, n_tokens]

    def layer_pieces(
        self,
        kind: LayerKind,
        kv: int,
        devices: tuple[int, ...],
        following: int,
        *,
        n_tokens: int,
        forces: bool,
        taker: int | None,
        least: int = OFFLOAD_TOKENS,
    ) -> list[Piece]:
        """Return the pieces of a step of some tokens through one layer; ``following`` is where the next layer is.

        ``taker`` is the GPU that takes over what has weights in RAM, from ``least`` tokens on.
        """
        step = self.step(kind, kv, n_tokens)

        def device_of_weight(weight: Weight, place: int) -> int:
            group = kind.group_of.get(weight.name)
            return following if group is None else devices[group]

        assign(step, self.cpu, device_of_weight, (kv, following), forces=forces, takes_over=taker, least=least)
        found = pieces(step)
        if not kind.last:
            # The next layer's; it may be alone.
            found[-1].nodes.pop()
            found = found if found[-1].nodes else found[:-1]
        return found

    @cached_property
    def kv_bytes(self) -> list[int]:
        """Bytes of each layer's caches."""
        settings = self.settings
        return [
            settings.n_parallel * cache.n_bytes(settings.n_ctx, settings.n_ubatch, settings.type_k, settings.type_v)
            for cache in self.caches
        ]

    @cached_property
    def kv_bytes_read(self) -> list[int]:
        """Bytes of each layer's cache that a token reads."""
        settings = self.settings
        return [cache.bytes_read(settings.depth, settings.type_k, settings.type_v) for cache in self.caches]

    # --- time

    def takes_over(self, arranged: Arrangement) -> int | None:
        """Return the GPU that computes large batches with weights in the CPU's memory, if one does."""
        return next((gpu for gpu in self.used(arranged) if self.devices[gpu].copies_host_weights), None)

    def used(self, arranged: Arrangement) -> list[int]:
        """Return the GPUs that hold anything, in llama.cpp's order."""
        runs = dict.fromkeys((*arranged.kv, arranged.output))
        more = set[int]().union(*arranged.groups).difference(runs)
        return [device for device in (*runs, *sorted(more)) if device != self.cpu]

    def copy_bytes_per_s(self, gpu: int) -> float:
        """Return the rate at which a GPU copies weights from RAM, as they are held there."""
        spec, settings = self.devices[gpu], self.settings
        is_registered = settings.pin_weights and spec.registers_host_memory
        return spec.copy_bytes_per_s(pinned=is_registered or not is_mapped(settings))

    def copied_bytes(self, arranged: Arrangement, use: Use) -> int:
        """Return the bytes of weights in RAM that are computed with; of the embedding, rows are looked up."""
        return use.weights_bytes[self.cpu] - self.fixed_bytes["embedding"] * (arranged.embedding == self.cpu)

    def pinning_room_bytes(self, use: Use) -> int:
        """Return the bytes of RAM that are left when all that is kept there is pinned; less than 0 if too few."""
        return pinning_room_bytes(
            self.devices[self.cpu].memory_bytes, use.weights_bytes[self.cpu] + use.kv_bytes[self.cpu]
        )

    def _layer_cost(
        self, kind: LayerKind, kv: int, devices: tuple[int, ...], following: int, taker: int | None
    ) -> _LayerCost:
        """Return what decoding costs in a layer; ``following`` is where the next layer is, or the output."""
        terms: defaultdict[tuple[int, str], float] = defaultdict(float)
        read_from_cpu = 0
        found = self.layer_pieces(kind, kv, devices, following, n_tokens=1, forces=True, taker=taker)
        left = dict.fromkeys(kind.weights.values())
        for piece in found:
            device = self.devices[piece.device]
            for node, _ in piece.nodes:
                terms[piece.device, "operations"] += device.op_s
                weight = None if node.reads is None else node.reads.weight
                if node.op == "flash_attn":
                    self._attending(kind, kv, piece.device, terms)
                elif weight is not None:
                    left.pop(weight, None)
                    part, n_bytes, rate = self.reading(kind, weight, piece.device, node.op)
                    terms[piece.device, part] += n_bytes / rate
                    read_from_cpu += n_bytes if piece.device == self.cpu else 0
        for piece in found[1:]:
            terms[piece.device, "hops"] += self.devices[piece.device].hop_s
        # What the graph in outline does not use is read all the same.
        for weight in left:
            place = devices[kind.group_of[weight.name]]
            part, n_bytes, rate = self.reading(kind, weight, place, "mul_mat")
            terms[place, part] += n_bytes / rate
            read_from_cpu += n_bytes if place == self.cpu else 0
        if kind.cache.state_bytes and not kind.cache.key_width:
            terms[kv, "kv"] += self.kv_bytes_read[kind.index] / self.devices[kv].bandwidth_bytes_per_s
        ends = [piece.device for piece in found] or [kv]
        sizes = [0] * len(self.devices)
        for place, n_bytes in zip(devices, kind.group_bytes, strict=True):
            sizes[place] += n_bytes
        return _LayerCost(
            sum(terms.values()),
            ends[0],
            ends[-1],
            len(ends) - 1,
            read_from_cpu,
            tuple(sizes),
            tuple(terms.items()),
        )

    def _attending(self, kind: LayerKind, kv: int, device: int, terms: defaultdict[tuple[int, str], float]) -> None:
        """Add the time of attention to a KV cache."""
        n_bytes, place = self.kv_bytes_read[kind.index], self.devices[kv]
        terms[kv, "kv"] += n_bytes / self.devices[device].rate(f"{self.settings.type_k}:kv")
        if kv != device:
            gpu = place if place.kind == "gpu" else self.devices[device]
            terms[device, "hops"] += n_bytes / gpu.link_bytes_per_s

    def reading(self, kind: LayerKind, weight: Weight, device: int, operation: str) -> tuple[str, int, float]:
        """Return part, bytes that are read of a weight, and the rate at which they are."""
        part, n_bytes, spec = kind.parts.get(weight.name, "output"), weight.n_bytes, self.devices[device]
        type_name = self.types[weight.name]
        if part == "experts":
            n_bytes = n_bytes * self.info.n_experts_used // max(self.info.n_experts, 1)
        if operation == "mul_mat_id":
            # Without a rate for a choice of experts, the one for whole matrices is nearest.
            return part, n_bytes, spec.rates.get(f"{type_name}:experts", spec.rate(type_name))
        return part, n_bytes, spec.rate(type_name) if operation == "mul_mat" else spec.bandwidth_bytes_per_s

    # --- all of it

    def costs(self, arranged: Arrangement) -> list[_LayerCost]:
        """Return the cost of each layer that is computed, the output's with the last."""
        kv, groups, output = arranged.kv, arranged.groups, arranged.output
        taker = self.takes_over(arranged)
        following = [*kv[1 : self.n_computed], output]
        found = []
        for kind, place, devices, after in zip(self.kinds, kv, groups, following, strict=False):
            key = (kind, place, devices, after, taker)
            if key not in self._costs:
                self._costs[key] = self._layer_cost(kind, place, devices, after, taker)
            found.append(self._costs[key])
        return found

    def head_bytes(self, arranged: Arrangement) -> list[int]:
        """Return the bytes of what is in no layer on each device."""
        sizes = [0] * len(self.devices)
        sizes[arranged.output] += self.fixed_bytes["output"]
        sizes[arranged.embedding] += self.fixed_bytes["embedding"]
        sizes[arranged.kv[0] if arranged.kv else self.cpu] += self.fixed_bytes["other"]
        if self.tied and arranged.output != arranged.embedding:
            sizes[arranged.output] += aligned(self.head["token_embd"].n_bytes)
        return sizes

    def evaluate(self, arranged: Arrangement) -> Use:
        """Return time and bytes of an arrangement."""
        costs = self.costs(arranged)
        weights = [*map(sum, zip(self.head_bytes(arranged), *(cost.weights_bytes for cost in costs), strict=True))]
        caches = [0] * len(self.devices)
        for kv, n_bytes in zip(arranged.kv, self.kv_bytes, strict=True):
            caches[kv] += n_bytes
        hops, n_splits = self._hops_between(arranged, costs)
        seconds = sum(cost.seconds for cost in costs) + sum(seconds for _, seconds in hops)
        seconds += self.devices[arranged.embedding].op_s + self.page_fault_s(weights, caches, costs)
        return Use(seconds, n_splits, tuple(weights), tuple(caches))

    def _hops_between(self, arranged: Arrangement, costs: Sequence[_LayerCost]) -> tuple[list[tuple[int, float]], int]:
        device, hops, n_splits = arranged.embedding, [], 1
        for cost in costs:
            if cost.first != device:
                hops.append((cost.first, self.devices[cost.first].hop_s))
                n_splits += 1
            n_splits += cost.n_splits
            device = cost.last
        return hops, n_splits

    def missing_share(self, weights: Sequence[int], caches: Sequence[int]) -> float:
        """Return the share of the weights on the CPU that have no place in RAM."""
        here = weights[self.cpu]
        missing = here + caches[self.cpu] - self.devices[self.cpu].memory_bytes
        return 0.0 if missing <= 0 or here == 0 else min(1.0, missing / here)

    def page_fault_s(self, weights: Sequence[int], caches: Sequence[int], costs: Sequence[_LayerCost]) -> float:
        """Return the seconds that a token waits for weights that have no place in RAM."""
        return self.missing_share(weights, caches) * sum(cost.read_from_cpu for cost in costs) / PAGE_FAULT_BYTES_PER_S

    def terms(self, arranged: Arrangement) -> dict[str, dict[str, float]]:
        """Return the seconds of a token by device and part."""
        costs = self.costs(arranged)
        total: defaultdict[tuple[int, str], float] = defaultdict(float)
        for cost in costs:
            for key, seconds in cost.terms:
                total[key] += seconds
        for device, seconds in self._hops_between(arranged, costs)[0]:
            total[device, "hops"] += seconds
        total[arranged.embedding, "operations"] += self.devices[arranged.embedding].op_s
        use = self.evaluate(arranged)
        total[self.cpu, "page faults"] = self.page_fault_s(use.weights_bytes, use.kv_bytes, costs)
        found: dict[str, dict[str, float]] = {}
        for (number, part), seconds in total.items():
            if seconds:
                found.setdefault(self.devices[number].name, {})[part] = seconds
        return found

    # --- memory for computing

    def compute_bytes(self, arranged: Arrangement) -> list[int]:
        """Return the bytes on each device for what is computed, in the worst case: a batch of a prompt."""
        layers = self._outline(arranged)
        key = (*layers, arranged.output, arranged.embedding)
        if key not in self._compute:
            self._compute[key] = self._computing(arranged, layers)
        return self._compute[key]

    def _outline(self, arranged: Arrangement) -> list[_PlacedLayer]:
        """Return a few layers in which everything happens that happens anywhere."""
        chosen: list[_PlacedLayer] = []
        n_seen: Counter[LayerKind] = Counter()
        previous: object = None
        for kind, kv, devices in zip(self.kinds[: self.n_computed], arranged.kv, arranged.groups, strict=False):
            if (kv, devices) != previous:
                n_seen.clear()
            previous = (kv, devices)
            n_seen[kind] += 1
            if n_seen[kind] <= 3 or kind.last:
                chosen.append((kind, kv, devices))
        return chosen

    def _computing(self, arranged: Arrangement, layers: Sequence[_PlacedLayer]) -> list[int]:
        step = self._batches.step([self._layer(kind, kv) for kind, kv, _ in layers])

        def device_of_weight(weight: Weight, place: int) -> int:
            if place < 0:
                return arranged.embedding if weight.name == "token_embd.weight" else arranged.output
            kind, _, devices = layers[place]
            return devices[kind.group_of[weight.name]]

        whole = self.cpu not in arranged.kv and arranged.output != self.cpu
        assign(
            step,
            self.cpu,
            device_of_weight,
            [kv for _, kv, _ in layers],
            forces=whole or self._batches.n_tokens < OFFLOAD_TOKENS,
            takes_over=self.takes_over(arranged),
        )
        return compute_bytes(step, len(self.devices))


def matrix_layers(work: Workload, arranged: Arrangement) -> tuple[int, int, int]:
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
