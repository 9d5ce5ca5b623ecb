"""Placements of each kind, for tests that load a model with them."""

from __future__ import annotations

from typing import Any


def placements(first: str, second: str | None = None, *, n_layers: int, experts: bool) -> dict[str, dict[str, Any]]:
    """Return mappings for ``offload`` onto one device or two, by what they are about."""
    weights = ("attention", "dense", "experts") if experts else ("attention", "dense")
    half = n_layers // 2
    cases: dict[str, dict[str, Any]] = {
        "all on the CPU": {},
        "all on a device": {"default": first},
        "the last half on a device": {f"layers {half}-{n_layers - 1}": first},
        "attention on the CPU": {"default": first, "attention": "cpu", "kv": "cpu"},
        "every other layer's weights on the CPU": {
            "default": first,
            **{f"layers {layer}": dict.fromkeys(weights, "cpu") for layer in range(0, n_layers, 2)},
        },
        "the output alone": {"output": first},
        "the KV cache alone": {"kv": first},
        "all but the KV cache": {"default": first, "kv": "cpu"},
        "half of each FFN": {"default": first, "/ffn_down/": "cpu"},
        "the embedding too": {"default": first, "embedding": first},
    }
    if experts:
        cases["experts on the CPU"] = {"default": first, "experts": "cpu"}
        cases["only experts on a device"] = {"experts": first}
    if second is not None:
        cases["on two devices"] = {"default": "gpu"}
        cases["two devices by part"] = {"default": first, **dict.fromkeys(weights[1:], second)}
        cases["the output on the other"] = {"default": first, "output": second}
    return cases
