"""The settings with which a model is loaded, as far as they are no placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from overspill.base.checks import as_integer, as_real_within, check_choice
from overspill.base.host import physical_cores
from overspill.base.units import Size, parse_bytes, parse_memory
from overspill.base.values import CacheType, Experts, Kernels, LoadMode, Switch
from overspill.header.overrides import MetadataValue
from overspill.planning.settings import DEFAULT_UBATCH

__all__ = ["LoadSettings", "checked_settings"]


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """The settings of a load, apart from the placement, by the core's names."""

    n_ctx: int
    """0 for the header's default."""
    n_parallel: int
    """Streams that are decoded together; 0: as they come."""
    prompt_cache: int
    """Bytes of RAM for the tokens of streams that lose their place."""
    max_pause_s: float
    n_batch: int
    n_ubatch: int
    n_threads: int
    adapt_threads: bool
    """Whether fewer of them decode while other programs have their cores."""
    type_k: CacheType
    type_v: CacheType
    flash_attention: Switch
    repack: Switch
    kernels: Kernels
    load_mode: LoadMode
    vocab_only: bool
    check_tensors: bool
    pin_weights: bool
    """Whether mapped weights in RAM are registered with the driver of the GPU that copies them."""
    offload_min_batch: int
    """0 for the backend's own."""
    experts: Experts
    expert_cache: Mapping[str, int]
    """Bytes by GPU, as given; empty: what the plan leaves."""
    expert_insertions: int
    """Of a token; 0: by time."""
    prompt_tokens: int
    reply_tokens: int
    chosen: frozenset[str]
    """Names of those above that the caller leaves to the plan."""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    """What the header is to say, in place of what the file does."""

    @property
    def is_mapped(self) -> bool:
        """Whether weights on the CPU are pages of the file."""
        return self.load_mode.startswith("mmap")


def checked_settings(
    *,
    n_ctx: int | None,
    n_parallel: int | None,
    prompt_cache: Size,
    max_pause_s: float,
    n_batch: int | None,
    n_ubatch: int | None,
    n_threads: int | None,
    adapt_threads: bool,
    type_k: CacheType,
    type_v: CacheType,
    flash_attention: Switch,
    repack: Switch,
    kernels: Kernels,
    load_mode: LoadMode,
    vocab_only: bool,
    check_tensors: bool,
    pin_weights: Switch,
    offload_min_batch: int | None,
    experts: Experts,
    expert_cache: Mapping[str, int | str] | None,
    expert_insertions: int | None,
    prompt_tokens: int,
    reply_tokens: int,
) -> LoadSettings:
    """Return the arguments of :class:`Model` as settings, or raise what names one and its range."""
    for name, value, choices in (
        ("type_k", type_k, CacheType),
        ("type_v", type_v, CacheType),
        ("flash_attention", flash_attention, Switch),
        ("repack", repack, Switch),
        ("kernels", kernels, Kernels),
        ("load_mode", load_mode, LoadMode),
        ("pin_weights", pin_weights, Switch),
        ("experts", experts, Experts),
    ):
        check_choice(name, value, get_args(choices))
    chosen = {"n_batch", "n_ubatch"} if n_batch is None and n_ubatch is None else set[str]()
    if n_batch is not None:
        n_batch = as_integer("n_batch", n_batch, 1, 65536)
    if n_ubatch is not None:
        n_ubatch = as_integer("n_ubatch", n_ubatch, 1, 65536 if n_batch is None else n_batch)
    chosen |= {"pin_weights"} if pin_weights == "auto" else set()
    chosen |= {"offload_min_batch"} if offload_min_batch is None else set()
    return LoadSettings(
        n_ctx=0 if n_ctx is None else as_integer("n_ctx", n_ctx, 1, 2**31 - 1),
        n_parallel=0 if n_parallel is None else as_integer("n_parallel", n_parallel, 1, 256),
        prompt_cache=parse_bytes("prompt_cache", prompt_cache),
        max_pause_s=as_real_within("max_pause_s", max_pause_s, 0.001, 3600),
        n_batch=n_batch or n_ubatch or DEFAULT_UBATCH,
        n_ubatch=n_ubatch or n_batch or DEFAULT_UBATCH,
        n_threads=physical_cores() if n_threads is None else as_integer("n_threads", n_threads, 1, 512),
        adapt_threads=adapt_threads,
        type_k=type_k,
        type_v=type_v,
        flash_attention=flash_attention,
        repack=repack,
        kernels=kernels,
        load_mode=load_mode,
        vocab_only=vocab_only,
        check_tensors=check_tensors,
        pin_weights=pin_weights == "on",
        offload_min_batch=0
        if offload_min_batch is None
        else as_integer("offload_min_batch", offload_min_batch, 1, 65536),
        experts=experts,
        expert_cache=_parsed_pools(experts, expert_cache),
        expert_insertions=0
        if expert_insertions is None
        else as_integer("expert_insertions", expert_insertions, 1, 65536),
        prompt_tokens=as_integer("prompt_tokens", prompt_tokens, 1, 2**31 - 1),
        reply_tokens=as_integer("reply_tokens", reply_tokens, 1, 2**31 - 1),
        chosen=frozenset(chosen),
    )


def _parsed_pools(experts: Experts, sizes: Mapping[str, int | str] | None) -> dict[str, int]:
    if sizes is not None and experts != "cached":
        raise ValueError(f'expert_cache is for experts="cached", not for experts="{experts}"')
    return parse_memory(sizes, "expert_cache")
