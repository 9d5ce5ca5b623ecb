"""The forecast for a cache of experts, against arithmetic by hand."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from overspill import Error, Hardware, ModelInfo, Placement, forecast, plan, plan_expert_cache

GIB = 1 << 30


@pytest.fixture
def gpt_oss_120b(header_path: Callable[[str], Path]) -> ModelInfo:
    """Return the header of gpt-oss-120b."""
    return ModelInfo.from_file(header_path("gpt-oss-120b"))


def drawn_layer_s(share: float, cpu_s: float, gpu_s: float, exchange_s: float) -> float:
    """Return the mean time of four experts, each of which the GPU has by chance, while the CPU reads the others."""
    draw, n, total = random.Random(0), 200_000, 0.0
    for _ in range(n):
        hits = sum(draw.random() < share for _ in range(4))
        total += max((4 - hits) / 4 * cpu_s, exchange_s + hits / 4 * gpu_s if hits else 0.0)
    return total / n


def test_hits_are_read_at_the_gpus_rate_while_misses_are_read_from_ram(gpt_oss_120b: ModelInfo) -> None:
    """4 of 128 experts of 36 layers, each of three matrices of 2880 x 2880 in MXFP4 and their biases."""
    hardware = Hardware.given(
        ram="128GiB", vram="24GiB", gpu_bandwidth="936GB/s", ram_bandwidth="47GB/s", link="25GB/s"
    )
    cache = plan_expert_cache(gpt_oss_120b, hardware)
    expert_bytes = 3 * 2880 * 2880 // 32 * 17 + 3 * 2880 * 4
    assert cache.expert_bytes == expert_bytes
    assert cache.experts_bytes == 36 * 128 * expert_bytes
    assert cache.resident_bytes(0.25) == 36 * 32 * expert_bytes
    of_token = 36 * 4 * expert_bytes
    placement = cache.planned
    assert all(device == "CPU" for name, device in placement.tensors().items() if "_exps" in name), (
        "experts of the plan are in RAM"
    )
    planned_s = 1 / forecast(gpt_oss_120b, placement, hardware).tokens_per_s
    assert 1 / cache.tokens_per_s(0) == pytest.approx(planned_s)
    cpu_s, gpu_s = of_token / 36 / 47e9, of_token / 36 / 936e9
    for share in (0.25, 0.73, 1.0):
        expected_s = planned_s + 36 * (drawn_layer_s(share, cpu_s, gpu_s, hardware.gpus[0].hop_s) - cpu_s)
        assert 1 / cache.tokens_per_s(share) == pytest.approx(expected_s, rel=0.01)
    use = placement.forecast().memory["GPU0"]
    assert cache.room_bytes == 24 * GIB - use.total_bytes - GIB


def test_what_only_drafts_and_other_gpus_do_not_count(gpt_oss_120b: ModelInfo) -> None:
    """A last layer that drafts has no experts for tokens; a cache is on the first GPU."""
    drafting = copy.copy(gpt_oss_120b)
    object.__setattr__(drafting, "metadata", {**gpt_oss_120b.metadata, "gpt-oss.nextn_predict_layers": 1})
    for name in ("expert_layers", "layers"):
        vars(drafting).pop(name, None)
    assert drafting.expert_layers == list(range(35))
    one = plan_expert_cache(drafting, Hardware.given(ram="128GiB", vram="24GiB"))
    assert one.experts_bytes == 35 * 128 * one.expert_bytes
    two = plan_expert_cache(gpt_oss_120b, Hardware.given(ram="128GiB", vram=["24GiB", "24GiB"]))
    use = two.planned.forecast().memory["GPU0"]
    assert two.room_bytes == use.free_bytes - use.total_bytes - use.margin_bytes


def test_copies_over_the_link_may_be_the_limit(gpt_oss_120b: ModelInfo) -> None:
    """Few cost their reads from RAM beside computing, of many the link is the limit."""
    hardware = Hardware.given(ram="128GiB", vram="24GiB", link="25GB/s", unpinned_link="10GB/s")
    cache = plan_expert_cache(gpt_oss_120b, hardware)
    # Mapped weights are registered with the driver where that is worth it, as a plan for such a model has it.
    assert cache.link_bytes_per_s == (25e9 if cache.planned.settings.pin_weights else 10e9)
    copy_s = 1 / cache.tokens_per_s(0.7, 1) - 1 / cache.tokens_per_s(0.7)
    assert copy_s == pytest.approx(cache.expert_bytes / hardware.cpu.bandwidth_bytes_per_s)
    slow = plan_expert_cache(gpt_oss_120b, Hardware.given(ram="128GiB", vram="24GiB", link="2GB/s"))
    assert 1 / slow.tokens_per_s(0.7, 200) == pytest.approx(200 * slow.expert_bytes / 2e9)


def test_what_cannot_be_planned_is_refused(header_path: Callable[[str], Path], gpt_oss_120b: ModelInfo) -> None:
    """Dense models, hardware without a GPU, and numbers out of range."""
    hardware = Hardware.given(ram="128GiB", vram="24GiB")
    with pytest.raises(Error, match="has no experts"):
        plan_expert_cache(ModelInfo.from_file(header_path("llama-3-8b")), hardware)
    with pytest.raises(Error, match="needs a GPU"):
        plan_expert_cache(gpt_oss_120b, Hardware.given(ram="128GiB"))
    cache = plan_expert_cache(gpt_oss_120b, hardware)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="hit_share must be 0 to 1"):
            cache.tokens_per_s(share)
    for n in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="insertions_per_token must be at least 0"):
            cache.tokens_per_s(0.5, n)


def test_plans_with_a_cache(gpt_oss_120b: ModelInfo) -> None:
    """All experts are in RAM, what the GPU has room for besides is the cache, and it is foretold and kept in files."""
    hardware = Hardware.given(ram="128GiB", vram="24GB", gpu_bandwidth="936GB/s", ram_bandwidth="47GB/s")
    cached = plan(gpt_oss_120b, hardware=hardware, experts="cached")
    static = plan(gpt_oss_120b, hardware=hardware, experts="static")
    chosen = plan(gpt_oss_120b, hardware=hardware, experts="auto")
    assert dict(static.expert_cache) == {}
    assert static.forecast().experts is None
    assert chosen == cached != static
    (n_bytes,) = cached.expert_cache.values()
    outlook = cached.forecast()
    assert outlook.memory["GPU0"].total_bytes + outlook.memory["GPU0"].margin_bytes == 24 * 10**9
    assert outlook.verdict == "partial GPU offload possible"
    assert outlook.experts is not None
    experts_bytes = plan_expert_cache(gpt_oss_120b, hardware).experts_bytes
    assert outlook.experts.resident_share == pytest.approx(n_bytes / experts_bytes)
    # Replays of gpt-oss-20b: 0.73 at 0.31 and 0.83 at 0.41.
    assert outlook.experts.hit_share == pytest.approx(0.73 + (outlook.experts.resident_share - 0.31), rel=1e-6)
    parts = outlook.seconds_by_term
    assert sum(sum(of_device.values()) for of_device in parts.values()) == pytest.approx(1 / outlook.tokens_per_s)
    assert parts["CPU"]["experts"] == pytest.approx(
        (1 - outlook.experts.hit_share) * static_experts_s(gpt_oss_120b, hardware)
    )
    assert outlook.tokens_per_s > 1.5 * static.forecast().tokens_per_s
    again = Placement.from_dict(json.loads(json.dumps(cached.to_dict())), gpt_oss_120b)
    assert again == cached
    assert forecast(gpt_oss_120b, again, hardware).experts == outlook.experts
    smaller = cached.for_hardware(Hardware.given(ram="128GiB", vram="12GB", gpu_bandwidth="936GB/s"))
    assert 0 < sum(smaller.expert_cache.values()) < n_bytes


def static_experts_s(info: ModelInfo, hardware: Hardware) -> float:
    """Return the seconds of a token in which the CPU reads experts, if all are in RAM."""
    return plan_expert_cache(info, hardware).planned.forecast().seconds_by_term["CPU"]["experts"]


def test_a_cache_is_planned_only_where_it_pays(gpt_oss_120b: ModelInfo, header_path: Callable[[str], Path]) -> None:
    """Not if all of the model fits, nor beside a link as slow as a network, nor for a dense model."""
    large = Hardware.given(ram="128GiB", vram="80GiB", gpu_bandwidth="2TB/s")
    assert not plan(gpt_oss_120b, hardware=large, experts="auto").expert_cache
    slow = Hardware.given(ram="128GiB", vram="24GiB", hop_s=3e-3)
    assert not plan(gpt_oss_120b, hardware=slow, experts="auto").expert_cache
    three = Hardware.given(ram="128GiB", vram="24GiB", gpu_bandwidth="936GB/s", ram_bandwidth="47GB/s")
    assert plan(gpt_oss_120b, hardware=three, experts="auto").expert_cache
    # Where copies are not from pinned memory, whoever decodes waits for them.
    vulkan = replace(three, devices=(replace(three.gpus[0], registers_host_memory=False), three.cpu))
    assert not plan(gpt_oss_120b, hardware=vulkan, experts="auto").expert_cache
    assert not plan(gpt_oss_120b, hardware=three, experts="auto", pin_weights=False).expert_cache
    assert plan(gpt_oss_120b, hardware=vulkan, experts="auto", load_mode="read").expert_cache
    dense = ModelInfo.from_file(header_path("llama-3-8b"))
    hardware = Hardware.given(ram="128GiB", vram="8GiB")
    assert not plan(dense, hardware=hardware, experts="auto").expert_cache
    with pytest.raises(Error, match="has no experts to cache"):
        plan(dense, hardware=hardware, experts="cached")
    with pytest.raises(Error, match="no GPU with room"):
        plan(gpt_oss_120b, hardware=Hardware.given(ram="128GiB"), experts="cached")
    with pytest.raises(ValueError, match="experts must be one of auto, static, cached, not 'all'"):
        plan(gpt_oss_120b, hardware=hardware, experts="all")  # type: ignore[arg-type]


def test_caches_are_checked(gpt_oss_120b: ModelInfo) -> None:
    """They are on GPUs that the placement knows, and have a size."""
    placement = Placement(gpt_oss_120b, ["CUDA0", "CUDA1"])
    placement.expert_cache = {"cuda1": 1 << 30, "gpu": 0}
    assert placement.expert_cache == {"CUDA1": 1 << 30}
    for pools, message in (
        ({"CPU": 1}, "must be on GPUs"),
        ({"CUDA7": 1}, "CUDA7"),
        ({"CUDA0": -1}, "must be at least 0"),
        ([], "must be a mapping"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            placement.expert_cache = pools  # type: ignore[assignment]
    assert placement.expert_cache == {"CUDA1": 1 << 30}
