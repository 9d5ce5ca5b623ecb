"""llama.cpp's default chain in float64 and in the plainest way: full sorts, whole arrays."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from overspill import SamplingOptions

Floats = NDArray[np.float64]

EXACT = 1e-10  # what sums of a hundred thousand shares such as 1 / 201088 may be off


def edited(logits: NDArray[np.float32], options: SamplingOptions, history: list[int]) -> NDArray[np.float32]:
    """Return the logits after bias and penalties (not DRY)."""
    result = logits.copy()
    for token, bias in options.logit_bias.items():
        result[token] += np.float32(bias)
    last = history[-options.repeat_last_n :] if options.repeat_last_n > 0 else history if options.repeat_last_n else []
    for token in set(last):
        penalty = np.float32(options.repeat_penalty)
        result[token] = result[token] * penalty if result[token] <= 0 else result[token] / penalty
        count = np.float32(last.count(token))
        result[token] -= count * np.float32(options.frequency_penalty) + np.float32(options.presence_penalty)
    return result


def survivors(logits: NDArray[np.float32], options: SamplingOptions) -> tuple[NDArray[np.int64], Floats]:
    """Return the ids that are left of edited logits, the most likely first, and their probabilities."""
    ids = np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))
    x = logits[ids].astype(np.float64)
    size = len(ids)  # as llama.cpp counts, with those at -inf
    if options.top_n_sigma > 0 and size > 1:
        finite = x[x > -math.inf]
        x[x < x[0] - np.float32(options.top_n_sigma) * finite.std()] = -math.inf
    if options.top_k > 0:
        size = min(options.top_k, size)
        ids, x = ids[:size], x[:size]
    ids, x = ids[x > -math.inf], x[x > -math.inf]
    if options.typical_p < 1:
        p = softmax(x)
        distance = np.abs(-np.log(p) - entropy(p))
        order = np.lexsort((np.arange(len(x)), distance))
        n = (
            int(np.searchsorted(np.cumsum(p[order]), float(np.float32(options.typical_p)) * (1 + EXACT), side="right"))
            + 1
        )
        kept = np.sort(order[:n])
        ids, x = ids[kept], x[kept]
        size = len(ids)
    if options.top_p < 1:
        n = int(np.searchsorted(np.cumsum(softmax(x)), float(np.float32(options.top_p)) * (1 - EXACT), side="left")) + 1
        ids, x = ids[:n], x[:n]
        size = len(ids)
    if options.min_p > 0:
        kept = x >= x[0] + math.log(np.float32(options.min_p))
        ids, x = ids[kept], x[kept]
        size = len(ids)
    if options.xtc_probability == 1 and options.xtc_threshold <= 0.5:
        n_likely = int((softmax(x) >= np.float32(options.xtc_threshold)).sum())
        ids, x = ids[max(n_likely - 1, 0) :], x[max(n_likely - 1, 0) :]
        size -= max(n_likely - 1, 0)
    temperature = options.temperature
    if options.dynamic_temperature_range > 0:
        uncertainty = entropy(softmax(x)) / math.log(size) if size > 1 else 0.0
        low = max(0.0, temperature - options.dynamic_temperature_range)
        high = temperature + options.dynamic_temperature_range
        temperature = low + (high - low) * uncertainty**options.dynamic_temperature_exponent
    if temperature == 0:
        return ids[:1], np.ones(1)
    return ids, softmax(x / temperature)


def mirostat_survivors(
    logits: NDArray[np.float32], options: SamplingOptions
) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
    """Return the ids that Mirostat starts with, their probabilities, and ids too near to its limit to tell."""
    x = logits.astype(np.float64) / options.temperature
    surprise = -np.log2(np.maximum(softmax(x), 1e-300))
    mu = 2 * options.mirostat_tau
    ids = np.flatnonzero(surprise <= mu)
    if not len(ids):
        ids = np.array([x.argmax()])
    return ids, softmax(x[ids]), np.flatnonzero(np.abs(surprise - mu) < 1e-5)


def softmax(x: Floats) -> Floats:
    """Return probabilities."""
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum(), np.float64)


def entropy(p: Floats) -> float:
    """Return it in nats."""
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum())
