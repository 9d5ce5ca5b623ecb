"""The outline of a model that a placement keeps: the names and bytes of its tensors."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, TypeAlias, get_args

from overspill.header.info import ModelInfo
from overspill.header.tensor_names import Part, layer_of, part_of
from overspill.placement.table import Cell

__all__ = ["PARTS", "LayerPart"]


LayerPart: TypeAlias = Literal["attention", "dense", "experts", "kv"]


PARTS: Final[tuple[LayerPart, ...]] = get_args(LayerPart)
"""What each layer consists of; ``kv`` is its KV cache, or whatever it keeps in its place."""


# Besides what is part of the output, llama.cpp keeps these with it (src/llama-arch.cpp, LLM_TENSOR_LAYER_OUTPUT).
_WITH_OUTPUT = re.compile(
    r"output|cls\b|dense_[23]\b|(enc|dec)\.output_norm|altup_|nextn\.post_|(fc|d2t|conf_proj)\b|markov_w|selector_"
)


@dataclass(frozen=True)
class _ModelOutline:
    """What a placement has to know of its model: enough to be shown without the file."""

    architecture: str
    name: str
    n_layers: int
    tensors: dict[str, int]
    """Bytes by name."""

    @classmethod
    def of(cls, info: ModelInfo) -> _ModelOutline:
        sizes = {name: n_bytes for name, _, _, n_bytes in info.tensors}
        return cls(info.architecture, info.name or info.architecture, info.n_layers, sizes)

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture}, {self.n_layers} layers)"

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart by their architecture and their tensors' names and bytes."""
        text = f"{self.architecture}\n" + "".join(f"{name} {n}\n" for name, n in sorted(self.tensors.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def parts(self) -> dict[str, Part]:
        return {name: part_of(name) for name in self.tensors}

    @cached_property
    def layer_of(self) -> Cell:
        layers = {name: layer_of(name) for name in self.tensors}
        return {name: None if layer is None or layer >= self.n_layers else layer for name, layer in layers.items()}

    @cached_property
    def layers(self) -> list[dict[str, list[str]]]:
        """Names of the tensors of each part of each layer."""
        layers: list[dict[str, list[str]]] = [{} for _ in range(self.n_layers)]
        for name, layer in self.layer_of.items():
            if layer is not None:
                layers[layer].setdefault(self.parts[name], []).append(name)
        return layers

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix too, of which llama.cpp then makes a copy."""
        return "output.weight" not in self.tensors and "token_embd.weight" in self.tensors

    def with_output(self, name: str) -> bool:
        """Whether llama.cpp keeps the tensor, which belongs to no layer, on the output head's device."""
        # lfm2 calls its output norm so; elsewhere it lies with the first layer.
        lfm2 = name.startswith("token_embd_norm.") and self.architecture.startswith("lfm2")
        return lfm2 or _WITH_OUTPUT.match(name) is not None
