"""A GPU's memory: given back, and refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from overspill import Device, Hardware, Model, OutOfMemoryError, plan

Scarce = Callable[[int], AbstractContextManager[None]]
MIB = 1 << 20
# Less than the model takes, and no more than what CUDA gives out at once.
SCRAPS = 2 * MIB


def greedy(model: Model) -> list[int]:
    """Return the tokens that a model says."""
    return [token.id for token in model.generate("Once upon a time", temperature=0, max_tokens=12).tokens]


def test_memory_is_given_back(gpu: str, tiny_gpt_oss_path: Path, device_now: Callable[[], Device]) -> None:
    """After each load, whether the model was closed or dropped, as much is free as after the one before."""
    free_bytes = []
    for number in range(6):
        model = Model(tiny_gpt_oss_path, offload="gpu", n_ctx=512, n_threads=1)
        in_use = model.memory[gpu].total_bytes
        stream = model.stream("Once upon a time")
        next(stream)
        assert in_use > 8 * MIB
        if number % 2:
            model.close()
        del model, stream
        free_bytes.append(device_now().free_bytes)
    # The first load makes what a process keeps for good: CUDA's context, its kernels, cuBLAS.
    lost = [before - after for before, after in pairwise(free_bytes[1:])]
    if device_now().backend == "StandIn":
        assert lost == [0] * 4
    else:  # other programs take and give back memory of a real GPU, but not each time
        assert median(lost) <= 0


def test_no_room_for_the_model(gpu: str, tiny_gpt_oss_path: Path, scarce_memory: Scarce) -> None:
    """Who asks for the GPU is told which one refused how much; afterwards there is room again."""
    options = {"offload": "gpu", "n_ctx": 512, "n_threads": 1}
    with Model(tiny_gpt_oss_path, **options) as model:  # type: ignore[arg-type]
        expected = greedy(model)
    with scarce_memory(SCRAPS), pytest.raises(OutOfMemoryError, match=gpu) as caught:
        Model(tiny_gpt_oss_path, **options)  # type: ignore[arg-type]
    assert caught.value.device == gpu
    assert caught.value.needed_bytes > 0
    with Model(tiny_gpt_oss_path, **options) as model:  # type: ignore[arg-type]
        assert greedy(model) == expected


def test_a_plan_retreats(gpu: str, tiny_gpt_oss_path: Path, scarce_memory: Scarce) -> None:
    """What was planned for memory that is gone by now is planned again, with less of it."""
    here = Hardware.here(measure=False)
    # A GPU that is worth it, whatever this one is.
    fast = replace(here.device(gpu), bandwidth_bytes_per_s=1e12, rates={}, op_s=0, hop_s=0)
    slow = replace(here.cpu, bandwidth_bytes_per_s=1e9, rates={}, op_s=1e-6)
    planned = plan(tiny_gpt_oss_path, hardware=replace(here, devices=(fast, slow)), n_ctx=512)
    assert planned.bytes_by_device()[gpu] > SCRAPS
    with Model(tiny_gpt_oss_path, offload="cpu", n_ctx=512, n_threads=1) as model:
        expected = greedy(model)
    with (
        scarce_memory(SCRAPS),
        Model(tiny_gpt_oss_path, offload=planned, n_ctx=512, n_threads=1) as model,
    ):
        assert model.placement.bytes_by_device().get(gpu, 0) <= SCRAPS
        assert greedy(model) == expected


def test_no_room_for_a_second_stream(gpu: str, tiny_gpt_oss_path: Path, scarce_memory: Scarce) -> None:
    """It waits for the place of the first, whose caller does something else; the first and the model go on."""
    with Model(tiny_gpt_oss_path, offload="gpu", n_ctx=32768, n_threads=1) as model:
        expected = greedy(model)
        with model.stream("Once upon a time", temperature=0, max_tokens=12) as first:
            tokens = [next(first).id]
            with scarce_memory(SCRAPS):
                assert next(model.stream("Rain in")).id >= 0
                tokens += [next(first).id, next(first).id]
            tokens += [token.id for token in first]
        assert tokens == expected
        assert next(model.stream("Rain in")).id >= 0
