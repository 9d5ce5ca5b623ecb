"""What a forecast depends on besides the model, the placement and the hardware."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

from overspill.base.checks import as_flag, as_integer, check_choice
from overspill.base.values import LoadMode
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import CACHE_TYPES
from overspill.planning.graph.schedule import OFFLOAD_TOKENS

__all__ = [
    "DEFAULT_UBATCH",
    "PROMPT_TOKENS",
    "REPLY_TOKENS",
    "Settings",
    "checked_settings",
    "is_mapped",
    "prompt_length",
]

PROMPT_TOKENS, REPLY_TOKENS = 2000, 500
"""The exchange that is planned for, unless another is asked for."""
DEFAULT_UBATCH = 512
"""Tokens of a prompt that are computed at once where nothing is planned; llama.cpp's default, too."""


@dataclass(frozen=True, slots=True, repr=False)
class Settings:
    """What a forecast depends on besides the model, the placement and the hardware."""

    n_ctx: int
    """Tokens of context."""
    depth: int
    """Tokens of it that are in use while decoding."""
    n_ubatch: int = DEFAULT_UBATCH
    """Tokens of a prompt that are computed at once."""
    type_k: str = "f16"
    type_v: str = "f16"
    margin_bytes: int = 1 << 30
    """Left free on each GPU."""
    load_mode: LoadMode = "mmap"
    prompt_tokens: int = PROMPT_TOKENS
    """Tokens of the prompt of an exchange."""
    reply_tokens: int = REPLY_TOKENS
    """Tokens of its reply."""
    pin_weights: bool = False
    """Whether mapped weights in RAM are registered with the driver of the GPU that copies them."""
    offload_min_batch: int = OFFLOAD_TOKENS
    """From so many tokens on, a GPU computes with weights in RAM; 0: whenever that is faster."""
    n_parallel: int = 1
    """KV caches of ``n_ctx`` tokens."""

    def __repr__(self) -> str:
        """Return the values that are no defaults, in a line."""
        values = ((one.name, getattr(self, one.name), one.default) for one in fields(self))
        return f"Settings({', '.join(f'{name}={value!r}' for name, value, usual in values if value != usual)})"


def prompt_length(settings: Settings) -> int:
    """Return the tokens of the prompt that the context has room for."""
    return min(settings.prompt_tokens, settings.n_ctx)


def is_mapped(settings: Settings) -> bool:
    """Return whether weights in RAM are pages of the file."""
    return settings.load_mode.startswith("mmap")


def checked_settings(info: ModelInfo, **given: Any) -> Settings:
    """Return settings that are in range, with defaults for those that are missing."""
    n_ctx = given.get("n_ctx")
    if n_ctx is None:
        n_ctx = info.default_n_ctx
    n_ctx = as_integer("n_ctx", n_ctx, 1, 2**31 - 1)
    depth = given.get("depth")
    depth = n_ctx // 2 if depth is None else as_integer("depth", depth, 0, n_ctx)
    for name in ("type_k", "type_v"):
        check_choice(name, given[name], CACHE_TYPES)
    check_choice("load_mode", given["load_mode"], get_args(LoadMode))
    least = given.get("offload_min_batch")
    return Settings(
        n_ctx,
        depth,
        as_integer("n_ubatch", DEFAULT_UBATCH if given.get("n_ubatch") is None else given["n_ubatch"], 1, 65536),
        given["type_k"],
        given["type_v"],
        as_integer("margin_bytes", given["margin_bytes"], 0, 2**62),
        given["load_mode"],
        as_integer("prompt_tokens", given.get("prompt_tokens", PROMPT_TOKENS), 1, 2**31 - 1),
        as_integer("reply_tokens", given.get("reply_tokens", REPLY_TOKENS), 1, 2**31 - 1),
        given.get("pin_weights") is not None and as_flag("pin_weights", given["pin_weights"]),
        OFFLOAD_TOKENS if least is None else as_integer("offload_min_batch", least, 0, 65536),
        1 if given.get("n_parallel") is None else as_integer("n_parallel", given["n_parallel"], 1, 256),
    )
