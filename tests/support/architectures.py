"""Tiny models of many architectures: every form of graph that products of weights come in.

A form names the tensors of a layer as llama.cpp does. Their shapes follow from the names, and what is not as usual in
an architecture stands in its form.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import gguf
from gguf import GGMLQuantizationType as Type

from header_files import Header, Shapes

# K-quants need rows of 256.
N_VOCAB, N_CTX, WIDTH, FFN_WIDTH, HEADS, HEADS_KV, HEAD_WIDTH = 512, 512, 256, 512, 4, 2, 64
EXPERTS, EXPERTS_USED = 8, 2
Q_RANK, KV_RANK, ROPE_WIDTH = 256, 256, 64  # of latent attention
QUERIES, KEYS = HEADS * HEAD_WIDTH, HEADS_KV * HEAD_WIDTH

SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd": (N_VOCAB, WIDTH),
    "output": (N_VOCAB, WIDTH),
    "attn_q": (QUERIES, WIDTH),
    "attn_k": (KEYS, WIDTH),
    "attn_v": (KEYS, WIDTH),
    "attn_qkv": (QUERIES + 2 * KEYS, WIDTH),
    "attn_output": (WIDTH, QUERIES),
    "attn_q_norm": (HEAD_WIDTH,),
    "attn_k_norm": (HEAD_WIDTH,),
    "attn_q_a": (Q_RANK, WIDTH),
    "attn_q_a_norm": (Q_RANK,),
    "attn_q_b": (HEADS * (HEAD_WIDTH + ROPE_WIDTH), Q_RANK),
    "attn_kv_a_mqa": (KV_RANK + ROPE_WIDTH, WIDTH),
    "attn_kv_a_norm": (KV_RANK,),
    "attn_k_b": (HEADS, KV_RANK, HEAD_WIDTH),
    "attn_v_b": (HEADS, HEAD_WIDTH, KV_RANK),
    "ffn_gate": (FFN_WIDTH, WIDTH),
    "ffn_up": (FFN_WIDTH, WIDTH),
    "ffn_down": (WIDTH, FFN_WIDTH),
    "ffn_gate_inp": (EXPERTS, WIDTH),
    "ffn_gate_exps": (EXPERTS, FFN_WIDTH, WIDTH),
    "ffn_up_exps": (EXPERTS, FFN_WIDTH, WIDTH),
    "ffn_gate_up_exps": (EXPERTS, 2 * FFN_WIDTH, WIDTH),
    "ffn_down_exps": (EXPERTS, WIDTH, FFN_WIDTH),
    "ffn_gate_shexp": (FFN_WIDTH, WIDTH),
    "ffn_up_shexp": (FFN_WIDTH, WIDTH),
    "ffn_down_shexp": (WIDTH, FFN_WIDTH),
    "exp_probs_b.bias": (EXPERTS,),
    "shortconv.conv": (WIDTH, 3),
    "shortconv.in_proj": (3 * WIDTH, WIDTH),
    "shortconv.out_proj": (WIDTH, WIDTH),
}
"""What is not here is a vector of the width."""

SEPARATE = "attn_norm attn_q attn_k attn_v attn_output"
BIASED = "attn_norm attn_q+ attn_k+ attn_v+ attn_output"
MERGED = "attn_norm attn_qkv attn_output"
LATENT = "attn_norm attn_q_a attn_q_a_norm attn_q_b attn_kv_a_mqa attn_kv_a_norm attn_k_b attn_v_b attn_output"
GATED = "ffn_norm ffn_gate ffn_up ffn_down"
ROUTED = "ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps"
SHARED = "ffn_gate_shexp ffn_up_shexp ffn_down_shexp"


@dataclass(frozen=True)
class Form:
    """An architecture's tensors, by names with a space between; ``+`` stands for a bias as well."""

    block: str
    kind: Type
    experts: Type | None = None  # like the other weights
    ends: str = "output_norm output"
    dense: str = ""  # the block of those layers that have no experts
    dense_layers: Container[int] = ()
    n_layers: int = 2  # the last one computes only what is asked for
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


FORMS = {
    # Biases of queries, keys and values.
    "qwen2": Form(f"{BIASED} {GATED}", Type.Q4_0),
    # Norms behind, capped logits, a sliding window, and the embedding as the output head.
    "gemma2": Form(
        f"{SEPARATE} post_attention_norm {GATED} post_ffw_norm",
        Type.Q6_K,
        ends="output_norm",
        keys={
            "attention.sliding_window": 64,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    # Queries, keys and values in one, gate and up in one.
    "phi3": Form(f"{MERGED} ffn_norm ffn_up ffn_down", Type.Q4_K, shapes={"ffn_up": (2 * FFN_WIDTH, WIDTH)}),
    # Attention and what follows it read the same activations; biases everywhere, no gate.
    "phi2": Form(
        "attn_norm+ attn_q+ attn_k+ attn_v+ attn_output+ ffn_up+ ffn_down+", Type.Q5_0, ends="output_norm+ output+"
    ),
    "starcoder2": Form(
        "attn_norm+ attn_q+ attn_k+ attn_v+ attn_output+ ffn_norm+ ffn_up+ ffn_down+",
        Type.Q4_1,
        ends="output_norm+ output",
    ),
    # In parallel, with a norm each.
    "gptneox": Form(
        "attn_norm+ attn_qkv+ attn_output+ ffn_norm+ ffn_up+ ffn_down+",
        Type.Q5_1,
        ends="output_norm+ output",
        keys={"use_parallel_residual": True},
    ),
    "falcon": Form("attn_norm+ attn_qkv attn_output ffn_up ffn_down", Type.Q8_0, ends="output_norm+"),
    # Places by slopes and not by rotation; queries, keys and values are limited.
    "mpt": Form(
        f"{MERGED} ffn_norm ffn_up ffn_down",
        Type.IQ4_NL,
        ends="output_norm",
        keys={"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 2.0},
    ),
    # In parallel and with a gate.
    "command-r": Form(
        f"{SEPARATE} ffn_gate ffn_up ffn_down", Type.IQ4_XS, ends="output_norm", keys={"logit_scale": 0.25}
    ),
    # Norms only behind, and of all heads at once.
    "olmo2": Form(
        "attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm post_attention_norm"
        " ffn_gate ffn_up ffn_down post_ffw_norm",
        Type.Q5_K,
        shapes={"attn_q_norm": (QUERIES,), "attn_k_norm": (KEYS,)},
    ),
    # Experts as Mixtral has them.
    "llama": Form(f"{SEPARATE} ffn_norm {ROUTED}", Type.Q4_K),
    # An expert for all tokens, with a gate of its own.
    "qwen2moe": Form(f"{BIASED} ffn_norm {ROUTED} ffn_gate_inp_shexp {SHARED}", Type.Q4_0),
    # Norms of queries and keys.
    "qwen3moe": Form(f"{SEPARATE} attn_q_norm attn_k_norm ffn_norm {ROUTED}", Type.Q5_K),
    # Latent attention, a dense layer first, groups of experts, their gate and up in one.
    "deepseek2": Form(
        f"{LATENT} ffn_norm ffn_gate_inp exp_probs_b.bias ffn_gate_up_exps ffn_down_exps {SHARED}",
        Type.Q4_K,
        dense=f"{LATENT} {GATED}",
        dense_layers=[0],
        n_layers=3,
        keys={
            "leading_dense_block_count": 1,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
            "attention.head_count_kv": 1,  # what is cached is one latent head
            "attention.q_lora_rank": Q_RANK,
            "attention.kv_lora_rank": KV_RANK,
            "attention.key_length": KV_RANK + ROPE_WIDTH,
            "attention.value_length": KV_RANK,
            "attention.key_length_mla": HEAD_WIDTH + ROPE_WIDTH,
            "attention.value_length_mla": HEAD_WIDTH,
            "rope.dimension_count": ROPE_WIDTH,
        },
    ),
    # What an expert is worth is multiplied before it, so each has activations of its own.
    "llama4": Form(
        f"{SEPARATE} ffn_norm {ROUTED} {SHARED}",
        Type.Q8_0,
        Type.MXFP4,
        dense=f"{SEPARATE} {GATED}",
        dense_layers=[0, 2],
        n_layers=4,  # only each fourth sees more than a part of the context
        keys={"interleave_moe_layer_step": 2},
    ),
    "dbrx": Form(f"{MERGED} attn_output_norm {ROUTED}", Type.IQ4_XS, keys={"attention.clamp_kqv": 8.0}),
    # Experts are chosen with a bias, and their sum is in full precision.
    "glm4moe": Form(
        f"{BIASED} attn_q_norm attn_k_norm post_attention_norm {ROUTED} exp_probs_b.bias {SHARED}",
        Type.Q8_0,
        dense=f"{BIASED} attn_q_norm attn_k_norm post_attention_norm ffn_gate ffn_up ffn_down",
        dense_layers=[0],
        n_layers=3,
        keys={"leading_dense_block_count": 1},
    ),
    # Experts beside dense weights, which have norms of their own.
    "arctic": Form(
        f"{SEPARATE} {GATED} ffn_norm_exps {ROUTED}",
        Type.IQ4_NL,
        shapes=dict.fromkeys(["ffn_gate", "ffn_up", "ffn_down"], (WIDTH, WIDTH)),
    ),
    # Experts are chosen before the attention.
    "smallthinker": Form(
        f"{SEPARATE} ffn_norm {ROUTED}",
        Type.Q4_0,
        Type.MXFP4,
        keys={"expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID)},
    ),
    # A layer of short convolutions, whose products have three dimensions, and one of attention.
    "lfm2moe": Form(
        f"{SEPARATE} attn_q_norm attn_k_norm ffn_norm {ROUTED} exp_probs_b.bias",
        Type.Q6_K,
        ends="token_embd_norm",
        dense=f"attn_norm shortconv.conv shortconv.in_proj shortconv.out_proj {GATED}",
        dense_layers=[0],
        n_layers=3,
        keys={
            "leading_dense_block_count": 1,
            "attention.head_count_kv": [0, HEADS_KV, HEADS_KV],
            "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
            "shortconv.l_cache": 3,
        },
    ),
}


def tiny(architecture: str) -> Header:
    """Return a model of a few layers and megabytes."""
    form = FORMS[architecture]
    tensors: Shapes = {}

    def kind(name: str, shape: tuple[int, ...]) -> Type:
        if len(shape) == 1 or "gate_inp" in name or shape[-1] < 32:
            return Type.F32
        if shape[-1] < 256:
            return Type.Q8_0
        return form.experts if "exps" in name and form.experts else form.kind

    def add(names: str, prefix: str = "") -> None:
        for entry in names.split():
            name = entry.removesuffix("+")
            shape = form.shapes.get(name, SHAPES.get(name, (WIDTH,)))
            full = prefix + name
            tensors[full if name.endswith(".bias") else f"{full}.weight"] = (shape, kind(name, shape))
            if entry.endswith("+"):
                tensors[f"{full}.bias"] = (shape[:1], Type.F32)

    add("token_embd")
    add(form.ends)
    for layer in range(form.n_layers):
        add(form.dense if layer in form.dense_layers else form.block, f"blk.{layer}.")
    keys = {
        "context_length": N_CTX,
        "embedding_length": WIDTH,
        "block_count": form.n_layers,
        "feed_forward_length": FFN_WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS_KV,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    if "exps" in form.block:
        keys |= {
            "expert_feed_forward_length": FFN_WIDTH,
            "expert_count": EXPERTS,
            "expert_used_count": EXPERTS_USED,
            "expert_shared_count": 1,
        }
    return Header(architecture, N_VOCAB, keys | form.keys, tensors)
