"""The arguments of llama-cpp-python 0.3: all have their names, places and defaults here, and none is ignored unsaid."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overspill import ModelInfo
from overspill.compat import Llama
from overspill.compat.load_arguments import header_of, model_keywords

NEEDED = inspect.Parameter.empty
# Of their constructor: all but the first are keywords.
LOAD: dict[str, Any] = {
    "model_path": NEEDED,
    **{"n_gpu_layers": 0, "split_mode": 1, "main_gpu": 0, "tensor_split": None, "vocab_only": False},
    **{"use_mmap": True, "use_mlock": False, "kv_overrides": None, "seed": 0xFFFFFFFF, "n_ctx": 512},
    **{"n_batch": 512, "n_ubatch": 512, "n_threads": None, "n_threads_batch": None, "rope_scaling_type": -1},
    **{"pooling_type": -1, "attention_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0},
    **{"yarn_ext_factor": -1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0},
    **{"yarn_orig_ctx": 0, "logits_all": False, "embedding": False, "offload_kqv": True, "flash_attn": False},
    **{"op_offload": None, "swa_full": None, "no_perf": False, "last_n_tokens_size": 64, "lora_base": None},
    **{"lora_scale": 1.0, "lora_path": None, "numa": False, "chat_format": None, "chat_handler": None},
    **{"draft_model": None, "tokenizer": None, "type_k": None, "type_v": None, "spm_infill": False, "verbose": True},
}
SAMPLING: dict[str, Any] = {
    **{"tfs_z": 1.0, "mirostat_mode": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1},
}
COMPLETION: dict[str, Any] = {
    **{"prompt": NEEDED, "suffix": None, "max_tokens": 16, "temperature": 0.8, "top_p": 0.95, "min_p": 0.05},
    **{"typical_p": 1.0, "logprobs": None, "echo": False, "stop": [], "frequency_penalty": 0.0},
    **{"presence_penalty": 0.0, "repeat_penalty": 1.0, "top_k": 40, "stream": False, "seed": None},
    **SAMPLING,
    **{"model": None, "stopping_criteria": None, "logits_processor": None, "grammar": None, "logit_bias": None},
}
SIGNATURES: dict[str, dict[str, Any]] = {
    "__call__": COMPLETION,
    "create_completion": COMPLETION,
    "create_chat_completion": {
        **{"messages": NEEDED, "functions": None, "function_call": None, "tools": None, "tool_choice": None},
        **{"temperature": 0.2, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "typical_p": 1.0, "stream": False},
        **{"stop": [], "seed": None, "response_format": None, "max_tokens": None, "presence_penalty": 0.0},
        **{"frequency_penalty": 0.0, "repeat_penalty": 1.0, **SAMPLING, "model": None, "logits_processor": None},
        **{"grammar": None, "logit_bias": None, "logprobs": None, "top_logprobs": None},
    },
    "sample": {
        **{"top_k": 40, "top_p": 0.95, "min_p": 0.05, "typical_p": 1.0, "temp": 0.8, "repeat_penalty": 1.0},
        **{"frequency_penalty": 0.0, "presence_penalty": 0.0, "tfs_z": 1.0, "mirostat_mode": 0},
        **{"mirostat_eta": 0.1, "mirostat_tau": 5.0, "penalize_nl": True, "logits_processor": None},
        **{"grammar": None, "idx": None},
    },
    "generate": {
        **{"tokens": NEEDED, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "typical_p": 1.0, "temp": 0.8},
        **{"repeat_penalty": 1.0, "reset": True, "frequency_penalty": 0.0, "presence_penalty": 0.0, **SAMPLING},
        **{"penalize_nl": True, "logits_processor": None, "stopping_criteria": None, "grammar": None},
    },
    "tokenize": {"text": NEEDED, "add_bos": True, "special": False},
    "detokenize": {"tokens": NEEDED, "prev_tokens": None, "special": False},
    "eval": {"tokens": NEEDED},
    "set_seed": {"seed": NEEDED},
    "set_cache": {"cache": NEEDED},
    **{name: {} for name in ("reset", "n_ctx", "n_embd", "n_vocab", "token_bos", "token_eos", "token_nl", "close")},
}
SIGNATURES["from_pretrained"] = {
    **{"repo_id": NEEDED, "filename": NEEDED, "additional_files": None, "local_dir": None},
    **{"local_dir_use_symlinks": "auto", "cache_dir": None},
}

# Another value than the default, and the keyword of Model with its value that comes of it.
MAPPED: list[tuple[dict[str, Any], str, Any]] = [
    ({}, "offload", "cpu"),
    ({"n_gpu_layers": -1}, "offload", "auto"),
    ({"n_gpu_layers": 3}, "offload", 3),
    ({"n_gpu_layers": 99}, "offload", "auto"),
    ({}, "n_ctx", 512),
    ({"n_ctx": 64}, "n_ctx", 64),
    ({"n_ctx": 0}, "n_ctx", 131072),
    ({"n_batch": 1024, "n_ctx": 2048}, "n_batch", 1024),
    ({"n_batch": 1024, "n_ctx": 2048}, "n_ubatch", 512),
    ({"n_ubatch": 16}, "n_ubatch", 16),
    ({"n_batch": 32}, "n_ubatch", 32),
    ({"n_threads": 3}, "n_threads", 3),
    ({"n_threads": 3, "n_threads_batch": 3}, "n_threads", 3),
    ({"use_mmap": False}, "load_mode", "read"),
    ({"use_mlock": True}, "load_mode", "mmap+mlock"),
    ({"use_mmap": False, "use_mlock": True}, "load_mode", "mlock"),
    ({"flash_attn": True}, "flash_attention", "on"),
    ({"op_offload": False}, "offload_min_batch", 65536),
    ({"type_k": 8}, "type_k", "q8_0"),
    ({"type_v": 2}, "type_v", "q4_0"),
    ({"vocab_only": True}, "vocab_only", True),
]
# Values that ask for what there is not.
REFUSED: dict[str, Any] = {
    **{"split_mode": 2, "main_gpu": 1, "tensor_split": [0.5, 0.5], "n_threads_batch": 9, "rope_scaling_type": 2},
    **{"pooling_type": 1, "attention_type": 1, "yarn_ext_factor": 1.0, "yarn_attn_factor": 2.0},
    **{"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0, "yarn_orig_ctx": 4096, "embedding": True, "offload_kqv": False},
    **{"swa_full": True, "lora_base": "a", "lora_scale": 0.5, "lora_path": "a", "numa": True, "chat_format": "alpaca"},
    **{"chat_handler": print, "draft_model": print, "tokenizer": print, "spm_infill": True, "type_k": 99},
}
# What other tests show the effect of, and what has none by its documentation.
SHOWN = {"model_path", "seed", "logits_all", "last_n_tokens_size", "kv_overrides", "rope_freq_base", "rope_freq_scale"}
WITHOUT_EFFECT = {"verbose", "no_perf"}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function but those behind stars."""
    found = inspect.signature(function).parameters.values()
    return {one.name: one for one in found if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}


@pytest.mark.parametrize("name", SIGNATURES)
def test_calls_have_their_parameters(name: str) -> None:
    """Names, order and defaults; an empty tuple stands for their empty list."""
    ours = parameters(getattr(Llama, name))
    ours.pop("self", None)
    assert list(ours) == list(SIGNATURES[name])
    for parameter, default in SIGNATURES[name].items():
        assert ours[parameter].default == (() if default == [] else default), parameter


def test_the_constructor_has_their_parameters() -> None:
    """Names and defaults; what is behind the path are keywords."""
    ours = parameters(Llama)
    assert {name: one.default for name, one in ours.items()} == LOAD
    assert [one.name for one in ours.values() if one.kind is not one.KEYWORD_ONLY] == ["model_path"]


def test_each_argument_has_an_effect_or_is_refused() -> None:
    """Those that have none are named in the documentation."""
    mapped = {name for given, _, _ in MAPPED for name in given}
    assert mapped | REFUSED.keys() | SHOWN | WITHOUT_EFFECT == LOAD.keys()
    assert "verbose, no_perf\n        No effect" in (Llama.__doc__ or "")


@pytest.mark.parametrize(("given", "keyword", "wanted"), MAPPED)
def test_arguments_become_the_models(tiny_gpt_oss_path: Path, given: dict[str, Any], keyword: str, wanted: Any) -> None:
    """Each by its own name and values."""
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    arguments = LOAD | {"model_path": tiny_gpt_oss_path} | given
    assert header_of(arguments).n_layers == info.n_layers == 4
    assert model_keywords(arguments, info)[keyword] == wanted


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(tiny_gpt_oss_path: Path, name: str) -> None:
    """In one line, by the argument's name; its default is taken."""
    with pytest.raises(ValueError, match=rf"^{name}[ :].*[:;,] \w+") as caught:
        Llama(tiny_gpt_oss_path, **{name: REFUSED[name]})
    assert "\n" not in str(caught.value)
    with Llama(tiny_gpt_oss_path, n_ctx=32, n_threads=1, **{name: LOAD[name]}) as llm:
        assert llm.n_ctx() == 32


def test_the_header_is_changed(tiny_gpt_oss_path: Path) -> None:
    """By keys, or by the arguments that RoPE's have; a wrong one is named."""
    changes = {"kv_overrides": {"gpt-oss.expert_used_count": 2}, "rope_freq_base": 5000.0, "rope_freq_scale": 0.25}
    with Llama(tiny_gpt_oss_path, n_ctx=32, n_threads=1, **changes) as llm:  # type: ignore[arg-type]
        read = llm.model.info.metadata
        assert read["gpt-oss.expert_used_count"] == 2
        assert read["gpt-oss.rope.freq_base"] == 5000
        assert read["gpt-oss.rope.scaling.factor"] == 4
    for name, value in (("kv_overrides", {"a.b": 1}), ("kv_overrides", [1]), ("rope_freq_base", "x")):
        with pytest.raises((ValueError, TypeError), match=f"^{name}"):
            Llama(tiny_gpt_oss_path, **{name: value})  # type: ignore[arg-type]


def test_caches_have_the_types_of_the_numbers(tiny_gpt_oss_path: Path) -> None:
    """A cache of q8_0 takes about half of the memory."""

    def kv_bytes(**given: Any) -> int:
        with Llama(tiny_gpt_oss_path, n_ctx=256, n_threads=1, **given) as llm:
            return sum(use.kv_bytes for use in llm.model.memory.values())

    assert kv_bytes(type_k=8, type_v=8) < 0.6 * kv_bytes(type_k=1)
    assert kv_bytes(type_k=0, type_v=0) == 2 * kv_bytes()


def test_the_penalties_look_at_so_many_tokens(smollm2_path: Path) -> None:
    """None, and what was said is said again."""
    strong: Any = {"presence_penalty": 100.0, "temperature": 0.0, "max_tokens": 12}
    prompt = "a b c a b c a b c a b c a b c"
    said = []
    for last_n in (0, 64):
        with Llama(str(smollm2_path), n_ctx=64, n_threads=1, last_n_tokens_size=last_n) as llm:
            answer: Any = llm(prompt, **strong)
            said.append(answer["choices"][0]["text"])
    assert said[0].count(" c") > 3
    assert " c" not in said[1]


def test_unknown_names_are_refused(tiny_gpt_oss_path: Path) -> None:
    """With the nearest that there is; names of Model are known."""
    with pytest.raises(TypeError, match="'n_gpu_layer': did you mean 'n_gpu_layers'"):
        Llama(tiny_gpt_oss_path, n_gpu_layer=3)
    with Llama(tiny_gpt_oss_path, n_gpu_layers=-1, n_ctx=32, n_threads=1, offload="cpu", repack="off") as llm:
        assert set(llm.model.memory) == {"CPU"}


def test_files_that_are_missing(tmp_path: Path) -> None:
    """A ValueError, as theirs."""
    with pytest.raises(ValueError, match=r"Model path does not exist: .*missing\.gguf"):
        Llama(str(tmp_path / "missing.gguf"))


def test_theirs_is_as_it_is_written_here() -> None:
    """Where llama-cpp-python is installed, its own signatures are those above."""
    theirs = pytest.importorskip("llama_cpp").Llama
    assert {name: one.default for name, one in parameters(theirs).items()} == LOAD
    for name, wanted in SIGNATURES.items():
        found = {key: one.default for key, one in parameters(getattr(theirs, name)).items() if key != "self"}
        assert found == wanted, name


def test_it_needs_nothing_of_the_server() -> None:
    """Programs without the extra ``server`` can use it."""
    script = """
import sys
for name in ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"):
    sys.modules[name] = None
import overspill.compat
print(overspill.compat.Llama.__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "Llama\n", done.stderr
