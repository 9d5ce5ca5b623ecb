"""A placement as JSON holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from overspill.base.checks import as_integer
from overspill.header.tensor_names import layer_of
from overspill.placement.layer_numbers import _format_numbers, _parse_numbers


def _fold_tensors(tensors: Mapping[str, int]) -> dict[str, int]:
    """Write tensors that only differ in the layer as one: ``blk.0-35.attn_q.weight``."""
    folded: dict[tuple[str, str, int], list[int]] = {}
    for name, n_bytes in tensors.items():
        layer = layer_of(name)
        before, middle, after = (name, "", "") if layer is None else name.partition(f"blk.{layer}.")
        folded.setdefault((before, after if middle else "", n_bytes), []).extend([] if layer is None else [layer])
    return {
        f"{before}blk.{_format_numbers(layers)}.{after}" if layers else before: n_bytes
        for (before, after, n_bytes), layers in folded.items()
    }


def _unfold_tensors(folded: Mapping[str, int], n_layers: int) -> dict[str, int]:
    tensors: dict[str, int] = {}
    for key, n_bytes in folded.items():
        found = re.fullmatch(r"((?:enc\.|dec\.)?blk\.)([\d,-]+)(\..+)", key)
        layers = _parse_numbers(key, found[2], n_layers) if found else []
        names = [f"{found[1]}{layer}{found[3]}" for layer in layers] if found else [key]
        tensors |= dict.fromkeys(names, as_integer(key, n_bytes, 0, 2**63 - 1))
    return tensors
