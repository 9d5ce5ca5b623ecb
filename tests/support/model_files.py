"""Write small models: real GGUF files of real architectures, with random weights.

``python -m model_files tiny-gpt-oss FILE`` writes one from the command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

LAYERS, EXPERTS, EXPERTS_USED, WIDTH, EXPERT_WIDTH = 4, 8, 4, 256, 256
HEADS, HEADS_KV, HEAD_WIDTH, VOCABULARY = 8, 2, 64, 8192

Tensors = dict[str, tuple[npt.NDArray[np.generic], Type | None]]


def llama_cpp_folder() -> Path:
    """Return the source of llama.cpp, which the build of a checkout has brought."""
    default = Path(__file__).parents[2] / "vendor" / "llama.cpp"
    return Path(os.environ.get("OVERSPILL_LLAMA_CPP_DIR", default))


@cache
def gpt2_vocabulary() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the first tokens of GPT-2's vocabulary, every byte among them, and the merges that make them."""
    reader = gguf.GGUFReader(llama_cpp_folder() / "models" / "ggml-vocab-gpt-2.gguf")

    def strings(key: str, n: int) -> tuple[str, ...]:
        field = reader.fields[key]
        return tuple(bytes(field.parts[i]).decode() for i in field.data[:n])

    return strings("tokenizer.ggml.tokens", VOCABULARY - 1), strings("tokenizer.ggml.merges", VOCABULARY - 1 - 256)


def gpt_oss_tensors(
    seed: int = 1, n_layers: int = LAYERS, n_vocab: int = VOCABULARY, n_heads: int = HEADS, n_heads_kv: int = HEADS_KV
) -> Tensors:
    """Return random weights in gpt-oss's shapes: MXFP4 experts, Q8_0 matrices, F32 for the rest."""
    random = np.random.default_rng(seed)

    def vector(*shape: int, scale: float = 0.02) -> npt.NDArray[np.float32]:
        return np.asarray(random.standard_normal(shape) * scale, np.float32)

    def matrix(*shape: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        # Keeps the size of what goes through, so that the logits are sane.
        return vector(*shape, scale=scale / shape[-1] ** 0.5)

    tensors: Tensors = {
        "token_embd.weight": (matrix(n_vocab, WIDTH, scale=16), Type.Q8_0),
        "output_norm.weight": (np.ones(WIDTH, np.float32), None),
        "output.weight": (matrix(n_vocab, WIDTH, scale=4), Type.Q8_0),
    }
    for layer in range(n_layers):
        block = {
            "attn_norm.weight": (np.ones(WIDTH, np.float32), None),
            "post_attention_norm.weight": (np.ones(WIDTH, np.float32), None),
            "attn_q.weight": (matrix(n_heads * HEAD_WIDTH, WIDTH), Type.Q8_0),
            "attn_q.bias": (vector(n_heads * HEAD_WIDTH), None),
            "attn_k.weight": (matrix(n_heads_kv * HEAD_WIDTH, WIDTH), Type.Q8_0),
            "attn_k.bias": (vector(n_heads_kv * HEAD_WIDTH), None),
            "attn_v.weight": (matrix(n_heads_kv * HEAD_WIDTH, WIDTH), Type.Q8_0),
            "attn_v.bias": (vector(n_heads_kv * HEAD_WIDTH), None),
            "attn_output.weight": (matrix(WIDTH, n_heads * HEAD_WIDTH), Type.Q8_0),
            "attn_output.bias": (vector(WIDTH), None),
            "attn_sinks.weight": (vector(n_heads, scale=1.0), None),
            "ffn_gate_inp.weight": (matrix(EXPERTS, WIDTH), None),
            "ffn_gate_inp.bias": (vector(EXPERTS), None),
            "ffn_gate_exps.weight": (matrix(EXPERTS, EXPERT_WIDTH, WIDTH), Type.MXFP4),
            "ffn_gate_exps.bias": (vector(EXPERTS, EXPERT_WIDTH), None),
            "ffn_up_exps.weight": (matrix(EXPERTS, EXPERT_WIDTH, WIDTH), Type.MXFP4),
            "ffn_up_exps.bias": (vector(EXPERTS, EXPERT_WIDTH), None),
            "ffn_down_exps.weight": (matrix(EXPERTS, WIDTH, EXPERT_WIDTH), Type.MXFP4),
            "ffn_down_exps.bias": (vector(EXPERTS, WIDTH), None),
        }
        tensors |= {f"blk.{layer}.{name}": value for name, value in block.items()}
    return tensors


def add_gpt_oss_keys(
    writer: gguf.GGUFWriter, n_layers: int = LAYERS, n_heads: int = HEADS, n_heads_kv: int = HEADS_KV
) -> None:
    """Write gpt-oss's hyperparameters, at the tiny model's size."""
    writer.add_name("tiny gpt-oss with random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_context_length(131072)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(EXPERT_WIDTH)
    writer.add_expert_feed_forward_length(EXPERT_WIDTH)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(EXPERTS_USED)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_heads_kv)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(128)
    writer.add_rope_freq_base(150000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    writer.add_rope_scaling_orig_ctx_len(4096)


def add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int = VOCABULARY) -> None:
    """Write a byte-level vocabulary, the last token of which ends a text; what is over 8192 no text is made of."""
    tokens, merges = gpt2_vocabulary()
    tokens += tuple(f" invented{i}" for i in range(n_vocab - 1 - len(tokens)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, "<|endoftext|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(list(merges))
    writer.add_eos_token_id(n_vocab - 1)
    writer.add_bos_token_id(n_vocab - 1)
    writer.add_add_bos_token(False)


def write_tiny_gpt_oss(
    path: Path,
    *,
    architecture: str = "gpt-oss",
    n_files: int = 1,
    without: str = "",
    sampling: Mapping[str, float] | None = None,
    n_layers: int = LAYERS,
    n_vocab: int = VOCABULARY,
    n_heads: int = HEADS,
    n_heads_kv: int = HEADS_KV,
) -> Path:
    """Write a gpt-oss of 8 experts and a width of 256; return the (first) file.

    ``without`` leaves out the tensors or keys that contain it, for a damaged model; ``sampling`` is what
    the file recommends, by llama.cpp's names.
    """
    tensors = gpt_oss_tensors(n_layers=n_layers, n_vocab=n_vocab, n_heads=n_heads, n_heads_kv=n_heads_kv)
    tensors = {name: value for name, value in tensors.items() if not (without and without in name)}
    parts = np.array_split(np.array(list(tensors)), n_files)
    files = [path]
    if n_files > 1:
        files = [path.with_name(f"{path.stem}-{i + 1:05}-of-{n_files:05}.gguf") for i in range(n_files)]
    for number, (file, names) in enumerate(zip(files, parts, strict=True)):
        writer = gguf.GGUFWriter(file, architecture)
        if number == 0:
            add_gpt_oss_keys(writer, n_layers, n_heads, n_heads_kv)
            add_vocabulary(writer, n_vocab)
            for name, value in (sampling or {}).items():
                if isinstance(value, int):
                    writer.add_int32(f"general.sampling.{name}", value)
                else:
                    writer.add_float32(f"general.sampling.{name}", value)
            if without:
                for keys in writer.kv_data:
                    for key in [key for key in keys if without in key]:
                        del keys[key]
        if n_files > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", n_files)
            writer.add_int32("split.tensors.count", len(tensors))
        for name in names:
            data, kind = tensors[str(name)]
            stored = data if kind is None else gguf.quants.quantize(data, kind)
            writer.add_tensor(str(name), stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[0]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tiny-gpt-oss", file]:
            write_tiny_gpt_oss(Path(file))
        case _:
            sys.exit(__doc__)
