"""A cache of experts on a GPU: the same answers as without it, but for the rounding, and its memory comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from overspill import Device, Error, Model, OutOfMemoryError
from overspill._core import cpu_kernels
from overspill.engine.loading import wait_for_pinning

pytestmark = pytest.mark.skipif(cpu_kernels() == "llama.cpp", reason="this CPU has no kernels of ours")
OPTIONS: dict[str, Any] = {
    "offload": {"default": "gpu", "experts": "cpu"},
    "n_ctx": 512,
    "n_threads": 1,
    "flash_attention": "on",
}
CACHE: dict[str, Any] = {"experts": "cached", "expert_insertions": 64}
EXPERTS, ALL_EXPERTS_BYTES = 32, 3_440_640  # of the tiny gpt-oss
TOKENS = np.random.default_rng(3).integers(0, 8000, 48).tolist()
# The CPU's rounding and a GPU's differ by 0.02 of the largest logit for this model, and now and then another expert is
# chosen for it. Any two prompts differ by about 1.
ROUNDING = 0.05


def rows(model: Model) -> NDArray[np.float32]:
    """Return the logits after each of some tokens, decoded one by one."""
    return np.array([model.eval([token]).copy() for token in TOKENS])


@pytest.mark.parametrize("share", [0.4, 1.1])
def test_cached_experts_give_the_same_logits(gpu: str, tiny_gpt_oss_path: Path, share: float) -> None:
    """With a part of the experts resident, whichever, and with all of them."""
    with Model(tiny_gpt_oss_path, experts="static", **OPTIONS) as model:
        static = rows(model)
    size = {gpu: int(share * ALL_EXPERTS_BYTES) + 6 * 65536}
    with Model(tiny_gpt_oss_path, expert_cache=size, **CACHE, **OPTIONS) as model:
        wait_for_pinning(model._core)
        found = rows(model)
        counts = model._core.expert_counts()
        assert counts is not None
        assert counts.n_slots == counts.n_resident
        assert counts.n_slots == EXPERTS if share > 1 else 0.3 * EXPERTS <= counts.n_slots <= 0.5 * EXPERTS
        assert counts.n_hits > 0.2 * counts.n_requests
        for seed in range(5):
            model._core.shuffle_experts(seed)
            model.reset()
            again = rows(model)
            distances = np.abs(again - static).max(axis=1) / np.abs(static).max()
            assert np.median(distances) < ROUNDING
    distances = np.abs(found - static).max(axis=1) / np.abs(static).max()
    assert np.median(distances) < ROUNDING


def test_the_memory_of_a_cache_comes_back(gpu: str, tiny_gpt_oss_path: Path, device_now: Callable[[], Device]) -> None:
    """All of it, when the model is closed in the middle of a stream."""
    size = {gpu: 256 << 20}
    free_bytes = []
    for _ in range(3):
        with Model(tiny_gpt_oss_path, expert_cache=size, **CACHE, **OPTIONS) as model:
            rows(model)
            counts = model._core.expert_counts()
            assert counts is not None
            assert counts.n_hits > 0
            stream = model.stream("Once", max_tokens=64)
            next(stream)
            assert stream.stats.experts is not None
            before = device_now().free_bytes
        free_bytes.append(device_now().free_bytes)
        assert free_bytes[-1] - before >= 256 << 20
    assert free_bytes[0] - free_bytes[-1] < 8 << 20


def test_a_cache_that_is_refused_is_an_error(
    gpu: str, tiny_gpt_oss_path: Path, device_now: Callable[[], Device]
) -> None:
    """With the device and the bytes; the next load is as if nothing had been."""
    size = {gpu: device_now().total_bytes + (1 << 30)}
    with pytest.raises(OutOfMemoryError, match=rf"{gpu} refused \d+ MiB for a cache of experts") as raised:
        Model(tiny_gpt_oss_path, expert_cache=size, **CACHE, **OPTIONS)
    assert isinstance(raised.value, Error)
    assert raised.value.device == gpu
    with Model(tiny_gpt_oss_path, expert_cache={gpu: "2MB"}, **CACHE, **OPTIONS) as model:
        assert len(list(model.stream("Once", max_tokens=4))) > 0
