"""The forecast for a cache of experts, against arithmetic by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from overspill import Error, Hardware, ModelInfo, forecast, plan_expert_cache

GIB = 1 << 30


@pytest.fixture
def gpt_oss_120b(header_path: Callable[[str], Path]) -> ModelInfo:
    """Return the header of gpt-oss-120b."""
    return ModelInfo.from_file(header_path("gpt-oss-120b"))


def test_hits_are_read_at_the_gpus_rate_and_misses_at_the_rams(gpt_oss_120b: ModelInfo) -> None:
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
    assert cache.cpu_s == pytest.approx(of_token / 47e9, rel=1e-3)
    assert cache.gpu_s == pytest.approx(of_token / 936e9, rel=1e-3)
    placement = cache.planned
    assert all(device == "CPU" for name, device in placement.tensors().items() if "_exps" in name), (
        "experts of the plan are in RAM"
    )
    planned_s = 1 / forecast(gpt_oss_120b, placement, hardware).tokens_per_s
    assert 1 / cache.tokens_per_s(0) == pytest.approx(planned_s)
    for share in (0.25, 0.73, 1.0):
        expected_s = planned_s + share * (of_token / 936e9 - of_token / 47e9)
        assert 1 / cache.tokens_per_s(share) == pytest.approx(expected_s, rel=1e-3)
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
    """Few are hidden behind computing, many are not."""
    hardware = Hardware.given(ram="128GiB", vram="24GiB", link="25GB/s", unpinned_link="10GB/s")
    cache = plan_expert_cache(gpt_oss_120b, hardware)
    # Mapped weights are registered with the driver where that is worth it, as a plan for such a model has it.
    assert cache.link_bytes_per_s == (25e9 if cache.planned.settings.pin_weights else 10e9)
    assert cache.tokens_per_s(0.7, 1) == cache.tokens_per_s(0.7)
    assert 1 / cache.tokens_per_s(0.7, 200) == pytest.approx(200 * cache.expert_bytes / cache.link_bytes_per_s)


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
