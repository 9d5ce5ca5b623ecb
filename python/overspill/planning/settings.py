"""What a forecast depends on besides the model, the placement and the hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from overspill.base.checks import as_integer, check_choice
from overspill.base.values import LoadMode
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import CACHE_TYPES

__all__ = ["Settings", "checked_settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a forecast depends on besides the model, the placement and the hardware."""

    n_ctx: int
    """Tokens of context."""
    depth: int
    """Tokens of it that are in use while decoding."""
    n_ubatch: int = 512
    """Tokens of a prompt that are computed at once."""
    type_k: str = "f16"
    type_v: str = "f16"
    margin_bytes: int = 1 << 30
    """Left free on each GPU."""
    load_mode: LoadMode = "mmap"


def checked_settings(info: ModelInfo, **given: Any) -> Settings:
    """Return settings that are in range, with defaults for those that are missing."""
    n_ctx = given.get("n_ctx")
    if n_ctx is None:
        n_ctx = info.default_n_ctx
    n_ctx = as_integer("n_ctx", n_ctx, 1, 2**31 - 1)
    depth = given.get("depth")
    depth = n_ctx // 2 if depth is None else as_integer("depth", depth, 0, n_ctx)
    n_ubatch = as_integer("n_ubatch", given.get("n_ubatch") or 512, 1, 65536)
    for name in ("type_k", "type_v"):
        check_choice(name, given[name], CACHE_TYPES)
    margin_bytes = as_integer("margin_bytes", given["margin_bytes"], 0, 2**62)
    check_choice("load_mode", given["load_mode"], get_args(LoadMode))
    return Settings(n_ctx, depth, n_ubatch, given["type_k"], given["type_v"], margin_bytes, given["load_mode"])
