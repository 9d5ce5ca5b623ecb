"""What the names of tensors say: the layer, and the part of the model."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

__all__ = ["Part", "layer_of", "part_of"]


Part: TypeAlias = Literal["attention", "dense", "experts", "output", "embedding", "other"]


# llama.cpp's names (src/llama-arch.cpp). Whatever mixes tokens counts as attention, recurrent
# layers too; routers and shared experts are read for every token, so they are dense.
_PARTS: list[tuple[str, Part]] = [
    (r"blk\.\d+\.ffn_\w+_(ch)?exps\b|blk\.\d+\.ffn_(gate|up|down)\.\d+\.", "experts"),
    (r"blk\.\d+\.(ffn_|post_ffw|pre_ffw|channel_mix|exp_probs)", "dense"),
    (r"blk\.\d+\.", "attention"),
    (r"output(_norm)?\b|cls\b|cls\.", "output"),
    (r"(token_embd|token_types|position_embd|per_layer_token_embd)\b", "embedding"),
]


_LAYER = re.compile(r"(?:enc\.|dec\.)?(?=blk\.(\d+)\.)")


def layer_of(tensor: str) -> int | None:
    """Return the layer of the tensor of that name, or None if it belongs to none."""
    layer = _LAYER.match(tensor)
    return int(layer[1]) if layer else None


def part_of(tensor: str) -> Part:
    """Return what the tensor of that name is part of."""
    if layer := _LAYER.match(tensor):
        tensor = tensor[layer.end() :]
    return next((part for pattern, part in _PARTS if re.match(pattern, tensor)), "other")
