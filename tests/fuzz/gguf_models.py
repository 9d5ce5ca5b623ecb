"""Small models that run, as values: keys and tensors that can be changed before they are written."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind

from model_files import gpt2_vocabulary, llama_cpp_folder

__all__ = [
    "BASES",
    "Key",
    "Model",
    "Tensor",
    "byte_vocabulary",
    "key_of",
    "packed",
    "piece_vocabulary",
    "pre_tokenizers",
    "word_vocabulary",
]

WIDTH, LAYERS, HEADS, HEADS_KV, HEAD_WIDTH, EXPERTS = 64, 2, 4, 2, 32, 4

_FORMS: dict[int, str] = {
    Kind.UINT8: "<B",
    Kind.INT8: "<b",
    Kind.UINT16: "<H",
    Kind.INT16: "<h",
    Kind.UINT32: "<I",
    Kind.INT32: "<i",
    Kind.UINT64: "<Q",
    Kind.INT64: "<q",
    Kind.FLOAT32: "<f",
    Kind.FLOAT64: "<d",
    Kind.BOOL: "<B",
}


@dataclass(frozen=True)
class Key:
    """A key of the header. ``of`` is the type of an array's elements."""

    name: bytes
    kind: int
    value: Any
    of: int = 0

    @property
    def is_array(self) -> bool:
        """Whether it has elements."""
        return self.kind == Kind.ARRAY


@dataclass(frozen=True)
class Tensor:
    """A tensor: the dimensions are ggml's, the contiguous one first; without an offset it lies where it should."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass(frozen=True)
class Model:
    """What a GGUF file holds."""

    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None
    alignment: int = 32  # by which tensors are laid out, whatever the key says

    def to_bytes(self) -> bytes:
        """Return the file."""
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        out = bytearray(b"GGUF" + struct.pack("<I", self.version % 2**32))
        out += struct.pack("<QQ", n_tensors % 2**64, n_keys % 2**64)
        for key in self.keys:
            out += _text(key.name) + struct.pack("<I", key.kind)
            if key.is_array:
                out += struct.pack("<IQ", key.of, len(key.value))
                for element in key.value:
                    out += packed(key.of, element)
            else:
                out += packed(key.kind, key.value)
        at = 0
        for tensor in self.tensors:
            out += _text(tensor.name) + struct.pack("<I", len(tensor.dims))
            out += b"".join(struct.pack("<Q", n % 2**64) for n in tensor.dims)
            out += struct.pack("<IQ", tensor.kind, (at if tensor.offset is None else tensor.offset) % 2**64)
            at += len(tensor.data) + self._padding(at + len(tensor.data))
        out += bytes(self._padding(len(out)))
        start = len(out)
        for tensor in self.tensors:
            out += tensor.data
            out += bytes(self._padding(len(out) - start))
        return bytes(out)

    def _padding(self, n: int) -> int:
        return -n % self.alignment

    def with_keys(self, keys: Mapping[str, Key]) -> Model:
        """Return the model with some keys replaced, or added at the end."""
        left = {key.name: key for key in self.keys} | {name.encode(): key for name, key in keys.items()}
        return replace(self, keys=tuple(left.values()))


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def packed(kind: int, value: Any) -> bytes:
    """Return a value as the type says it, made to fit."""
    form = _FORMS.get(kind)
    if form is None:
        text = value if isinstance(value, bytes) else str(value).encode()
        return _text(text)
    if isinstance(value, bytes | str | list | tuple):
        value = len(value)
    if form[1] in "fd":
        try:
            return struct.pack(form, float(value))
        except OverflowError:
            return struct.pack(form, float("inf"))
    number = int(value) if value == value and abs(value) != float("inf") else 0
    size = struct.calcsize(form)
    return (number % (1 << (8 * size))).to_bytes(size, "little")


def key_of(name: str, value: Any) -> Key:
    """Return a key with the type that converters give it."""
    match value:
        case bool():
            return Key(name.encode(), Kind.BOOL, value)
        case int():
            return Key(name.encode(), Kind.UINT32 if value >= 0 else Kind.INT32, value)
        case float():
            return Key(name.encode(), Kind.FLOAT32, value)
        case str():
            return Key(name.encode(), Kind.STRING, value.encode())
        case [str(), *_]:
            return Key(name.encode(), Kind.ARRAY, [text.encode() for text in value], Kind.STRING)
        case [float(), *_]:
            return Key(name.encode(), Kind.ARRAY, list(value), Kind.FLOAT32)
        case _:
            return Key(name.encode(), Kind.ARRAY, list(value), Kind.INT32)


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def byte_vocabulary(n_tokens: int = 320) -> dict[str, Any]:
    """Return the keys of GPT-2's first tokens, and three special ones."""
    all_tokens, all_merges = gpt2_vocabulary()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = list(all_tokens[: n_tokens - len(special)])
    known = set(tokens)
    merges = [merge for merge in all_merges if merge.replace(" ", "") in known]
    n = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + special,
        "tokenizer.ggml.token_type": [1] * n + [3] * len(special),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


@cache
def piece_vocabulary() -> dict[str, Any]:
    """Return the keys of a vocabulary like Llama 2's: bytes, then pieces with scores."""
    special = ["<unk>", "<s>", "</s>"]
    data = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["▁", *"etaoinshrdlu.,", "▁t", "he", "▁the", "in", "▁a", "er", "re", "on"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": special + data + pieces,
        "tokenizer.ggml.scores": [0.0] * (len(special) + len(data)) + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }


@cache
def word_vocabulary() -> dict[str, Any]:
    """Return the keys of a vocabulary like BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["▁the", "▁hello", "▁a", *(f"▁{letter}" for letter in "etaoinshrdlu"), *"etaoinshrdlu", "ing", "ed"]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": special + words,
        "tokenizer.ggml.token_type": [3] * 5 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
    }


@cache
def pre_tokenizers() -> tuple[str, ...]:
    """Return the names that llama.cpp knows for the ways of cutting a text into words."""
    source = (llama_cpp_folder() / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    return tuple(sorted(set(re.findall(r'tokenizer_pre == *"([^"]+)"', source))))


def _made(architecture: str, vocabulary: Mapping[str, Any], keys: Mapping[str, Any], shapes: dict[str, Any]) -> Model:
    random = np.random.default_rng(1)
    n_vocab = len(vocabulary["tokenizer.ggml.tokens"])
    shapes = {
        "token_embd.weight": (n_vocab, WIDTH),
        "output.weight": (n_vocab, WIDTH),
        "output_norm.weight": (WIDTH,),
    } | {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    tensors = []
    for name, shape in shapes.items():
        weights = np.asarray(random.standard_normal(shape) / shape[-1] ** 0.5, np.float32)
        kind = Type.F32
        if len(shape) > 1 and "gate_inp" not in name:
            kind = Type.MXFP4 if architecture == "gpt-oss" and "exps" in name else Type.Q8_0
        if name.endswith("bias"):
            kind = Type.F32
        data = weights.tobytes() if kind == Type.F32 else gguf.quants.quantize(weights, kind).tobytes()
        tensors.append(Tensor(name.encode(), tuple(reversed(shape)), kind, data))
    common = {
        "general.architecture": architecture,
        "general.name": f"tiny {architecture}",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.alignment": 32,
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
    }
    own = {
        "context_length": 2048,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS_KV,
        "attention.key_length": HEAD_WIDTH,
        "attention.value_length": HEAD_WIDTH,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": HEAD_WIDTH,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 2.0,
        "rope.scaling.original_context_length": 1024,
        "vocab_size": n_vocab,
        **keys,
    }
    named = {**common, **{f"{architecture}.{name}": value for name, value in own.items()}, **vocabulary}
    return Model(tuple(key_of(name, value) for name, value in named.items()), tuple(tensors))


_ATTENTION = {
    "attn_norm.weight": (WIDTH,),
    "attn_q.weight": (HEADS * HEAD_WIDTH, WIDTH),
    "attn_k.weight": (HEADS_KV * HEAD_WIDTH, WIDTH),
    "attn_v.weight": (HEADS_KV * HEAD_WIDTH, WIDTH),
    "attn_output.weight": (WIDTH, HEADS * HEAD_WIDTH),
}
_EXPERTS = {
    "ffn_gate_inp.weight": (EXPERTS, WIDTH),
    "ffn_gate_exps.weight": (EXPERTS, WIDTH, WIDTH),
    "ffn_up_exps.weight": (EXPERTS, WIDTH, WIDTH),
    "ffn_down_exps.weight": (EXPERTS, WIDTH, WIDTH),
}
_EXPERT_KEYS = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": WIDTH}


@cache
def llama() -> Model:
    """Return a dense model with a vocabulary of pieces."""
    dense = dict.fromkeys(("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"), (WIDTH, WIDTH))
    return _made("llama", piece_vocabulary(), {}, {**_ATTENTION, "ffn_norm.weight": (WIDTH,), **dense})


@cache
def gpt_oss() -> Model:
    """Return a gpt-oss: sinks, biases, a sliding window, MXFP4 experts."""
    biases = {
        "attn_q.bias": (HEADS * HEAD_WIDTH,),
        "attn_k.bias": (HEADS_KV * HEAD_WIDTH,),
        "attn_v.bias": (HEADS_KV * HEAD_WIDTH,),
        "attn_output.bias": (WIDTH,),
        "attn_sinks.weight": (HEADS,),
        "ffn_gate_inp.bias": (EXPERTS,),
        **{f"ffn_{part}_exps.bias": (EXPERTS, WIDTH) for part in ("gate", "up", "down")},
    }
    shapes = {**_ATTENTION, "post_attention_norm.weight": (WIDTH,), **_EXPERTS, **biases}
    keys = {**_EXPERT_KEYS, "attention.sliding_window": 16}
    return _made("gpt-oss", byte_vocabulary(), keys, shapes)


@cache
def qwen3_moe() -> Model:
    """Return a Qwen 3 with experts: norms of queries and keys."""
    norms = {f"attn_{part}_norm.weight": (HEAD_WIDTH,) for part in "qk"}
    shapes = {**_ATTENTION, **norms, "ffn_norm.weight": (WIDTH,), **_EXPERTS}
    return _made("qwen3moe", byte_vocabulary(), _EXPERT_KEYS, shapes)


BASES: dict[str, Callable[[], Model]] = {"llama": llama, "gpt-oss": gpt_oss, "qwen3moe": qwen3_moe}
