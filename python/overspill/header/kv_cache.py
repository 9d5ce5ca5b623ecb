"""The memory that layers keep between tokens: its size in llama.cpp, and the bytes of it that a token reads.

Sizes follow ``create_memory`` in llama.cpp's src/llama-model.cpp; keys are read as in src/models/*.cpp. An unknown
architecture counts as one with a plain KV cache in every layer, which is the most that it can need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from overspill.header.info import ModelInfo

__all__ = ["CACHE_TYPES", "LayerCache", "layer_caches", "n_computed_layers", "padded_context", "row_bytes"]

CACHE_TYPES = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}
"""For each type that a KV cache may have, the elements of a block and its bytes."""

# Sliding windows of architectures whose header has no flag for each layer. Of every n layers one has no window: the
# last, or (True) the first. The third entry is the size of the window, where llama.cpp has it as a constant.
_WINDOW_PATTERNS: dict[str, tuple[int, bool, int | None]] = {
    "afmoe": (4, False, None),
    "cohere2": (4, False, None),
    "cohere2moe": (4, True, None),
    "exaone-moe": (4, False, 128),
    "exaone4": (4, False, 4096),
    "gemma2": (2, False, 4096),
    "gemma3": (6, False, None),
    "gemma3n": (5, False, None),
    "gpt-oss": (2, False, None),
    "laguna": (4, True, None),
    "llama4": (4, False, 8192),
    "mellum": (4, False, None),
    "muse-glimmer": (4, False, None),
    "olmo2": (4, False, None),
    "plamo3": (8, False, None),
    "smallthinker": (4, True, 4096),
}
# These have sliding windows, the added ones by a flag for each layer. llama.cpp ignores sliding_window of all others.
_WINDOW_FLAGS = frozenset(
    (*_WINDOW_PATTERNS, "gemma4", "granite-swa", "maple", "mimo2", "spark2-5", "step35", "lfm2", "dots3note")
)
_RECURRENT = frozenset(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))
_EVERY_FOURTH_ATTENDS = frozenset(("qwen3next", "qwen35", "qwen35moe", "qwen4exp", "minimax-01"))
_BOTH = frozenset(("falcon-h1",))


def padded_context(n_ctx: int) -> int:
    """Return the tokens that llama.cpp makes room for where the context has ``n_ctx``: the next multiple of 256."""
    return -(-n_ctx // 256) * 256


def row_bytes(kind: str, n: int) -> int:
    """Return the bytes of ``n`` elements of type ``kind``, one of :data:`CACHE_TYPES`."""
    block, block_bytes = CACHE_TYPES[kind]
    return n // block * block_bytes


@dataclass(frozen=True)
class LayerCache:
    """The memory of one layer."""

    key_width: int
    """Elements of a token's key, all heads together; 0 for a layer without keys."""
    value_width: int
    """Elements of a token's value; 0 also if values are part of the keys (latent attention)."""
    n_heads_kv: int
    window: int | None
    """Tokens that attention looks back; None: all."""
    state_bytes: int = 0
    """Bytes of a recurrent layer's state, which is the same for every context."""

    def cells(self, n_ctx: int, n_ubatch: int) -> int:
        """Return the number of tokens that the cache has room for."""
        n_cells = padded_context(n_ctx)
        # As llama-kv-cache-iswa.cpp: the window, and the tokens of one batch.
        return n_cells if self.window is None else min(n_cells, padded_context(self.window + n_ubatch))

    def n_bytes(self, n_ctx: int, n_ubatch: int, type_k: str, type_v: str) -> int:
        """Return the bytes that llama.cpp allocates for a context of ``n_ctx`` tokens."""
        token_bytes = row_bytes(type_k, self.key_width) + row_bytes(type_v, self.value_width)
        return self.state_bytes + self.cells(n_ctx, n_ubatch) * token_bytes

    def bytes_read(self, depth: int, type_k: str, type_v: str) -> int:
        """Return the bytes that decoding one token reads, ``depth`` tokens into the context."""
        token_bytes = row_bytes(type_k, self.key_width) + row_bytes(type_v, self.value_width)
        return self.state_bytes + (depth if self.window is None else min(depth, self.window)) * token_bytes


def _per_layer(info: ModelInfo, key: str, default: int) -> list[int]:
    """Return the number that the header has under ``key`` for each layer; the header gives one, or one per layer."""
    value: Any = info.metadata.get(f"{info.architecture}.{key}", default)
    if isinstance(value, dict):
        values = [int(item) for item in value.get("values", ())]
        return (values + [default] * info.n_layers)[: info.n_layers]
    return [int(value)] * info.n_layers


def _number(info: ModelInfo, key: str, default: int = 0) -> int:
    value = info.metadata.get(f"{info.architecture}.{key}", default)
    return int(value) if isinstance(value, int | float) else default


def n_computed_layers(info: ModelInfo) -> int:
    """Return how many layers compute tokens; those after them only draft."""
    return info.n_layers - _number(info, "nextn_predict_layers")


def _windows(info: ModelInfo) -> list[int | None]:
    n, architecture = info.n_layers, info.architecture
    every, first, size = _WINDOW_PATTERNS.get(architecture, (1, False, None))
    given = _number(info, "attention.sliding_window")
    if architecture not in _WINDOW_FLAGS or (architecture == "exaone4" and n != 64):
        return [None] * n
    if f"{architecture}.attention.sliding_window" in info.metadata and given == 0:
        return [None] * n
    # The headers of exaone4 and gemma2 may replace llama.cpp's constant.
    size = given if size is None or (given and architecture in ("exaone4", "gemma2")) else size
    if size == 0:
        return [None] * n
    pattern = info.metadata.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, dict):
        flags = [bool(flag) for flag in pattern.get("values", ())]
        flags = (flags + [False] * n)[:n]
    else:
        every = int(pattern) if isinstance(pattern, int) else every
        full = 0 if first else every - 1
        flags = [every == 0 or layer % every != full for layer in range(n)]
    return [size if flag else None for flag in flags]


def _recurrent(info: ModelInfo, heads_kv: list[int]) -> list[bool]:
    n, architecture = info.n_layers, info.architecture
    if architecture in _RECURRENT | _BOTH:
        return [True] * n
    if architecture in _EVERY_FOURTH_ATTENDS:
        every = _number(info, "full_attention_interval", 4)
        return [(layer + 1) % every != 0 for layer in range(n)]
    # The headers of other hybrids give recurrent layers no heads for keys.
    hybrid = any(key.startswith(f"{architecture}.ssm.") for key in info.metadata) or architecture.startswith("lfm2")
    widths = _per_layer(info, "feed_forward_length", 0) if architecture.startswith("nemotron_h") else [0] * n
    return [hybrid and heads == 0 and width == 0 for heads, width in zip(heads_kv, widths, strict=True)]


def _state_bytes(info: ModelInfo) -> int:
    """Return the bytes of a recurrent layer's state: hparams.n_embd_r() and n_embd_s(), in F32."""
    width, head = info.n_embd, _number(info, "wkv.head_size")
    if head:
        shifts = _number(info, "token_shift_count", 2)
        return 4 * (shifts * width + width * head)
    if convolution := _number(info, "shortconv.l_cache"):
        return 4 * width * (convolution - 1)
    kernel, inner, state = (_number(info, f"ssm.{key}") for key in ("conv_kernel", "inner_size", "state_size"))
    if head := _number(info, "kda.head_dim"):
        n_heads = max(_per_layer(info, "attention.head_count", 1))
        return 4 * (3 * (kernel - 1 if kernel else 3) * n_heads * head + head * head * n_heads)
    groups = _number(info, "ssm.group_count")
    return 4 * (max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner)


def layer_caches(info: ModelInfo) -> list[LayerCache]:
    """Return the memory of each layer."""
    n, architecture = info.n_layers, info.architecture
    heads = _per_layer(info, "attention.head_count", 0)
    # Without head_count_kv, every head has keys of its own.
    has_kv = f"{architecture}.attention.head_count_kv" in info.metadata
    heads_kv = _per_layer(info, "attention.head_count_kv", 0) if has_kv else heads
    default = info.n_embd // max(heads[0] if heads else 1, 1)
    full = [_number(info, f"attention.{part}_length", default) for part in ("key", "value")]
    short = [_number(info, f"attention.{part}_length_swa", full[i]) for i, part in enumerate(("key", "value"))]
    latent = _number(info, "attention.key_length_mla") > 0 and _number(info, "attention.value_length_mla") > 0
    windows, recurrent = _windows(info), _recurrent(info, heads_kv)
    n_with_kv = {"gemma3n": 20, "gemma4": n - _number(info, "attention.shared_kv_layers")}.get(architecture, n)
    # Of hybrids, layers that only draft get no cache from llama.cpp.
    n_trunk = n_computed_layers(info)
    state_bytes = _state_bytes(info)
    caches = []
    for layer in range(n):
        key, value = full if windows[layer] is None else short
        attends = architecture in _BOTH or not recurrent[layer]
        if layer >= n_with_kv or (layer >= n_trunk and any(recurrent)):
            attends = False
        n_heads_kv = heads_kv[layer] if attends else 0
        caches.append(
            LayerCache(
                n_heads_kv * key,
                0 if latent else n_heads_kv * value,
                n_heads_kv,
                windows[layer],
                state_bytes if recurrent[layer] and layer < n_trunk else 0,
            )
        )
    return caches
