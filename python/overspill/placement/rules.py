"""The rules in a mapping from parts, layers or patterns to devices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from overspill.base.checks import shown
from overspill.placement.layer_numbers import parse_numbers
from overspill.placement.outline import PARTS

__all__ = ["Rule", "mapping_rules"]


class Rule(NamedTuple):
    """One entry of a mapping: a device for ``parts`` of ``layers``, or for the tensors that ``pattern`` finds."""

    layers: tuple[int, ...] | None
    """None: all layers."""
    parts: tuple[str, ...]
    """Of :data:`PARTS`, ``"output"`` or ``"embedding"``; empty if there is a pattern."""
    pattern: str | None
    device: str


def mapping_rules(mapping: Mapping[str, Any], n_layers: int) -> list[Rule]:
    """Return the rules in ``mapping``, in its order; :meth:`overspill.Placement.apply` describes the keys.

    Raises
    ------
    ValueError
        A key has another form, or names a layer from ``n_layers`` on.
    TypeError
        A key or a device is no text.
    """
    rules: list[Rule] = []
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise TypeError(f"the keys of a placement must be strings, not {shown(key)}")
        if isinstance(value, Mapping):
            for part, device in value.items():
                rules += mapping_rules({f"{key} {part}": device}, n_layers)
            continue
        if not isinstance(value, str):
            raise TypeError(f"{key:.80}: the device must be a string, not {shown(value)}")
        if len(key) > 2 and key[0] == key[-1] == "/":
            rules.append(Rule(None, (), key[1:-1], value))
            continue
        found = re.fullmatch(r"(?:layers? +(?P<layers>\d[\d, -]*))?(?P<part>[a-z]+)?", key.strip())
        part = found["part"] if found else None
        if not found or not key.strip() or part not in (None, *PARTS, "output", "embedding"):
            raise ValueError(
                f"{shown(key)} must be one of {', '.join(PARTS)}, output, embedding, "
                '"layers 0-9", "layers 0-9 experts" or a regular expression as "/ffn_down/"'
            )
        layers = None if found["layers"] is None else tuple(parse_numbers(key, found["layers"], n_layers))
        rules.append(Rule(layers, PARTS if part is None else (part,), None, value))
    return rules
