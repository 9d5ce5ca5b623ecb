"""The header of a model's file: keys, tensors, and figures that follow from them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias

from overspill._core import GgufArray, file_type_name, read_gguf
from overspill.base import html
from overspill.base.cached import cached_property
from overspill.base.checks import shown
from overspill.base.text import short_repr
from overspill.base.units import format_bytes
from overspill.header.overrides import MetadataValue, checked_overrides
from overspill.header.tensor_names import Part, layer_of, part_of
from overspill.hub import resolve
from overspill.sampling.options import SamplingOptions

__all__ = ["ModelInfo", "Tensor"]

Tensor: TypeAlias = tuple[str, str, tuple[int, ...], int]
"""Name, type, shape (the fastest dimension first) and bytes."""


@dataclass(frozen=True)
class ModelInfo:
    """The header of a GGUF file, without its weights.

    Bytes are those in the file; a device may need a little more, for alignment. A header stands for its file wherever a
    path is taken, and a model that is loaded by it does not read the header again.
    """

    metadata: dict[str, Any]
    """Every key of the header, and its value.

    An array is a dict: its ``element`` type, its ``length`` and, if it has at most 4096 numbers or flags, its
    ``values``.
    """
    tensors: list[Tensor]
    """Name, type, shape (the fastest dimension first) and bytes of each tensor, of all files."""
    files: list[str]
    """Paths of all files; more than one if the model is split."""
    file_bytes: int
    """Bytes of all files together."""
    overrides: dict[str, MetadataValue] = field(default_factory=dict)
    """What ``metadata`` has in place of the file's own values; see :meth:`with_overrides`."""

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ModelInfo:
        """Return the header of a model's file, read once.

        Parameters
        ----------
        path
            The GGUF file; of a split model, its first file. Or a name, as for :func:`overspill.hub.resolve`, or a
            header, which is returned as it is.

        Raises
        ------
        ModelLoadError
            The file is missing, damaged, or no GGUF file.
        Error
            There is no model of that name.
        ValueError, TypeError
            ``path`` is no path.
        """
        if isinstance(path, ModelInfo):
            return path
        file = read_gguf(os.fsencode(resolve(path)))
        metadata = {
            key: _array(value) if isinstance(value, GgufArray) else value for key, value in file.metadata.items()
        }
        tensors = [(tensor.name, tensor.type, tensor.shape, tensor.n_bytes) for tensor in file.tensors]
        return cls(metadata, tensors, file.files, file.n_bytes)

    def with_overrides(self, overrides: Mapping[str, MetadataValue]) -> ModelInfo:
        """Return the header with other values; plans and models that are made of it have these, the file stays.

        Parameters
        ----------
        overrides
            Values by the keys of :attr:`metadata`, such as ``{"llama.rope.freq_base": 1e6}``: of the type that the
            header has there, integers from 0 to 4294967295, texts of at most 127 bytes. Of keys that a file may leave
            out, those of ``rope`` and of ``tokenizer.ggml`` can be given.

        Raises
        ------
        ValueError
            There is no such key, or a value is out of range or of another type.
        TypeError
            ``overrides`` is no mapping.
        """
        checked = checked_overrides(self.metadata, overrides)
        return replace(self, metadata={**self.metadata, **checked}, overrides={**self.overrides, **checked})

    def __fspath__(self) -> str:
        """Return the path of the file, of a split model that of its first."""
        return self.files[0]

    @property
    def sampling(self) -> SamplingOptions:
        """The sampling that the file recommends (``general.sampling.*``), with llama.cpp's defaults for the rest."""
        return SamplingOptions.from_metadata(self.metadata.get)

    @property
    def recommends_sampling(self) -> bool:
        """Whether the file recommends any sampling."""
        return any(key.startswith("general.sampling.") for key in self.metadata)

    def _key(self, name: str) -> Any:
        """Return the value of one of the architecture's own keys."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def _count(self, name: str) -> int:
        """Return that value as a number; 0 if it is missing, or of another type in a damaged file."""
        value = self._key(name)
        return value if isinstance(value, int) else 0

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as ``gpt-oss``."""
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def name(self) -> str | None:
        """The name that the model's authors gave it."""
        return self._text("general.name")

    @property
    def licence(self) -> str | None:
        """The licence that the file states."""
        return self._text("general.license")

    @property
    def n_layers(self) -> int:
        """Number of repeating layers."""
        return self._count("block_count")

    @property
    def n_experts(self) -> int:
        """Experts in each layer; 0 for a dense model."""
        return self._count("expert_count")

    @property
    def n_experts_used(self) -> int:
        """Experts that a token uses in each layer, or in the layer that uses most."""
        used = self._key("expert_used_count")
        return max(used.get("values", ()), default=0) if isinstance(used, dict) else self._count("expert_used_count")

    @cached_property
    def expert_layers(self) -> list[int]:
        """Numbers of the layers with experts that compute tokens; others are dense, or only draft."""
        n_computed = self.n_layers - self._count("nextn_predict_layers")
        return [number for number, parts in enumerate(self.layers) if "experts" in parts and number < n_computed]

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained for; 0 if the file does not say."""
        return self._count("context_length")

    @property
    def default_n_ctx(self) -> int:
        """Tokens of context where the caller gives no number: as many as in training, at most 8192."""
        return min(self.n_ctx_train or 8192, 8192)

    @property
    def n_embd(self) -> int:
        """Width of the model: elements of a token's embedding."""
        return self._count("embedding_length")

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return int(tokens["length"]) if isinstance(tokens, dict) else self._count("vocab_size")

    @property
    def quantisation(self) -> str:
        """The type of quantisation that the file names, such as ``Q4_K_M``; ``unknown`` if it names none."""
        kind = self.metadata.get("general.file_type")
        if not isinstance(kind, int) or not 0 <= kind < 1 << 31:
            return "unknown"
        name = file_type_name(kind)
        # As files are named: Q4_K_M where llama.cpp prints "Q4_K - Medium", and no bits per weight.
        return re.sub(r" - [\d.]+ bpw.*$", "", re.sub(r" - ([SML])[a-z]+$", r"_\1", name))

    @cached_property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for _, _, shape, _ in self.tensors)

    @cached_property
    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of each type of tensor, the largest first."""
        sizes: Counter[str] = Counter()
        for _, kind, _, n_bytes in self.tensors:
            sizes[kind] += n_bytes
        return dict(sizes.most_common())

    @cached_property
    def layer_tensors(self) -> list[dict[Part, list[Tensor]]]:
        """For each repeating layer, its tensors by part."""
        layers: list[dict[Part, list[Tensor]]] = [{} for _ in range(self.n_layers)]
        for tensor in self.tensors:
            layer = layer_of(tensor[0])
            if layer is not None and layer < len(layers):
                layers[layer].setdefault(part_of(tensor[0]), []).append(tensor)
        return layers

    @cached_property
    def layers(self) -> list[dict[Part, int]]:
        """For each repeating layer, its bytes by part."""
        return [{part: sum(tensor[3] for tensor in layer[part]) for part in layer} for layer in self.layer_tensors]

    @cached_property
    def bytes_by_part(self) -> dict[Part, int]:
        """Bytes of each part; 0 for missing parts.

        A tied embedding is counted once, as the embedding.
        """
        sizes: dict[Part, int] = dict.fromkeys(("attention", "dense", "experts", "output", "embedding", "other"), 0)
        for name, _, _, n_bytes in self.tensors:
            sizes[part_of(name)] += n_bytes
        return sizes

    @cached_property
    def tied_embedding(self) -> bool:
        """Whether the embedding is the output matrix as well."""
        return not any(name == "output.weight" for name, *_ in self.tensors)

    def read_bytes(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor that decoding one token reads.

        Of experts it reads those that the token uses, of the embedding one row, and of a tied embedding everything.
        """
        if not isinstance(tensor, tuple) or len(tensor) != 4 or not isinstance(tensor[0], str):
            raise TypeError(f"tensor must be one of ModelInfo.tensors, not {shown(tensor)}")
        name, _, _, size = tensor
        part = part_of(name)
        if part == "experts" and self.n_experts:
            return size * self.n_experts_used // self.n_experts
        if part == "embedding" and not self.tied_embedding:
            return size // max(self.n_vocab, 1)
        return size

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads, of all tensors."""
        return sum(self.read_bytes(tensor) for tensor in self.tensors)

    def __str__(self) -> str:
        """Return one line: name, architecture, layers, experts, parameters, quantisation and size."""
        experts = f", {self.n_experts} experts ({self.n_experts_used} used)" if self.n_experts else ""
        size = format_bytes(self.file_bytes, digits=2, unit="GiB")
        return (
            f"{self.name or self.architecture}: {self.architecture}, {self.n_layers} layers{experts}, "
            f"{self.n_parameters / 1e9:.2f} B parameters, {self.quantisation}, {size}"
        )

    def __repr__(self) -> str:
        """Return that line in brackets."""
        return short_repr(self, str(self))

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        named = {
            "architecture": self.architecture,
            "parameters": f"{self.n_parameters / 1e9:.2f} B",
            "quantization": self.quantisation,
            "size": format_bytes(self.file_bytes),
            "layers": str(self.n_layers),
            "experts": f"{self.n_experts}, {self.n_experts_used} used" if self.n_experts else "",
            "context": f"{self.n_ctx_train} tokens",
            "licence": self.licence or "",
            "file": " + ".join(self.files),
        }
        return html.facts([fact for fact in named.items() if fact[1]], self.name or self.architecture)


def _array(array: GgufArray) -> dict[str, Any]:
    values = array.values
    described = {"element": array.element_type, "length": array.length}
    return described if values is None else {**described, "values": values}
