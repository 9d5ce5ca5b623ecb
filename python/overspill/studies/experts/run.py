"""Recording which experts a model uses for a text and for what it writes after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np

from overspill._core import Error
from overspill.base.checks import as_function, as_integer, as_list, as_text, check_keywords
from overspill.base.values import (
    DEFAULT_CACHE_TYPE,
    DEFAULT_KERNELS,
    DEFAULT_LOAD_MODE,
    DEFAULT_SWITCH,
    CacheType,
    Kernels,
    LoadMode,
    Switch,
)
from overspill.engine.arguments import token_ids
from overspill.engine.model import Model
from overspill.header.info import ModelInfo
from overspill.machine.devices import devices
from overspill.planning.offload import Offload
from overspill.planning.plan import plan
from overspill.planning.prompt import NEVER_TAKEN_OVER
from overspill.sampling.options import SAMPLING_KEYWORDS, SamplingKeywords
from overspill.studies.experts.trace import ExpertTrace

__all__ = ["trace_experts"]


def trace_experts(
    path: str | os.PathLike[str],
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_tokens: int = 256,
    n_ctx: int | None = None,
    n_batch: int | None = None,
    n_ubatch: int | None = None,
    n_threads: int | None = None,
    type_k: CacheType = DEFAULT_CACHE_TYPE,
    type_v: CacheType = DEFAULT_CACHE_TYPE,
    flash_attention: Switch = DEFAULT_SWITCH,
    kernels: Kernels = DEFAULT_KERNELS,
    load_mode: LoadMode = DEFAULT_LOAD_MODE,
    progress: Callable[[str, float], object] | None = None,
    **keywords: Unpack[SamplingKeywords],
) -> ExpertTrace:
    """Return which experts each layer of a mixture used, for the tokens of prompts and of the replies to them.

    All experts are loaded into RAM, where they are seen; a GPU gets the rest. Recording them takes less than a
    hundredth of a token's time.

    Parameters
    ----------
    path
        A GGUF file, or ``hf:OWNER/REPOSITORY/FILE.gguf``.
    prompts
        A text; or several requests, each a text or token ids.
    max_tokens
        Tokens to decode after each prompt, from 0; fewer if the model ends its reply or the context is full.
    n_ctx, n_batch, n_ubatch, n_threads, type_k, type_v, flash_attention, kernels, load_mode
        As for :class:`Model`.
    progress
        Called with the current step, in words, and the share of all steps that are done, 0.0 to 1.0.
    **keywords
        Fields of :class:`SamplingOptions`, such as ``temperature=0.7``.

    Raises
    ------
    Error
        The model has no experts; otherwise as for :class:`Model`.
    ContextFullError
        A prompt does not fit into ``n_ctx``.
    ValueError, TypeError
        As for :class:`Model` and :meth:`Model.stream`; or there are no prompts.
    """
    n = as_integer("max_tokens", max_tokens, 0, 2**31 - 1)
    what = "texts or lists of token ids"
    requests: list[Any] = [prompts] if isinstance(prompts, str) else as_list("prompts", prompts, what)
    if not requests:
        raise ValueError("prompts must be at least one")
    for number, prompt in enumerate(requests):
        name = "prompts" if isinstance(prompts, str) else f"prompts[{number}]"
        requests[number] = as_text(name, prompt) if isinstance(prompt, str) else token_ids(name, prompt)
    check_keywords(keywords, SAMPLING_KEYWORDS)
    show = (lambda what, share: None) if progress is None else as_function("progress", progress)
    info = ModelInfo.from_file(path)
    if not info.expert_layers:
        raise Error(f"{info.name or info.architecture} has no experts: only a mixture of experts has")
    show("loading", 0.0)
    offload: Offload = "cpu"
    if any(device.is_gpu for device in devices()):
        offload = plan(
            info,
            n_ctx=n_ctx,
            n_ubatch=n_ubatch or n_batch,
            type_k=type_k,
            type_v=type_v,
            pins={"experts": "cpu"},
            offload_min_batch=NEVER_TAKEN_OVER,
        )
    loading: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_batch": n_batch,
        "n_ubatch": n_ubatch,
        "n_threads": n_threads,
        "type_k": type_k,
        "type_v": type_v,
        "flash_attention": flash_attention,
        "kernels": kernels,
        "load_mode": load_mode,
    }
    routes, n_prompt = [], []
    with Model(info, offload=offload, offload_min_batch=NEVER_TAKEN_OVER, **loading) as model:
        for number, prompt in enumerate(requests):
            request = f"request {number + 1} of {len(requests)}"
            show(f"{request}: reading the prompt", number / len(requests))
            # A token is decoded when the next one is asked for.
            with model.stream(prompt, max_tokens=min(n + 1, 2**31 - 1), experts=True, **keywords) as stream:
                for i, _ in enumerate(stream):
                    if i % 16 == 0:
                        show(f"{request}: decoding", (number + i / (n + 1)) / len(requests))
                stats = stream.stats
            # Without what may have been decoded ahead of an end.
            found = stream.read_experts()[: stats.prompt_tokens + max(0, stats.tokens - 1)]
            routes.append(np.ascontiguousarray(found))
            n_prompt.append(stats.prompt_tokens)
    show("done", 1.0)
    name = info.name or info.architecture
    return ExpertTrace(tuple(routes), tuple(n_prompt), info.n_experts, tuple(info.expert_layers), name)
