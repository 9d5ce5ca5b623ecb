"""The layers of a model by kind: layers of one kind cost alike, so that each kind is looked at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from overspill._core import ModelLoadError
from overspill.header.info import ModelInfo, Tensor
from overspill.header.kv_cache import LayerCache
from overspill.header.tensor_names import Part, layer_of, part_of
from overspill.planning.graph.nodes import Weight

__all__ = ["LayerKind", "ModelTensors", "aligned"]

_ALIGNMENT = 128  # of each tensor, in bytes: CUDA's
_MATRICES = re.compile(r"ffn_(gate|up|down|gate_up)\.(weight|bias|scale)$")


def aligned(n_bytes: int) -> int:
    """Return the bytes that a tensor takes on a device."""
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(eq=False)
class LayerKind:
    """Layers that are alike in all that costs anything."""

    index: int
    """The first of them."""
    weights: Mapping[str, Weight]
    """By what follows ``blk.N.`` in their names; the names themselves are those of the first layer."""
    parts: Mapping[str, Part]
    """By the names."""
    cache: LayerCache
    last: bool
    """Whether the output follows."""
    groups: list[tuple[str, int | None]]
    """Names, and the device that it is pinned to. Tensors of a group go together."""
    group_of: Mapping[str, int]
    """By the names."""
    group_bytes: list[int]

    def is_matrix_group(self, group: int) -> bool:
        """Return whether it is one of the large tensors, of which a layer may have some here and some there."""
        return self.groups[group][0] not in ("attention", "dense")


class ModelTensors:
    """The tensors of a model: the kinds of its layers, and what belongs to no layer.

    Parameters
    ----------
    info
        The model.
    caches
        What each layer keeps between tokens.
    n_computed
        The number of layers that llama.cpp computes; it leaves the weights of those behind them alone.
    pinned
        The number of a device for each tensor that must be there.

    Raises
    ------
    ValueError
        There are no layers with weights.
    """

    def __init__(
        self, info: ModelInfo, caches: Sequence[LayerCache], n_computed: int, pinned: Mapping[str, int]
    ) -> None:
        """Look through the header."""
        self.types = {name: type_name for name, type_name, _, _ in info.tensors}
        """Of tensors by name, of the copy of a tied embedding too."""
        self.head: dict[str, Weight] = {}
        """What belongs to no layer, by name without ``.weight``; ``output`` may be a copy of the embedding."""
        self.fixed_bytes = Counter[str]()
        """Of it, by ``output``, ``embedding`` and ``other``."""
        layers: list[dict[str, Tensor]] = [{} for _ in caches]
        has_layers = False
        for tensor in info.tensors:
            name, _, shape, n_bytes = tensor
            layer = layer_of(name)
            if layer is not None and layer >= len(layers):
                layer = None
            has_layers = has_layers or layer is not None
            if layer is not None and name.startswith("blk."):
                layers[layer][name.split(".", 2)[2]] = tensor
            else:
                self.head[name.removesuffix(".weight")] = Weight(name, shape, n_bytes)
                part = part_of(name)
                self.fixed_bytes[part if part in ("output", "embedding") else "other"] += aligned(n_bytes)
        if not has_layers:
            raise ModelLoadError(f"{info.files[0]}: has no layers with weights that could be placed")
        if n_computed < 1:
            raise ModelLoadError(
                f"{info.files[0]}: all of its {info.n_layers} layers only draft: nothing can be planned"
            )
        self.tied = "output" not in self.head and "token_embd" in self.head
        """Whether the output is a copy of the embedding."""
        if self.tied:
            embedding = self.head["token_embd"]
            self.head["output"] = Weight("output.weight", embedding.shape, embedding.n_bytes)
            self.types["output.weight"] = self.types[embedding.name]
        self.kinds: list[LayerKind] = []
        """Of each layer."""
        known: dict[object, LayerKind] = {}
        for index, tensors in enumerate(layers):
            computed = tensors if index < n_computed else {}
            is_last = index == n_computed - 1
            alike = tuple((stem, shape, type_name) for stem, (_, type_name, shape, _) in computed.items())
            pins = tuple(pinned.get(name) for name, *_ in computed.values()) if pinned else ()
            key = (alike, pins, caches[index], is_last)
            if key not in known:
                known[key] = _kind(index, computed, caches[index], pinned, last=is_last)
            self.kinds.append(known[key])


def _kind(
    index: int, tensors: Mapping[str, Tensor], cache: LayerCache, pinned: Mapping[str, int], *, last: bool
) -> LayerKind:
    groups: dict[tuple[str, int | None], int] = {}
    weights = {stem: Weight(name, shape, n_bytes) for stem, (name, _, shape, n_bytes) in tensors.items()}
    parts = {weight.name: part_of(weight.name) for weight in weights.values()}
    group_of = {}
    for stem, weight in weights.items():
        part = parts[weight.name]
        matrix = part == "experts" or _MATRICES.match(stem)
        group = stem.split(".")[0] if matrix else "dense" if part == "dense" else "attention"
        group_of[weight.name] = groups.setdefault((group, pinned.get(weight.name)), len(groups))
    group_bytes = [0] * len(groups)
    for weight in weights.values():
        group_bytes[group_of[weight.name]] += aligned(weight.n_bytes)
    return LayerKind(index, weights, parts, cache, last, list(groups), group_of, group_bytes)
