"""Write the headers of large models: true shapes, types and sizes, and a hole where the weights would be.

``python -m header_files NAME FILE [--vocabulary]`` writes one from the command line, and
``python -m header_files gpt-oss-20b-6-layers FILE`` 3.7 GB of a model that runs, with random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from model_files import VOCABULARY, gpt2_vocabulary

# As many as in the files of the real gpt-oss.
GPT_OSS_VOCABULARY, GPT_OSS_MERGES = 201_088, 446_189

Shapes = dict[str, tuple[tuple[int, ...], Type]]
Routes = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights. Shapes are numpy's: the contiguous dimension is the last."""

    architecture: str
    n_vocab: int
    keys: dict[str, Any]  # without the architecture's name in front
    tensors: Shapes

    @property
    def tensor_bytes(self) -> int:
        """The bytes of all weights."""
        return sum(n_bytes(*tensor) for tensor in self.tensors.values())


def n_bytes(shape: tuple[int, ...], kind: Type) -> int:
    """Return the size of a tensor, from its type's bytes per block."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert shape[-1] % block == 0, (shape, kind)
    return int(np.prod(shape)) // block * block_bytes


def gpt_oss(
    n_layers: int,
    n_experts: int,
    n_vocab: int = GPT_OSS_VOCABULARY,
    *,
    n_used: int = 4,
    width: int = 2880,
    expert_width: int = 2880,
    n_heads: int = 64,
    n_heads_kv: int = 8,
) -> Header:
    """Return gpt-oss: MXFP4 experts, Q8_0 for the other matrices, F32 for the router and all vectors."""
    head_width = 64
    tensors: Shapes = {
        "token_embd.weight": ((n_vocab, width), Type.Q8_0),
        "output_norm.weight": ((width,), Type.F32),
        "output.weight": ((n_vocab, width), Type.Q8_0),
    }
    for layer in range(n_layers):
        block: Shapes = {
            "attn_norm.weight": ((width,), Type.F32),
            "post_attention_norm.weight": ((width,), Type.F32),
            "attn_q.weight": ((n_heads * head_width, width), Type.Q8_0),
            "attn_q.bias": ((n_heads * head_width,), Type.F32),
            "attn_k.weight": ((n_heads_kv * head_width, width), Type.Q8_0),
            "attn_k.bias": ((n_heads_kv * head_width,), Type.F32),
            "attn_v.weight": ((n_heads_kv * head_width, width), Type.Q8_0),
            "attn_v.bias": ((n_heads_kv * head_width,), Type.F32),
            "attn_output.weight": ((width, n_heads * head_width), Type.Q8_0),
            "attn_output.bias": ((width,), Type.F32),
            "attn_sinks.weight": ((n_heads,), Type.F32),
            "ffn_gate_inp.weight": ((n_experts, width), Type.F32),
            "ffn_gate_inp.bias": ((n_experts,), Type.F32),
        }
        for part, n_in, n_out in (
            ("gate", width, expert_width),
            ("up", width, expert_width),
            ("down", expert_width, width),
        ):
            block[f"ffn_{part}_exps.weight"] = ((n_experts, n_out, n_in), Type.MXFP4)
            block[f"ffn_{part}_exps.bias"] = ((n_experts, n_out), Type.F32)
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    keys = {
        "context_length": 131072,
        "embedding_length": width,
        "block_count": n_layers,
        "feed_forward_length": expert_width,
        "expert_feed_forward_length": expert_width,
        "expert_count": n_experts,
        "expert_used_count": n_used,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_heads_kv,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 128,
        "rope.freq_base": 150000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
    }
    return Header("gpt-oss", n_vocab, keys, tensors)


def more_bits(layer: int, n_layers: int) -> Type:
    """Return the type that Q4_K_M files have where some layers get more bits than others."""
    eighth = n_layers // 8
    more = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
    return Type.Q6_K if more else Type.Q4_K


def dense(
    architecture: str,
    *,
    n_layers: int,
    width: int,
    ffn_width: int,
    n_heads: int,
    n_heads_kv: int,
    n_vocab: int,
    n_ctx: int,
    rope_freq_base: float,
    sliding_window: int = 0,
) -> Header:
    """Return a dense model as a Q4_K_M file holds it: Llama 3, Qwen 3 or Gemma 3."""
    head_width, gemma = 128, architecture == "gemma3"
    tensors: Shapes = {
        "token_embd.weight": ((n_vocab, width), Type.Q6_K if gemma else Type.Q4_K),
        "output_norm.weight": ((width,), Type.F32),
    }
    if not gemma:  # its output head is the embedding
        tensors["output.weight"] = ((n_vocab, width), Type.Q6_K)
    if architecture == "llama":
        tensors["rope_freqs.weight"] = ((head_width // 2,), Type.F32)
    for layer in range(n_layers):
        more = more_bits(layer, n_layers)
        block: Shapes = {
            "attn_norm.weight": ((width,), Type.F32),
            "attn_q.weight": ((n_heads * head_width, width), Type.Q4_K),
            "attn_k.weight": ((n_heads_kv * head_width, width), Type.Q4_K),
            "attn_v.weight": ((n_heads_kv * head_width, width), more),
            "attn_output.weight": ((width, n_heads * head_width), Type.Q4_K),
            "ffn_norm.weight": ((width,), Type.F32),
            "ffn_gate.weight": ((ffn_width, width), Type.Q4_K),
            "ffn_up.weight": ((ffn_width, width), Type.Q4_K),
            "ffn_down.weight": ((width, ffn_width), more),
        }
        if architecture in ("qwen3", "gemma3"):
            block |= {f"attn_{part}_norm.weight": ((head_width,), Type.F32) for part in "qk"}
        if gemma:
            block |= {f"post_{part}_norm.weight": ((width,), Type.F32) for part in ("attention", "ffw")}
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    keys = {
        "context_length": n_ctx,
        "embedding_length": width,
        "block_count": n_layers,
        "feed_forward_length": ffn_width,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_heads_kv,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": rope_freq_base,
    }
    if sliding_window:
        keys["attention.sliding_window"] = sliding_window
    return Header(architecture, n_vocab, keys, tensors)


def of_type(header: Header, kind: Type) -> Header:
    """Return a header whose K-quants are of another type."""
    tensors = {
        name: (shape, kind if stored in (Type.Q4_K, Type.Q6_K) else stored)
        for name, (shape, stored) in header.tensors.items()
    }
    return replace(header, tensors=tensors)


def deepseek_v3() -> Header:
    """Return DeepSeek V3: latent attention, 3 dense layers, then 256 experts and a shared one."""
    n_layers, n_dense, width, ffn_width, n_vocab = 61, 3, 7168, 18432, 129280
    n_heads, q_rank, kv_rank, key_width, rope_width, value_width = 128, 1536, 512, 128, 64, 128
    n_experts, expert_width = 256, 2048
    tensors: Shapes = {
        "token_embd.weight": ((n_vocab, width), Type.Q4_K),
        "output_norm.weight": ((width,), Type.F32),
        "output.weight": ((n_vocab, width), Type.Q6_K),
    }
    for layer in range(n_layers):
        more = more_bits(layer, n_layers)
        block: Shapes = {
            "attn_norm.weight": ((width,), Type.F32),
            "attn_q_a.weight": ((q_rank, width), Type.Q4_K),
            "attn_q_a_norm.weight": ((q_rank,), Type.F32),
            "attn_q_b.weight": ((n_heads * (key_width + rope_width), q_rank), Type.Q4_K),
            "attn_kv_a_mqa.weight": ((kv_rank + rope_width, width), Type.Q4_K),
            "attn_kv_a_norm.weight": ((kv_rank,), Type.F32),
            # A K-quant needs rows of 256.
            "attn_k_b.weight": ((n_heads, kv_rank, key_width), Type.Q8_0),
            "attn_v_b.weight": ((n_heads, value_width, kv_rank), Type.Q8_0),
            "attn_output.weight": ((width, n_heads * value_width), Type.Q4_K),
            "ffn_norm.weight": ((width,), Type.F32),
        }
        if layer < n_dense:
            block |= {
                "ffn_gate.weight": ((ffn_width, width), Type.Q4_K),
                "ffn_up.weight": ((ffn_width, width), Type.Q4_K),
                "ffn_down.weight": ((width, ffn_width), more),
            }
        else:
            block |= {
                "ffn_gate_inp.weight": ((n_experts, width), Type.F32),
                "exp_probs_b.bias": ((n_experts,), Type.F32),
                "ffn_gate_exps.weight": ((n_experts, expert_width, width), Type.Q4_K),
                "ffn_up_exps.weight": ((n_experts, expert_width, width), Type.Q4_K),
                "ffn_down_exps.weight": ((n_experts, width, expert_width), more),
                "ffn_gate_shexp.weight": ((expert_width, width), Type.Q4_K),
                "ffn_up_shexp.weight": ((expert_width, width), Type.Q4_K),
                "ffn_down_shexp.weight": ((width, expert_width), more),
            }
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    keys = {
        "context_length": 163840,
        "embedding_length": width,
        "block_count": n_layers,
        "leading_dense_block_count": n_dense,
        "feed_forward_length": ffn_width,
        "expert_feed_forward_length": expert_width,
        "expert_count": n_experts,
        "expert_used_count": 8,
        "expert_shared_count": 1,
        "expert_group_count": 8,
        "expert_group_used_count": 4,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
        "attention.head_count": n_heads,
        "attention.head_count_kv": 1,  # what is cached is one latent head
        "attention.q_lora_rank": q_rank,
        "attention.kv_lora_rank": kv_rank,
        "attention.key_length": kv_rank + rope_width,
        "attention.value_length": kv_rank,
        "attention.key_length_mla": key_width + rope_width,
        "attention.value_length_mla": value_width,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": rope_width,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": 0.1,
    }
    return Header("deepseek2", n_vocab, keys, tensors)


llama_3 = partial(dense, "llama", n_heads_kv=8, n_vocab=128256, n_ctx=131072, rope_freq_base=500000.0)

HEADERS: dict[str, Callable[[], Header]] = {
    "gpt-oss-20b": partial(gpt_oss, 24, 32),
    "gpt-oss-120b": partial(gpt_oss, 36, 128),
    "llama-3-8b": partial(llama_3, n_layers=32, width=4096, ffn_width=14336, n_heads=32),
    "llama-3-70b": partial(llama_3, n_layers=80, width=8192, ffn_width=28672, n_heads=64),
    "qwen-3-32b": partial(
        dense,
        "qwen3",
        n_layers=64,
        width=5120,
        ffn_width=25600,
        n_heads=64,
        n_heads_kv=8,
        n_vocab=151936,
        n_ctx=40960,
        rope_freq_base=1000000.0,
    ),
    "gemma-3-27b": partial(
        dense,
        "gemma3",
        n_layers=62,
        width=5376,
        ffn_width=21504,
        n_heads=32,
        n_heads_kv=16,
        n_vocab=262208,
        n_ctx=131072,
        rope_freq_base=1000000.0,
        sliding_window=1024,
    ),
    "deepseek-v3": deepseek_v3,
}


def _writer(path: Path, header: Header, n_tokens: int, n_merges: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, header.architecture)
    for name, value in header.keys.items():
        key = f"{header.architecture}.{name}"
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case list():
                writer.add_array(key, value)
            case _:
                writer.add_string(key, value)
    if n_tokens == 0:  # llama.cpp is content with a number, and so is everybody whose matter is memory
        writer.add_tokenizer_model("none")
        writer.add_uint32(f"{header.architecture}.vocab_size", header.n_vocab)
    else:
        tokens, merges = gpt2_vocabulary()
        more_tokens = [f"<|{i}|>" for i in range(len(tokens), n_tokens - 1)]
        more_merges = [f"{i} {i + 1}" for i in range(max(0, n_merges - len(merges)))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*tokens, *more_tokens, "<|endoftext|>"])
        writer.add_token_types([gguf.TokenType.NORMAL] * (n_tokens - 1) + [gguf.TokenType.CONTROL])
        writer.add_token_merges([*merges, *more_merges])
        writer.add_eos_token_id(n_tokens - 1)
        writer.add_bos_token_id(n_tokens - 1)
        writer.add_add_bos_token(False)
    for name, (shape, kind) in header.tensors.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def write_header(path: Path, name: str, *, vocabulary: bool = False) -> Path:
    """Write a file of the model's true size that takes up no space; ``vocabulary`` is for gpt-oss, and slow."""
    n_tokens, n_merges = (GPT_OSS_VOCABULARY, GPT_OSS_MERGES) if vocabulary else (0, 0)
    return write_file(path, HEADERS[name](), n_tokens, n_merges)


def write_file(path: Path, header: Header, n_tokens: int = 0, n_merges: int = 0) -> Path:
    """Write a file whose weights are zeros that take up no space; without tokens, it has only their number."""
    writer = _writer(path, header, n_tokens, n_merges)
    writer.close()
    align = partial(gguf.GGUFWriter.ggml_pad, n=gguf.GGUF_DEFAULT_ALIGNMENT)
    size = align(path.stat().st_size) + sum(align(n_bytes(*tensor)) for tensor in header.tensors.values())
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def _weights(
    random: np.random.Generator, name: str, shape: tuple[int, ...], kind: Type, factor: float = 1
) -> npt.NDArray[np.uint8]:
    # Keeps the size of what goes through, as model_files.matrix does; `factor` is for another size.
    scale = factor * {"token_embd.weight": 16.0, "output.weight": 4.0}.get(name, 1.0) / shape[-1] ** 0.5
    if kind == Type.F32:
        if "norm" in name and name.endswith(".weight"):
            return np.ones(shape, np.float32).reshape(-1).view(np.uint8)
        is_matrix = len(shape) > 1 and name.endswith(".weight")
        scale = scale if is_matrix else 1.0 if name.endswith("sinks.weight") else 0.02 * factor
        return (random.standard_normal(shape, np.float32) * np.float32(scale)).reshape(-1).view(np.uint8)
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.frombuffer(random.bytes(n_bytes(shape, kind)), np.uint8).reshape(-1, block_bytes).copy()
    # From half to one and a half, or two, of the mean: a block with another's scale is another one.
    if kind == Type.MXFP4:  # a power of two, then 32 values that are 2.9 in the mean square
        blocks[:, 0] = 127 + round(np.log2(scale / 2.9)) + random.integers(-1, 2, len(blocks), np.int8)
    else:
        if kind == Type.Q6_K:
            blocks[:, 192:208] = np.where(blocks[:, 192:208] & 1, 1, 255)  # the scales of parts are 1 or -1
        factors = random.uniform(0.5, 1.5, (len(blocks), 1))
        for place, size in _SCALES[kind].items():
            blocks[:, place : place + 2] = (factors * (scale / size)).astype(np.float16).view(np.uint8)
    return blocks.reshape(-1)


# Where a block has a float16, and by how much the scale is divided there: so large are the values in the mean square.
_SCALES: dict[Type, dict[int, float]] = {
    Type.Q4_0: {0: 4.6},
    Type.Q4_1: {0: 4.6, 2: -0.6},
    Type.Q5_0: {0: 9.2},
    Type.Q5_1: {0: 9.2, 2: -0.6},
    Type.Q8_0: {0: 73.9},
    Type.IQ4_NL: {0: 70.0},
    Type.IQ4_XS: {0: 70.0 * 18},
    Type.Q4_K: {0: 4.6 * 36, 2: 36 / 1.6},
    Type.Q5_K: {0: 9.2 * 36, 2: 36 / 1.6},
    Type.Q6_K: {208: 18.5},
}


# Of a model that is given routes: what a token is, and how little attention and experts add to it.
_ROUTED_AMPLITUDE, _ROUTED_FACTOR = 64.0, 2.0**-10


def _factor_of(name: str) -> float:
    return _ROUTED_FACTOR if any(part in name for part in ("attn_output.", "ffn_down_exps.")) else 1


def _routed_weights(name: str, shape: tuple[int, ...], routes: Routes) -> npt.NDArray[np.uint8] | None:
    """Return weights with which a token's id decides on its experts; None for those that have no part in that."""
    n_tokens, _, n_used = routes.shape
    if name == "token_embd.weight":  # one number of a row, in its block of 32
        n_vocab, width = shape
        tokens = np.arange(n_vocab)
        places = tokens % n_tokens
        blocks = np.zeros((n_vocab, width // 32, 34), np.uint8)
        blocks[tokens, places // 32, :2] = np.array([_ROUTED_AMPLITUDE / 127], np.float16).view(np.uint8)
        blocks[tokens, places // 32, 2 + places % 32] = 127
        return blocks.reshape(-1)
    if name.endswith("ffn_gate_inp.weight"):
        experts = routes[:, int(name.split(".")[1])].astype(np.int64)
        weights = np.zeros(shape, np.float32)
        # The norm before it makes the square root of the width of the number that a token is.
        weights[experts, np.arange(n_tokens)[:, None]] = np.linspace(8, 4, n_used) / shape[-1] ** 0.5
        return weights.reshape(-1).view(np.uint8)
    if name.endswith("ffn_gate_inp.bias"):
        return np.zeros(shape, np.float32).view(np.uint8)
    return None


def _check_routes(header: Header, routes: Routes) -> None:
    keys, kind = header.keys, header.tensors["token_embd.weight"][1]
    assert header.architecture == "gpt-oss", header.architecture
    assert kind == Type.Q8_0, kind
    assert routes.shape[1:] == (keys["block_count"], keys["expert_used_count"]), routes.shape
    assert 0 < len(routes) <= keys["embedding_length"], routes.shape
    assert routes.max() < keys["expert_count"], routes.max()


def write_random_model(
    path: Path,
    header: Header,
    report: Callable[[int], object] = lambda n_bytes: None,
    *,
    vocabulary: bool = True,
    routes: Routes | None = None,
) -> Path:
    """Write a header's model that runs, with random weights; ``report`` is told of bytes as they are written.

    The vocabulary is the first 8191 of GPT-2's tokens, and invented ones that no text is made of; without one, tokens
    have only numbers.

    With ``routes`` of shape (tokens, layers, experts of a token), for gpt-oss, a token's id decides which experts it
    uses, wherever in a text it is: those of row id modulo tokens, in their order. There are at most as many rows as the
    width.
    """
    if routes is not None:
        _check_routes(header, routes)
    random = np.random.default_rng(1)
    # Experts are large and alike: one lot of random weights serves them all.
    factors = {name: 1.0 if routes is None else _factor_of(name) for name in header.tensors}
    lots = {(shape, factors[name]) for name, (shape, kind) in header.tensors.items() if kind == Type.MXFP4}
    experts = {(shape, factor): _weights(random, "", shape, Type.MXFP4, factor) for shape, factor in lots}
    writer = _writer(path, header, header.n_vocab if vocabulary else 0, VOCABULARY - 1 - 256)
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for name, (shape, kind) in header.tensors.items():
        weights = None if routes is None else _routed_weights(name, shape, routes)
        if weights is None:
            factor = factors[name]
            weights = experts[shape, factor] if kind == Type.MXFP4 else _weights(random, name, shape, kind, factor)
        weights.tofile(file)
        writer.write_padding(file, weights.nbytes)
        report(weights.nbytes)
    writer.close()
    return path


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["gpt-oss-20b-6-layers", file]:
            write_random_model(Path(file), gpt_oss(6, 32))
        case [name, file] if name in HEADERS:
            write_header(Path(file), name)
        case [name, file, "--vocabulary"] if name in HEADERS:
            write_header(Path(file), name, vocabulary=True)
        case _:
            sys.exit(f"{__doc__}\nNames: {' '.join(HEADERS)}")
