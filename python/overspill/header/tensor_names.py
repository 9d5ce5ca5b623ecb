"""The names of tensors, which tell the layer and the part of the model."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, TypeAlias

__all__ = ["Part", "layer_of", "part_of"]

Part: TypeAlias = Literal["attention", "dense", "experts", "output", "embedding", "other"]

# llama.cpp's names (src/llama-arch.cpp); those of layers begin behind "blk.N.". Recurrent parts count as attention, as
# they mix tokens too. Routers and shared experts are dense, since every token reads them.
_LAYER = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.")
_EXPERTS = re.compile(r"ffn_\w+_(ch)?exps\b|ffn_(gate|up|down)\.\d+\.")
_DENSE = re.compile(r"ffn_|post_ffw|pre_ffw|channel_mix|exp_probs")
_OUTPUT = re.compile(r"output(_norm)?\b|cls\b|cls\.")
_EMBEDDING = re.compile(r"(token_embd|token_types|position_embd|per_layer_token_embd)\b")


def layer_of(tensor: str) -> int | None:
    """Return the number of the layer that the tensor of that name belongs to, or None if it belongs to none."""
    layer = _LAYER.match(tensor)
    return int(layer[1]) if layer else None


def part_of(tensor: str) -> Part:
    """Return the part of the model that the tensor of that name belongs to."""
    layer = _LAYER.match(tensor)
    return _part_of_layer(tensor[layer.end() :]) if layer else _part_outside(tensor)


# All layers have the same names behind "blk.N.".
@lru_cache(1024)
def _part_of_layer(stem: str) -> Part:
    if _EXPERTS.match(stem):
        return "experts"
    return "dense" if _DENSE.match(stem) else "attention"


def _part_outside(tensor: str) -> Part:
    if _OUTPUT.match(tensor):
        return "output"
    return "embedding" if _EMBEDDING.match(tensor) else "other"
