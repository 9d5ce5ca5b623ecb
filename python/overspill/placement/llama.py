"""A placement in llama.cpp's own terms."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LlamaPlacement"]


_MAX_GPUS = 16  # llama_max_devices()


_SERVER_FLAGS = {
    "n_ctx": "--ctx-size",
    "n_batch": "--batch-size",
    "n_ubatch": "--ubatch-size",
    "n_threads": "--threads",
    "type_k": "--cache-type-k",
    "type_v": "--cache-type-v",
    "flash_attention": "--flash-attn",
    "load_mode": "--load-mode",
    "rpc": "--rpc",
}


_SERVER_LOAD_MODES = {"read": "none", "direct-io": "dio"}


@dataclass(frozen=True, slots=True)
class LlamaPlacement:
    """A placement in llama.cpp's own terms."""

    devices: list[str]
    """GPUs in the order of their layers, then those that hold only overridden tensors."""
    tensor_split: list[int]
    """Layers of each of them; the output head counts as the last."""
    n_gpu_layers: int
    """Layers that are not on the CPU, the output head included."""
    overrides: list[tuple[str, str]]
    """Regular expressions (ECMAScript's) that find tensors by name, and their devices; the first that matches holds."""
