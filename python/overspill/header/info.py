"""What a model file says about itself, from its header alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

from overspill import _core
from overspill.header.tensor_names import Part, layer_of, part_of
from overspill.sampling.options import SamplingOptions

__all__ = ["ModelInfo", "Tensor"]

Tensor: TypeAlias = tuple[str, str, tuple[int, ...], int]
"""Name, type, shape (the fastest dimension first) and bytes."""


@dataclass(frozen=True)
class ModelInfo:
    """The header of a GGUF file, read without its weights.

    Bytes are those of the file; a device may need a little more, for alignment. It stands for its file wherever a path
    is taken, and a model that is loaded by it does not read the header again.
    """

    metadata: dict[str, Any]
    """Every key of the header; an array is a dict with its ``element`` type, its ``length`` and, if it has at most
    4096 numbers or flags, its ``values``."""
    tensors: list[Tensor]
    """Name, type, shape (the fastest dimension first) and bytes of each tensor, of all files."""
    files: list[str]
    """More than one if the model is split."""
    file_bytes: int
    """Size of all files."""

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ModelInfo:
        """Read the header of ``path``, of a split model its first file.

        Raises
        ------
        ModelLoadError
            The file is missing, is not a GGUF, or is damaged.
        """
        return cls(**_core.read_gguf(os.fsencode(path)))

    def __fspath__(self) -> str:
        """Return the path of the file, of a split model that of its first."""
        return self.files[0]

    @property
    def sampling(self) -> SamplingOptions:
        """What the file recommends (``general.sampling.*``), over llama.cpp's defaults."""
        return SamplingOptions.from_metadata(self.metadata.get)

    @property
    def recommends_sampling(self) -> bool:
        """Whether the file says anything about sampling."""
        return any(key.startswith("general.sampling.") for key in self.metadata)

    def _key(self, name: str, default: Any = None) -> Any:
        """Return a key of the architecture's own."""
        return self.metadata.get(f"{self.architecture}.{name}", default)

    @property
    def architecture(self) -> str:
        """llama.cpp's name for it, such as ``gpt-oss``."""
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def name(self) -> str | None:
        """The name that its authors gave it."""
        return self.metadata.get("general.name")

    @property
    def licence(self) -> str | None:
        """The licence that the file states."""
        return self.metadata.get("general.license")

    @property
    def n_layers(self) -> int:
        """Number of repeating layers."""
        return int(self._key("block_count", 0))

    @property
    def n_experts(self) -> int:
        """Experts in each layer; 0 for a dense model."""
        return int(self._key("expert_count", 0))

    @property
    def n_experts_used(self) -> int:
        """Experts that each token passes through in each layer."""
        return int(self._key("expert_used_count", 0))

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that it was trained for."""
        return int(self._key("context_length", 0))

    @property
    def default_n_ctx(self) -> int:
        """Tokens of context where nobody says how many: what it was trained for, at most 8192, as in the core."""
        return min(self.n_ctx_train or 8192, 8192)

    @property
    def n_embd(self) -> int:
        """Width of the model."""
        return int(self._key("embedding_length", 0))

    @property
    def n_vocab(self) -> int:
        """Number of tokens in its vocabulary."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return int(tokens["length"] if tokens else self._key("vocab_size", 0))

    @property
    def quantisation(self) -> str:
        """How it was quantised, as far as the file says, such as ``Q4_K_M``."""
        if "general.file_type" not in self.metadata:
            return "unknown"
        name = _core.file_type_name(self.metadata["general.file_type"])
        # As files are named: Q4_K_M where llama.cpp prints "Q4_K - Medium", and no bits per weight.
        return re.sub(r" - [\d.]+ bpw.*$", "", re.sub(r" - ([SML])[a-z]+$", r"_\1", name))

    @cached_property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for _, _, shape, _ in self.tensors)

    @cached_property
    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of each tensor type, the largest first."""
        sizes: Counter[str] = Counter()
        for _, kind, _, n_bytes in self.tensors:
            sizes[kind] += n_bytes
        return dict(sizes.most_common())

    @cached_property
    def layer_tensors(self) -> list[dict[Part, list[Tensor]]]:
        """Tensors of each part of each repeating layer."""
        layers: list[dict[Part, list[Tensor]]] = [{} for _ in range(self.n_layers)]
        for tensor in self.tensors:
            layer = layer_of(tensor[0])
            if layer is not None and layer < len(layers):
                layers[layer].setdefault(part_of(tensor[0]), []).append(tensor)
        return layers

    @cached_property
    def shared_tensors(self) -> dict[Part, list[Tensor]]:
        """Tensors of each part outside of the layers."""
        parts: dict[Part, list[Tensor]] = {}
        for tensor in self.tensors:
            if layer_of(tensor[0]) is None:
                parts.setdefault(part_of(tensor[0]), []).append(tensor)
        return parts

    @cached_property
    def layers(self) -> list[dict[Part, int]]:
        """Bytes of each part of each repeating layer."""
        return [{part: sum(tensor[3] for tensor in layer[part]) for part in layer} for layer in self.layer_tensors]

    @cached_property
    def bytes_by_part(self) -> dict[Part, int]:
        """Bytes of each part; 0 for parts that it lacks.

        Without an output matrix of its own, a model uses its embedding once more as such.
        """
        sizes: dict[Part, int] = dict.fromkeys(("attention", "dense", "experts", "output", "embedding", "other"), 0)
        for name, _, _, n_bytes in self.tensors:
            sizes[part_of(name)] += n_bytes
        return sizes

    @cached_property
    def tied_embedding(self) -> bool:
        """Whether the embedding serves as the output matrix too."""
        return not any(name == "output.weight" for name, *_ in self.tensors)

    def read_bytes(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor that decoding one token reads: of experts those used, of the embedding one row.

        An embedding that is the output matrix too is read in full.
        """
        name, _, _, size = tensor
        part = part_of(name)
        if part == "experts" and self.n_experts:
            return size * self.n_experts_used // self.n_experts
        if part == "embedding" and not self.tied_embedding:
            return size // max(self.n_vocab, 1)
        return size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads, of all tensors."""
        return sum(self.read_bytes(tensor) for tensor in self.tensors)

    def layers_that_fit(self, free_bytes: int, n_ctx: int | None = None) -> int:
        """Return how many layers fit into ``free_bytes`` of a GPU with their KV cache.

        Counted as llama.cpp's ``n_gpu_layers``: the output head is the first, the last layers come
        next. The KV cache is taken as F16 for all of ``n_ctx`` (default as :class:`Model`'s), which is
        more than sliding-window layers need.
        """
        n_ctx = n_ctx or self.default_n_ctx
        head = self._key("embedding_length", 0) // max(self._number("attention.head_count", 1), 1)
        width = self._key("attention.key_length", head) + self._key("attention.value_length", head)
        heads = self._number("attention.head_count_kv", self._number("attention.head_count", 1))
        cache_bytes = 2 * n_ctx * heads * width
        output_bytes = self.bytes_by_part["output"] + (self.bytes_by_part["embedding"] if self.tied_embedding else 0)
        needed = [output_bytes, *(sum(layer.values()) + cache_bytes for layer in reversed(self.layers))]
        n_fitting = 0
        for n_bytes in needed:
            free_bytes -= n_bytes
            if free_bytes < 0:
                break
            n_fitting += 1
        return n_fitting

    def _number(self, key: str, default: int) -> int:
        """Return a key that some models give per layer, which is not read: then ``default``."""
        value = self._key(key, default)
        return value if isinstance(value, int) else default

    def __str__(self) -> str:
        """Return one line."""
        experts = f", {self.n_experts} experts ({self.n_experts_used} used)" if self.n_experts else ""
        return (
            f"{self.name or self.architecture}: {self.architecture}, {self.n_layers} layers{experts}, "
            f"{self.n_parameters / 1e9:.2f} B parameters, {self.quantisation}, {self.file_bytes / 2**30:.2f} GiB"
        )
