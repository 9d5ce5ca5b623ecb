"""What a placement costs: the seconds of a decoded token, and the bytes on each device."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from overspill.header.info import ModelInfo
from overspill.header.kv_cache import CACHE_TYPES, LayerCache, layer_caches, padded_context, row_bytes
from overspill.header.tensor_names import layer_of, part_of
from overspill.machine.hardware import DeviceSpec, Hardware
from overspill.planning.graph.build import build_step
from overspill.planning.graph.memory import compute_bytes
from overspill.planning.graph.nodes import GraphInputs, LayerShape, LayerWeights, Node, Step, Weight
from overspill.planning.graph.schedule import OFFLOAD_TOKENS, assign, pieces
from overspill.planning.settings import Settings

__all__ = ["Arrangement", "Use", "Workload", "matrix_layers"]

# Reading what has no place in RAM, page by page from a fast SSD.
_PAGE_FAULT_BYTES_PER_S = 1.5e9
_ALIGNMENT = 128  # of each tensor, in bytes: CUDA's
_MATRICES = re.compile(r"ffn_(gate|up|down|gate_up)\.(weight|bias|scale)$")
_FLOATS = ("f32", "f16", "bf16")
_ROUTERS = {"gpt-oss": "softmax of the chosen"}
_SCALED_EMBEDDING = ("gemma", "granite", "minicpm", "cohere2moe")


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
    terms: tuple[tuple[tuple[int, str], float], ...]
    """Seconds by device and part; ``"operations"`` and ``"hops"`` are among the parts."""


@dataclass
class _Kind:
    """Layers that are alike in all that costs anything."""

    index: int
    weights: LayerWeights
    types: dict[str, str]
    cache: LayerCache
    last: bool
    groups: list[tuple[str, int | None]]
    """Names, and the device that it is pinned to. Tensors of a group go together."""
    group_of: dict[str, int]
    group_bytes: list[int] = field(default_factory=list)
    step: Step | None = None

    def is_matrix_group(self, group: int) -> bool:
        """Whether it is one of the large tensors, of which a layer may have some here and some there."""
        return self.groups[group][0] not in ("attention", "dense")


@dataclass(frozen=True, slots=True)
class Use:
    """The outcome for an arrangement."""

    seconds: float
    n_splits: int
    weights_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]


class Workload:
    """A model on some hardware, with settings.

    ``pinned`` has a device's number for each tensor that must lie there. Tensors that belong together are moved
    together: each of a layer's ``groups`` is its attention, its dense part, or one of its expert or feed-forward
    matrices with its bias, or what of that is pinned to one device.
    """

    def __init__(
        self, info: ModelInfo, hardware: Hardware, settings: Settings, pinned: Mapping[str, int] | None = None
    ) -> None:
        """Look through the header."""
        for name, kind in (("type_k", settings.type_k), ("type_v", settings.type_v)):
            if kind not in CACHE_TYPES:
                raise ValueError(f"{name} must be one of {', '.join(CACHE_TYPES)}, not {kind!r}")
        if not info.layers or not any(info.layers):
            raise ValueError(f"{info.name or info.architecture} has no layers with weights that could be placed")
        self.info, self.hardware, self.settings = info, hardware, settings
        self.devices: list[DeviceSpec] = list(hardware.devices)
        self.cpu = len(self.devices) - 1
        self._pinned = pinned or {}
        self.caches = layer_caches(info)
        self.n_layers = info.n_layers
        # The last ones may only draft; llama.cpp leaves their weights alone.
        self.n_computed = self.n_layers - int(info.metadata.get(f"{info.architecture}.nextn_predict_layers", 0))
        self._read_tensors()
        self._costs: dict[tuple[object, ...], _LayerCost] = {}
        self._weights: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._compute: dict[tuple[object, ...], list[int]] = {}

    # --- the header

    def _read_tensors(self) -> None:
        layers: list[dict[str, Weight]] = [{} for _ in range(self.n_layers)]
        types: list[dict[str, str]] = [{} for _ in range(self.n_layers)]
        self.head: dict[str, Weight] = {}
        self._head_types: dict[str, str] = {}
        self.fixed_bytes = Counter[str]()
        for name, kind, shape, n_bytes in self.info.tensors:
            layer = layer_of(name)
            if layer is not None and layer < self.n_layers and name.startswith("blk."):
                stem = name.split(".", 2)[2]
                layers[layer][stem] = Weight(name, shape, n_bytes)
                types[layer][stem] = kind
            else:
                stem = name.removesuffix(".weight")
                self.head[stem] = Weight(name, shape, n_bytes)
                self._head_types[stem] = kind
                part = part_of(name)
                self.fixed_bytes[part if part in ("output", "embedding") else "other"] += _aligned(n_bytes)
        self.tied = "output" not in self.head and "token_embd" in self.head
        if self.tied:
            embedding = self.head["token_embd"]
            self.head["output"] = Weight("output.weight", embedding.shape, embedding.n_bytes)
            self._head_types["output"] = self._head_types["token_embd"]
        kinds: dict[object, _Kind] = {}
        self.kinds: list[_Kind] = []
        for layer in range(self.n_layers):
            weights = layers[layer] if layer < self.n_computed else {}
            pins = tuple(self._pinned.get(weight.name) for weight in weights.values())
            tensors = tuple((stem, weight.shape, types[layer][stem]) for stem, weight in weights.items())
            last = layer == self.n_computed - 1
            key = (tensors, pins, self.caches[layer], last)
            if key not in kinds:
                kinds[key] = self._kind(layer, weights, types[layer], last)
            self.kinds.append(kinds[key])

    def _kind(self, layer: int, weights: LayerWeights, types: dict[str, str], last: bool) -> _Kind:
        groups: dict[tuple[str, int | None], int] = {}
        group_of = {}
        for stem, weight in weights.items():
            part = part_of(weight.name)
            matrix = part == "experts" or _MATRICES.match(stem)
            name = stem.split(".")[0] if matrix else "dense" if part == "dense" else "attention"
            group_of[stem] = groups.setdefault((name, self._pinned.get(weight.name)), len(groups))
        kind = _Kind(layer, weights, types, self.caches[layer], last, list(groups), group_of)
        kind.group_bytes = [0] * len(groups)
        for stem, weight in weights.items():
            kind.group_bytes[group_of[stem]] += _aligned(weight.n_bytes)
        return kind

    def _shape(self, layer: int, kv: int) -> LayerShape:
        cache, settings = self.caches[layer], self.settings
        cells = cache.cells(settings.n_ctx, settings.n_ubatch)
        heads = max(cache.n_heads_kv, 1)
        key_bytes = cells * row_bytes(settings.type_k, cache.key_width)
        value_bytes = cells * row_bytes(settings.type_v, cache.value_width) or key_bytes
        normalised = self.info.metadata.get(f"{self.info.architecture}.expert_weights_norm")
        router = _ROUTERS.get(self.info.architecture, "normalised" if normalised else "plain")
        return LayerShape(
            cache.key_width // heads,
            cache.value_width // heads,
            cache.n_heads_kv,
            key_bytes,
            value_bytes,
            cache.window is not None,
            self.info.n_experts_used,
            router,
            kv,
        )

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
    def kv_bytes(self) -> list[int]:
        """Bytes of each layer's cache."""
        settings = self.settings
        return [
            cache.n_bytes(settings.n_ctx, settings.n_ubatch, settings.type_k, settings.type_v) for cache in self.caches
        ]

    @cached_property
    def kv_bytes_read(self) -> list[int]:
        """Bytes of each layer's cache that a token reads."""
        settings = self.settings
        return [cache.bytes_read(settings.depth, settings.type_k, settings.type_v) for cache in self.caches]

    # --- time

    def takes_over(self, kv: Sequence[int], output: int, groups: Sequence[tuple[int, ...]]) -> int | None:
        """Return the GPU that computes large batches with what lies in the CPU's memory, if one does."""
        order = self.used(kv, output, groups)
        return next((device for device in order if self.devices[device].copies_host_weights), None)

    def used(self, kv: Sequence[int], output: int, groups: Sequence[tuple[int, ...]]) -> list[int]:
        """Return the GPUs on which anything lies, in llama.cpp's order."""
        runs = list(dict.fromkeys(device for device in (*kv, output) if device != self.cpu))
        more = {device for layer in set(groups) for device in layer if device != self.cpu} - set(runs)
        return [*runs, *sorted(more)]

    def layer_cost(
        self, layer: int, kv: int, devices: tuple[int, ...], following: int, taker: int | None
    ) -> _LayerCost:
        """Return what decoding costs in a layer; ``following`` is where the next layer is, or the output."""
        kind = self.kinds[layer]
        key = (id(kind), kv, devices, following, taker)
        if key not in self._costs:
            self._costs[key] = self._layer_cost(kind, kv, devices, following, taker)
        return self._costs[key]

    def _layer_cost(
        self, kind: _Kind, kv: int, devices: tuple[int, ...], following: int, taker: int | None
    ) -> _LayerCost:
        if kind.step is None:
            ending = ("rope_freqs", *(("output", "output_norm") if kind.last else ()))
            head = {name: weight for name, weight in self.head.items() if name in ending}
            shape = self._shape(kind.index, 0)
            kind.step = build_step(1, [(kind.index, kind.weights, shape)], head, self._inputs)
            if not kind.last:
                end = Node("end", (1,))
                end.forced = -1
                kind.step.nodes.append(end)
        names = {weight.name: kind.group_of[stem] for stem, weight in kind.weights.items()}

        def device_of_weight(name: str) -> int:
            return devices[names[name]] if name in names else following

        assign(
            kind.step,
            self.cpu,
            device_of_weight,
            lambda layer: following if layer == -1 else kv,
            forces=True,
            takes_over=taker,
        )
        terms: defaultdict[tuple[int, str], float] = defaultdict(float)
        read_from_cpu = 0
        found = pieces(kind.step)
        if not kind.last:
            # The next layer's; it may be alone.
            found[-1].nodes.pop()
            found = found if found[-1].nodes else found[:-1]
        left = set(names)
        for piece in found:
            device = self.devices[piece.device]
            for node in piece.nodes:
                if node.op == "view":
                    continue
                terms[piece.device, "operations"] += device.op_s
                if node.op == "flash_attn":
                    self._attending(kind, kv, piece.device, terms)
                    continue
                weight = next((source for source in node.sources if source.op == "weight"), None)
                if weight is None:
                    continue
                name = str(weight.weight)
                left.discard(name)
                part, n_bytes, rate = self._reading(kind, name, piece.device, node.op)
                terms[piece.device, part] += n_bytes / rate
                read_from_cpu += n_bytes if piece.device == self.cpu else 0
        for piece in found[1:]:
            terms[piece.device, "hops"] += self.devices[piece.device].hop_s
        # What the graph in outline does not use is read all the same.
        for name in sorted(left):
            place = devices[names[name]]
            part, n_bytes, rate = self._reading(kind, name, place, "mul_mat")
            terms[place, part] += n_bytes / rate
            read_from_cpu += n_bytes if place == self.cpu else 0
        if kind.cache.state_bytes and not kind.cache.key_width:
            terms[kv, "kv"] += self.kv_bytes_read[kind.index] / self.devices[kv].bandwidth_bytes_per_s
        ends = [piece.device for piece in found] or [kv]
        return _LayerCost(sum(terms.values()), ends[0], ends[-1], len(ends) - 1, read_from_cpu, tuple(terms.items()))

    def _attending(self, kind: _Kind, kv: int, device: int, terms: defaultdict[tuple[int, str], float]) -> None:
        """Add the time of attention to a KV cache."""
        n_bytes, place = self.kv_bytes_read[kind.index], self.devices[kv]
        terms[kv, "kv"] += n_bytes / self.devices[device].rate(f"{self.settings.type_k}:kv")
        if kv != device:
            gpu = place if place.kind == "gpu" else self.devices[device]
            terms[device, "hops"] += n_bytes / gpu.link_bytes_per_s

    def _reading(self, kind: _Kind, name: str, device: int, operation: str) -> tuple[str, int, float]:
        """Return part, bytes that are read of a weight, and the rate at which they are."""
        stem = name.split(".", 2)[2] if name.startswith("blk.") else ""
        weight = kind.weights.get(stem) or self.head[name.removesuffix(".weight")]
        type_name = kind.types.get(stem) or self._head_types[name.removesuffix(".weight")]
        part, n_bytes, spec = part_of(name) if stem else "output", weight.n_bytes, self.devices[device]
        if part == "experts":
            n_bytes = n_bytes * self.info.n_experts_used // max(self.info.n_experts, 1)
        if operation == "mul_mat_id":
            # Without a rate for a choice of experts, the one for whole matrices is nearest.
            return part, n_bytes, spec.rates.get(f"{type_name}:experts", spec.rate(type_name))
        return part, n_bytes, spec.rate(type_name) if operation == "mul_mat" else spec.bandwidth_bytes_per_s

    # --- all of it

    def weights_bytes(self, layer: int, devices: tuple[int, ...]) -> tuple[int, ...]:
        """Return the bytes of a layer's weights on each device."""
        kind = self.kinds[layer]
        key = (id(kind), devices)
        if key not in self._weights:
            sizes = [0] * len(self.devices)
            for device, n_bytes in zip(devices, kind.group_bytes, strict=True):
                sizes[device] += n_bytes
            self._weights[key] = tuple(sizes)
        return self._weights[key]

    def costs(self, arranged: Arrangement) -> list[_LayerCost]:
        """Return the cost of each layer that is computed, the output's with the last."""
        kv, groups, output = arranged.kv, arranged.groups, arranged.output
        taker = self.takes_over(kv, output, groups)
        following = [*kv[1 : self.n_computed], output]
        return [
            self.layer_cost(layer, kv[layer], groups[layer], following[layer], taker)
            for layer in range(self.n_computed)
        ]

    def head_bytes(self, arranged: Arrangement) -> list[int]:
        """Return the bytes of what is in no layer on each device."""
        sizes = [0] * len(self.devices)
        sizes[arranged.output] += self.fixed_bytes["output"]
        sizes[arranged.embedding] += self.fixed_bytes["embedding"]
        sizes[arranged.kv[0] if arranged.kv else self.cpu] += self.fixed_bytes["other"]
        if self.tied and arranged.output != arranged.embedding:
            sizes[arranged.output] += _aligned(self.head["token_embd"].n_bytes)
        return sizes

    def evaluate(self, arranged: Arrangement) -> Use:
        """Return time and bytes of an arrangement."""
        weights = self.head_bytes(arranged)
        caches = [0] * len(self.devices)
        for layer, (kv, devices) in enumerate(zip(arranged.kv, arranged.groups, strict=True)):
            caches[kv] += self.kv_bytes[layer]
            for device, n_bytes in enumerate(self.weights_bytes(layer, devices)):
                weights[device] += n_bytes
        costs = self.costs(arranged)
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

    def page_fault_s(self, weights: Sequence[int], caches: Sequence[int], costs: Sequence[_LayerCost]) -> float:
        """Return the seconds that a token waits for weights that have no place in RAM."""
        here = weights[self.cpu]
        missing = here + caches[self.cpu] - self.devices[self.cpu].memory_bytes
        if missing <= 0 or here == 0:
            return 0.0
        share = min(1.0, missing / here)
        return share * sum(cost.read_from_cpu for cost in costs) / _PAGE_FAULT_BYTES_PER_S

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
        key = (
            tuple((id(self.kinds[layer]), arranged.kv[layer], arranged.groups[layer]) for layer in layers),
            arranged.output,
            arranged.embedding,
        )
        if key not in self._compute:
            self._compute[key] = self._computing(arranged, layers)
        return self._compute[key]

    def _outline(self, arranged: Arrangement) -> list[int]:
        """Return a few layers in which everything happens that happens anywhere."""
        chosen: list[int] = []
        seen: Counter[object] = Counter()
        previous: object = None
        for layer in range(self.n_computed):
            here = (arranged.kv[layer], arranged.groups[layer])
            if here != previous:
                seen.clear()
            previous = here
            seen[id(self.kinds[layer])] += 1
            if seen[id(self.kinds[layer])] <= 3 or layer == self.n_computed - 1:
                chosen.append(layer)
        return chosen

    def _computing(self, arranged: Arrangement, layers: Sequence[int]) -> list[int]:
        settings = self.settings
        n_tokens = min(padded_context(settings.n_ctx), settings.n_ubatch)
        chosen = [(layer, self._named(layer), self._shape(layer, arranged.kv[layer])) for layer in layers]
        head = dict(self.head)
        if self.info.architecture.startswith(_SCALED_EMBEDDING) and "token_embd" in head:
            head["scaled"] = head["token_embd"]
        step = build_step(n_tokens, chosen, head, self._inputs)
        names = {}
        for layer, weights, _ in chosen:
            kind = self.kinds[layer]
            for stem, weight in weights.items():
                names[weight.name] = arranged.groups[layer][kind.group_of[stem]]
        names["token_embd.weight"] = arranged.embedding

        def device_of_weight(name: str) -> int:
            return names.get(name, arranged.output)

        whole = self.cpu not in arranged.kv and arranged.output != self.cpu
        assign(
            step,
            self.cpu,
            device_of_weight,
            lambda layer: arranged.kv[layer],
            forces=whole or n_tokens < OFFLOAD_TOKENS,
            takes_over=self.takes_over(arranged.kv, arranged.output, arranged.groups),
        )
        return compute_bytes(step, len(self.devices))

    def _named(self, layer: int) -> LayerWeights:
        """Return the weights of a layer by their own names, which those of its kind are not."""
        kind = self.kinds[layer]
        return {
            stem: Weight(f"blk.{layer}.{stem}", weight.shape, weight.n_bytes) for stem, weight in kind.weights.items()
        }


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


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
