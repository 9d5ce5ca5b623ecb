"""The outline of a model that a placement keeps: the names and bytes of its tensors, and their parts."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from overspill.base.cached import cached_property
from overspill.base.checks import as_instance
from overspill.header.info import ModelInfo
from overspill.header.tensor_names import Part, layer_of, part_of

__all__ = ["PARTS", "LayerPart", "ModelOutline"]

LayerPart: TypeAlias = Literal["attention", "dense", "experts", "kv"]
PARTS: Final[tuple[LayerPart, ...]] = get_args(LayerPart)
"""The parts of a layer; ``kv`` is its KV cache, or the state that it keeps instead."""

# Besides the output's own parts, llama.cpp keeps these with it (src/llama-arch.cpp, LLM_TENSOR_LAYER_OUTPUT).
_WITH_OUTPUT = re.compile(
    r"output|cls\b|dense_[23]\b|(enc|dec)\.output_norm|altup_|nextn\.post_|(fc|d2t|conf_proj)\b|markov_w|selector_"
)


@dataclass(frozen=True)
class ModelOutline:
    """The outline of a model, enough to show a placement without the model's file."""

    architecture: str
    name: str
    n_layers: int
    tensors: dict[str, int]
    """Bytes of each tensor, by name."""

    @classmethod
    def of(cls, info: ModelInfo) -> ModelOutline:
        """Return the outline of a model from its header."""
        as_instance("info", info, ModelInfo)
        sizes = {name: n_bytes for name, _, _, n_bytes in info.tensors}
        return cls(info.architecture, info.name or info.architecture, info.n_layers, sizes)

    def __str__(self) -> str:
        """Return one phrase, such as ``gpt-oss-20b (gpt-oss, 24 layers)``."""
        # Files have given the names, and may have lines in them.
        return " ".join(f"{self.name} ({self.architecture}, {self.n_layers} layers)".split())

    def same_model(self, other: ModelOutline) -> bool:
        """Return whether both are of one architecture, with the same names and bytes of tensors."""
        return self is other or (self.architecture == other.architecture and self.tensors == other.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the architecture and of the names and bytes of tensors: 64 hexadecimal digits."""
        text = f"{self.architecture}\n" + "".join(f"{name} {n}\n" for name, n in sorted(self.tensors.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The part of the model that each tensor belongs to, by the tensor's name."""
        return {name: part_of(name) for name in self.tensors}

    @cached_property
    def layer_of(self) -> dict[str, int | None]:
        """The layer of each tensor, by the tensor's name; None outside of the layers."""
        layers = {name: layer_of(name) for name in self.tensors}
        return {name: None if layer is None or layer >= self.n_layers else layer for name, layer in layers.items()}

    @cached_property
    def layers(self) -> list[dict[str, list[str]]]:
        """For each layer, the names of its tensors by part."""
        layers: list[dict[str, list[str]]] = [{} for _ in range(self.n_layers)]
        for name, layer in self.layer_of.items():
            if layer is not None:
                layers[layer].setdefault(self.parts[name], []).append(name)
        return layers

    @cached_property
    def layer_parts(self) -> list[LayerPart]:
        """The parts that any layer has, in the order of :data:`PARTS`."""
        return [part for part in PARTS if part == "kv" or any(part in layer for layer in self.layers)]

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix as well; llama.cpp then makes a copy of it."""
        return "output.weight" not in self.tensors and "token_embd.weight" in self.tensors

    def with_output(self, name: str) -> bool:
        """Return whether llama.cpp keeps a tensor outside of the layers on the output head's device."""
        # lfm2 calls its output norm so; elsewhere that tensor is kept with the first layer.
        lfm2 = name.startswith("token_embd_norm.") and self.architecture.startswith("lfm2")
        return lfm2 or _WITH_OUTPUT.match(name) is not None
