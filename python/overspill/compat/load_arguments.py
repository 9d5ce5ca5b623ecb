"""The arguments of ``llama_cpp.Llama`` as those of :class:`overspill.Model`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from overspill.base.checks import as_flag, as_integer, as_path, as_real_within, as_text, naming, shown
from overspill.base.values import CacheType, LoadMode
from overspill.catalogue.model_files import quantisation_in
from overspill.header.info import ModelInfo
from overspill.hub import resolve

__all__ = ["check_only_defaults", "header_of", "hub_name", "model_keywords"]

# ggml's numbers of the types that a KV cache can have.
_CACHE_TYPES: dict[int, CacheType] = {
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    20: "iq4_nl",
    30: "bf16",
}
_LOAD_MODES: dict[tuple[bool, bool], LoadMode] = {
    (True, False): "mmap",
    (True, True): "mmap+mlock",
    (False, True): "mlock",
    (False, False): "read",
}

_BY_PLACEMENT = 'offload= takes a placement, and memory={"CUDA0": "20GiB"} limits a device'
_BY_OVERRIDE = 'kv_overrides={"ARCHITECTURE.rope.scaling.type": ...} and its like replace values of the header'
_NO_EMBEDDINGS = "Overspill makes no embeddings"
_NO_ADAPTERS = "Overspill loads no adapters: merge it into the model first"
_NO_HUB_FOLDERS = "downloads go to the hub's own cache; the environment variable HF_HOME moves that"

# Of arguments without an effect here, the values that ask for nothing, the default first; and what to do instead.
_ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "split_mode": ((1,), f"models are split by layers; {_BY_PLACEMENT}"),
    "main_gpu": ((0,), _BY_PLACEMENT),
    "tensor_split": ((None,), _BY_PLACEMENT),
    "rope_scaling_type": ((-1, None), _BY_OVERRIDE),
    "pooling_type": ((-1,), _NO_EMBEDDINGS),
    "attention_type": ((-1,), _NO_EMBEDDINGS),
    "yarn_ext_factor": ((-1.0,), _BY_OVERRIDE),
    "yarn_attn_factor": ((1.0,), _BY_OVERRIDE),
    "yarn_beta_fast": ((32.0,), _BY_OVERRIDE),
    "yarn_beta_slow": ((1.0,), _BY_OVERRIDE),
    "yarn_orig_ctx": ((0,), _BY_OVERRIDE),
    "embedding": ((False,), _NO_EMBEDDINGS),
    "offload_kqv": ((True,), 'offload={"default": "gpu", "attention": "cpu"} leaves the KV cache in RAM'),
    "swa_full": ((None, False), "the cache of a sliding window is never larger than the window"),
    "lora_base": ((None,), _NO_ADAPTERS),
    "lora_scale": ((1.0,), _NO_ADAPTERS),
    "lora_path": ((None,), _NO_ADAPTERS),
    "numa": ((False,), "start the program with numactl"),
    "chat_handler": ((None,), "llm.model.chat_template = overspill.ChatTemplate(llm.model, source) sets a template"),
    "draft_model": ((None,), "Overspill drafts no tokens; overspill.Cascade asks a small model first"),
    "tokenizer": ((None,), "the file's own tokenizer is used; create_completion takes token ids, too"),
    "spm_infill": ((False,), "Overspill fills in no middle; write the model's own tokens for that into the prompt"),
    # Of from_pretrained:
    "additional_files": ((None,), "all parts of a split model are downloaded by themselves"),
    "local_dir": ((None,), _NO_HUB_FOLDERS),
    "local_dir_use_symlinks": (("auto",), _NO_HUB_FOLDERS),
    "cache_dir": ((None,), _NO_HUB_FOLDERS),
    # Of each call:
    "suffix": ((None, ""), "Overspill fills in no middle; write the model's own tokens for that into the prompt"),
    "tfs_z": ((1.0,), "llama.cpp has no tail-free sampling any more; min_p is its successor"),
    "penalize_nl": ((True,), "logit_bias of the line break's token makes it likelier"),
}


def check_only_defaults(given: Mapping[str, Any]) -> None:
    """Raise a ValueError for an argument without an effect here that has not its default."""
    for name, (allowed, advice) in _ONLY.items():
        if name in given and not any(_is(given[name], one) for one in allowed):
            raise ValueError(f"{name} must be {allowed[0]!r} here, not {shown(given[name])}: {advice}")


def _is(value: object, wanted: object) -> bool:
    return value is wanted or (isinstance(value, bool | int | float | str) and bool(value == wanted))


def header_of(given: Mapping[str, Any]) -> ModelInfo:
    """Return the header of the file, with the values that arguments put in the place of its own.

    Raises
    ------
    ValueError
        There is no such file, or a value is not of the header's type.
    Error
        The file is no GGUF, or there is no model of that name.
    """
    as_path("model_path", given["model_path"])
    with naming("model_path"):
        file = resolve(given["model_path"])
    if not os.path.exists(file):  # noqa: PTH110  # no error for a name that is too long for a file
        raise ValueError(f"Model path does not exist: {shown(os.fspath(given['model_path']))}, given as model_path")
    info = ModelInfo.from_file(file)
    values: list[tuple[str, Any]] = []
    if given["kv_overrides"] is not None:
        values.append(("kv_overrides", given["kv_overrides"]))
    base = as_real_within("rope_freq_base", given["rope_freq_base"], 0, 1e30)
    scale = as_real_within("rope_freq_scale", given["rope_freq_scale"], 0, 1e30)
    if base:
        values.append(("rope_freq_base", {f"{info.architecture}.rope.freq_base": base}))
    if scale:
        values.append(("rope_freq_scale", {f"{info.architecture}.rope.scaling.factor": 1 / scale}))
    for name, overrides in values:
        with naming(name):
            info = info.with_overrides(overrides)
    return info


def model_keywords(given: Mapping[str, Any], info: ModelInfo) -> dict[str, Any]:
    """Return the keywords of :class:`overspill.Model` that do what the arguments ask for."""
    n_ctx = as_integer("n_ctx", given["n_ctx"], 0, 2**31 - 1) or info.n_ctx_train
    n_threads = _count_or_none("n_threads", given["n_threads"])
    if _count_or_none("n_threads_batch", given["n_threads_batch"]) not in (None, n_threads):
        raise ValueError(
            f"n_threads_batch must be None or n_threads here, not {shown(given['n_threads_batch'])}: "
            "the same threads read prompts"
        )
    keywords: dict[str, Any] = {
        "n_ctx": n_ctx or None,
        "n_threads": n_threads,
        "offload": _offload(given["n_gpu_layers"], info.n_layers),
        "load_mode": _LOAD_MODES[as_flag("use_mmap", given["use_mmap"]), as_flag("use_mlock", given["use_mlock"])],
        "vocab_only": as_flag("vocab_only", given["vocab_only"]),
        "flash_attention": "on" if as_flag("flash_attn", given["flash_attn"]) else "auto",
        **{name: _cache_type(name, given[name]) for name in ("type_k", "type_v") if given[name] is not None},
    }
    n_batch, n_ubatch = (as_integer(name, given[name], 1, 2**31 - 1) for name in ("n_batch", "n_ubatch"))
    if (n_batch, n_ubatch) != (512, 512):  # the default, which leaves them to the plan
        keywords["n_batch"] = min(n_batch, n_ctx, 65536) if n_ctx else min(n_batch, 65536)
        keywords["n_ubatch"] = min(n_ubatch, keywords["n_batch"])
    if given["op_offload"] is not None and not as_flag("op_offload", given["op_offload"]):
        keywords["offload_min_batch"] = 65536
    return keywords


def hub_name(repo_id: Any, filename: Any) -> str:
    """Return the name that :func:`overspill.hub.resolve` has for a file, or a pattern of files, of a repository."""
    repository = as_text("repo_id", repo_id)
    if filename is None:
        return f"hf:{repository}"
    file = as_text("filename", filename)
    if not set("*?[") & set(file):
        return f"hf:{repository}/{file}"
    # A pattern names the quantisation, and the rest is any text.
    if not (kind := quantisation_in(re.sub(r"[*?]", "-", file))):
        raise ValueError(f"filename must be a whole name, or end as *Q4_K_M.gguf does, not {shown(file)}")
    return f"hf:{repository}:{kind}"


def _count_or_none(name: str, value: Any) -> int | None:
    return None if value is None else as_integer(name, value, 0, 512) or None


def _offload(n_gpu_layers: Any, n_layers: int) -> str | int:
    """Return what goes to the GPU: all that is faster there for -1, and for more layers than there are."""
    n = as_integer("n_gpu_layers", n_gpu_layers, -1, 2**31 - 1)
    if n == 0:
        return "cpu"
    return "auto" if n < 0 or n > n_layers else n


def _cache_type(name: str, value: Any) -> CacheType:
    number = as_integer(name, value, 0, 2**31 - 1)
    if number not in _CACHE_TYPES:
        known = ", ".join(f"{number} ({kind})" for number, kind in _CACHE_TYPES.items())
        raise ValueError(f"{name} must be the number of a type in ggml that caches can have, {known}, not {number}")
    return _CACHE_TYPES[number]
