"""Models with a cache of experts on a GPU: loaded with so many slots, and what they answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

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
def loaded(
    path: Path, gpu: str, *, n_slots: int = 0, memory_folder: Path | None = None, **options: Any
) -> Iterator[Model]:
    """Load a model with its experts in RAM, and with so many slots for them on the GPU; with none without a cache.

    What was resident is remembered in ``memory_folder``; without one nothing is.
    """
    if n_slots > 0:
        pools = {gpu: pool_bytes(ModelInfo.from_file(path), n_slots)}
        options = {"experts": "cached", "expert_cache": pools, "expert_insertions": UNLIMITED, **options}
    else:
        options = {"experts": "static", **options}
    placement = {"default": "gpu", "experts": "cpu"}
    with TemporaryDirectory() as none, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(memory_folder or none))
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


@dataclass(frozen=True)
class Replayed:
    """What a replay that begins with nothing resident says."""

    hits: npt.NDArray[np.int64]  # of each token
    n_insertions: int


def replayed(routes: Routes, n_experts: int, n_slots: int) -> Replayed:
    """Replay the policy of the cache, with slots divided as there."""
    ids = routes.astype(np.uint16)
    layers_of: dict[int, list[int]] = {}
    for layer, capacity in enumerate(slots_by_layer(n_slots, ids.shape[1])):
        layers_of.setdefault(capacity, []).append(layer)

    def first(n_tokens: int) -> tuple[int, int]:
        n_hits = n_insertions = 0
        for capacity, layers in layers_of.items():
            part = np.ascontiguousarray(ids[:n_tokens, layers])
            found = _core.replay_experts(part, n_experts, _core.CachePolicy.second_touch, capacity)
            n_hits += sum(found.n_hits)
            n_insertions += sum(found.n_insertions)
        return n_hits, n_insertions

    hits = [first(n)[0] for n in range(len(ids) + 1)]
    return Replayed(np.diff(hits), first(len(ids))[1])


@dataclass(frozen=True)
class Decoded:
    """What a cache has answered."""

    begin: int  # the first of the tokens
    hits: npt.NDArray[np.int64]  # of each token
    requests: npt.NDArray[np.int64]
    n_insertions: int


def decode_routed(path: Path, gpu: str, n_slots: int, n_tokens: int, **options: Any) -> Iterator[Decoded]:
    """Decode the tokens of a routed model one by one.

    Where the model finds that it is faster without the cache, and uses it no longer, another one begins with nothing
    resident.
    """
    begin = 0
    while begin < n_tokens:
        hits, requests = [0], [0]
        with loaded(path, gpu, n_slots=n_slots, **options) as model:
            for token in range(begin, n_tokens):
                model.eval([token])
                found = counts(model)
                hits.append(found.n_hits)
                requests.append(found.n_requests)
                if found.is_off:
                    break
            assert found.n_slots == n_slots
            assert found.n_tokens == len(hits) - 1
        yield Decoded(begin, np.diff(hits), np.diff(requests), found.n_insertions)
        begin += len(hits) - 1
