"""Models with a cache of experts on a GPU: loaded with so many slots, and what they answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from header_files import Routes
from model_fixtures import N_THREADS
from overspill import Model, ModelInfo, _core

# More than any token misses, so that time does not decide what is inserted.
UNLIMITED = 65536
# What a pool leaves for the padding of its tensors, and against rounding down.
PADDING = 6 * 65536 + 1024


def pool_bytes(info: ModelInfo, n_slots: int) -> int:
    """Return the size of a pool with so many slots, for a model whose experts are alike in all layers."""
    (experts_bytes,) = {info.layers[layer]["experts"] for layer in info.expert_layers}
    return n_slots * (experts_bytes // info.n_experts) + PADDING


@contextmanager
def loaded(path: Path, gpu: str, *, n_slots: int = 0, **options: Any) -> Iterator[Model]:
    """Load a model with its experts in RAM, and with so many slots for them on the GPU; with none without a cache."""
    if n_slots > 0:
        pools = {gpu: pool_bytes(ModelInfo.from_file(path), n_slots)}
        options = {"experts": "cached", "expert_cache": pools, "expert_insertions": UNLIMITED, **options}
    else:
        options = {"experts": "static", **options}
    placement = {"default": "gpu", "experts": "cpu"}
    with Model(path, **{"offload": placement, "n_ctx": 1024, "n_threads": N_THREADS, **options}) as model:
        yield model


def counts(model: Model) -> _core.ExpertCounts:
    """Return what the model's cache has answered so far."""
    found = model._core.expert_counts()
    assert found is not None
    return found


def slots_by_layer(n_slots: int, n_layers: int) -> list[int]:
    """Return how a cache divides its slots between layers that are alike: the first ones have one more."""
    return [n_slots // n_layers + (layer < n_slots % n_layers) for layer in range(n_layers)]


def replayed(routes: Routes, n_experts: int, n_slots: int) -> npt.NDArray[np.int64]:
    """Return the hits of each token in a replay that begins with nothing resident."""
    ids = routes.astype(np.uint16)
    by_capacity: dict[int, list[int]] = {}
    for layer, capacity in enumerate(slots_by_layer(n_slots, ids.shape[1])):
        by_capacity.setdefault(capacity, []).append(layer)

    def hits(n_tokens: int) -> int:
        return sum(
            sum(_core.replay_experts(part, n_experts, _core.CachePolicy.second_touch, capacity).n_hits)
            for capacity, part in parts
            for part in [np.ascontiguousarray(part[:n_tokens])]
        )

    parts = [(capacity, ids[:, layers]) for capacity, layers in by_capacity.items()]
    return np.diff([hits(n) for n in range(len(ids) + 1)])
