"""Values of a model's header that a caller replaces: which there are, and of what type."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeAlias, cast

from overspill.base.checks import as_mapping, as_text, shown

__all__ = ["MetadataValue", "checked_overrides"]

MetadataValue: TypeAlias = bool | int | float | str

_MOST_BYTES = 127  # of a key or a text; llama.cpp has no room for more
_NAMES: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}

# What llama.cpp reads of files that have it, and does without in others; behind the architecture's name.
_OPTIONAL: dict[str, type] = {
    **dict.fromkeys(("rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"), float),
    **dict.fromkeys(("rope.scaling.factor", "rope.scaling.alpha", "rope.scaling.attn_factor"), float),
    "rope.scaling.type": str,
    "rope.scaling.original_context_length": int,
    "rope.scaling.finetuned": bool,
    "rope.dimension_count": int,
}
_OPTIONAL_OF_TOKENIZERS: dict[str, type] = {
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix"), bool),
    "remove_extra_whitespaces": bool,
    **{f"{role}_token_id": int for role in ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask")},
    "pre": str,
}


def checked_overrides(metadata: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Return the overrides with values of the types that the header has for their keys.

    Raises
    ------
    ValueError
        A key is not the header's, and none that llama.cpp looks for besides; or a value is of another type, or out of
        range.
    TypeError
        ``overrides`` is no mapping.
    """
    given = as_mapping(
        "overrides", overrides, 'a mapping from keys of the header, such as {"llama.rope.freq_base": 1e6}'
    )
    return {key: _checked(metadata, as_text("overrides", key), value) for key, value in given.items()}


def _checked(metadata: Mapping[str, Any], key: str, value: object) -> MetadataValue:
    kind = _kind_of(metadata, key)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "ndim", 1):
        value = value.item()
    found: MetadataValue
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        found = _as_float(key, value)
    elif not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"overrides: {key} must be {_NAMES[kind]}, not {_described(value)}")
    elif isinstance(value, str):
        found = as_text(f"overrides: {key}", value)
        if len(found.encode()) > _MOST_BYTES or "\0" in found:
            raise ValueError(f"overrides: {key} must be a text of at most {_MOST_BYTES} bytes, without NUL")
    else:
        found = value if isinstance(value, bool) else int(cast(int, value))
        if not 0 <= found < 2**32:
            raise ValueError(f"overrides: {key} must be 0 to {2**32 - 1}, not {shown(found)}")
        n_vocab = metadata.get("tokenizer.ggml.tokens", {}).get("length", 2**32)
        if key.endswith("_token_id") and found >= n_vocab:
            raise ValueError(f"overrides: {key} must be a token, 0 to {n_vocab - 1}, not {found}")
    return found


def _described(value: object) -> str:
    name = _NAMES.get(type(value))
    return shown(value) if name is None else f"{name} ({shown(value)})"


def _as_float(key: str, value: float) -> float:
    """Return the number as a file has it, in 32 bits."""
    try:
        number: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"overrides: {key} must be a finite number of 32 bits, not {shown(value)}")
    return number


def _kind_of(metadata: Mapping[str, Any], key: str) -> type:
    """Return the type of a key's value, or raise what says why it has none."""
    if key.startswith(("split.", "tokenizer.chat_template")) or key in ("general.architecture", "general.alignment"):
        instead = ": set model.chat_template" if "chat_template" in key else ", which the file depends on"
        raise ValueError(f"overrides: {key} cannot be replaced{instead}")
    architecture = metadata.get("general.architecture", "unknown")
    optional = {f"{architecture}.{name}": kind for name, kind in _OPTIONAL.items()}
    optional |= {f"tokenizer.ggml.{name}": kind for name, kind in _OPTIONAL_OF_TOKENIZERS.items()}
    if key in metadata:
        kind: type = type(metadata[key])
        if kind in _NAMES and len(key.encode()) <= _MOST_BYTES:
            return kind
        raise ValueError(f"overrides: {key} cannot be replaced: it is a list, or its name is too long for llama.cpp")
    if key in optional:
        return optional[key]
    known = {*optional, *(name for name, value in metadata.items() if not isinstance(value, dict))}
    near = get_close_matches(key[:200], sorted(known), n=3)
    advice = f"did you mean {' or '.join(near)}?" if near else f"a key is such as {architecture}.rope.freq_base"
    raise ValueError(f"overrides: the model has no {key[:200]}; {advice}")
