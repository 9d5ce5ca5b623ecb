"""Options, logits and masks that bring out what can go wrong in a sampler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overspill import SamplingOptions

PLAIN = SamplingOptions(temperature=1, top_k=0, top_p=1, min_p=0, seed=1)

# Each sampler on its own; combinations are drawn from all.
ALONE: dict[str, list[dict[str, Any]]] = {
    "temperature": [{"temperature": t} for t in (0.0, 0.1, 0.8, 1.0, 3.0)],
    "dynamic": [
        {"dynamic_temperature_range": r, "dynamic_temperature_exponent": e}
        for r, e in ((0.5, 1.0), (1.0, 2.0), (2.0, 0.5))
    ],
    "top_k": [{"top_k": k} for k in (1, 2, 40, 1000, 10**6)],
    "top_p": [{"top_p": p} for p in (0.0, 0.1, 0.5, 0.95, 0.999)],
    "min_p": [{"min_p": p} for p in (0.001, 0.05, 0.5, 1.0)],
    "typical": [{"typical_p": p} for p in (0.2, 0.5, 0.95)],
    "sigma": [{"top_n_sigma": n} for n in (0.5, 1.0, 2.5)],
    "xtc": [{"xtc_probability": 1.0, "xtc_threshold": t} for t in (0.01, 0.1, 0.3)],
    "penalties": [
        {"repeat_penalty": 1.3, "repeat_last_n": -1},
        {"frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"repeat_penalty": 0.8, "frequency_penalty": -0.3, "repeat_last_n": 8},
    ],
    "bias": [{"logit_bias": {0: 3.0, 3: -math.inf, 6: -1.5}}, {"logit_bias": {5: 100.0}}],
}
SIZES = [7, 16, 33, 255, 256, 257, 1000, 4097]
LARGE_SIZES = [32000, 201088, 262144]


def rows(random: np.random.Generator, n: int) -> NDArray[np.float32]:
    """Return logits of one of the shapes that make trouble, or of a model's."""
    shape = random.choice(["normal", "flat", "peaked", "ties", "equal", "infinite", "one", "offset", "zipf"])
    x = random.normal(0, 3, n)
    if shape == "flat":
        x = random.normal(0, 0.3, n)
    elif shape == "peaked":
        x[random.integers(n, size=min(n, 5))] += random.uniform(5, 25, min(n, 5))
    elif shape == "ties":
        x = np.round(x)
    elif shape == "equal":
        x[:] = 1.5
    elif shape == "infinite":
        x[random.random(n) < 0.5] = -math.inf
        x[random.integers(n)] = 1.0
    elif shape == "one":
        x[:] = -math.inf
        x[random.integers(n)] = -3.0
    elif shape == "offset":
        x += 500
    elif shape == "zipf":
        x = -np.log(random.permutation(n) + 1.0) * random.uniform(0.8, 2.5)
    return x.astype(np.float32)


def mask_of(random: np.random.Generator, n: int) -> NDArray[np.uint32]:
    """Return the bits of a few allowed tokens, or of most."""
    allowed = random.random(n) < random.choice([0.02, 0.5, 0.98])
    allowed[random.integers(n)] = True
    return np.packbits(np.pad(allowed, (0, -n % 32)), bitorder="little").view("<u4").astype(np.uint32)


def masked(x: NDArray[np.float32], allowed: NDArray[np.uint32] | None) -> NDArray[np.float32]:
    """Return the logits with -inf where a token is not allowed."""
    if allowed is None:
        return x
    bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), bitorder="little")[: len(x)]
    return np.where(bits, x, -np.inf).astype(np.float32)
