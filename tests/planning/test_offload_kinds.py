"""What ``offload`` stands for, which is the same for a model, a comparison and a cascade."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

import overspill
from overspill import Cascade, Error, Model, ModelInfo, Placement, forecast, plan
from overspill.base.values import DEFAULT_LOAD_MODE
from overspill.machine.hardware import Hardware
from overspill.planning.offload import Offload, place_and_forecast, placement_for, tuned_beside
from overspill.planning.tuned import save_tuned

GIB = 1 << 30
HARDWARE = Hardware.given(ram=64 * GIB, vram=[8 * GIB, 8 * GIB], link="12GB/s")
NO_GPU = Hardware.given(ram=64 * GIB)
SETTINGS = {"n_ctx": 4096, "n_ubatch": 256, "type_k": "q8_0", "type_v": "q8_0", "load_mode": "read"}
SETTINGS |= {"offload_min_batch": 64}
REST = {"n_threads": 1, "flash_attention": "on", "repack": "off", "kernels": "auto"}


@pytest.fixture(scope="module")
def info(header_path: Callable[[str], Path]) -> ModelInfo:
    """Return the header of gpt-oss-20b."""
    return ModelInfo.from_file(header_path("gpt-oss-20b"))


@pytest.fixture
def tuned(info: ModelInfo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Placement:
    """Keep a placement and settings as tuned, and return the placement."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    placement = Placement.gpu(info, HARDWARE)
    placement.layers[:7].experts = "cpu"
    save_tuned(info, placement, {**SETTINGS, **REST}, 1.0)
    return placement


def not_asked() -> NoReturn:
    """Stand for hardware that must not be measured."""
    raise AssertionError


def test_each_kind(info: ModelInfo) -> None:
    """Only "auto" asks for the hardware; what leaves the GPUs alone is no placement."""
    gpus, mapping = HARDWARE.gpus, {"default": "gpu", "experts": "cpu"}
    given = Placement.from_layers(info, gpus, 3)
    expected: list[tuple[Offload, Placement | None]] = [
        ("cpu", None),
        (0, None),
        ("gpu", Placement.gpu(info, gpus)),
        (5, Placement.from_layers(info, gpus, 5)),
        (mapping, Placement.from_mapping(info, gpus, mapping)),
        (given, given),
    ]
    for offload, placement in expected:
        assert placement_for(info, offload, gpus, not_asked) == placement
    assert placement_for(info, "auto", gpus, lambda: HARDWARE, n_ctx=4096) == plan(info, hardware=HARDWARE, n_ctx=4096)
    for alone in ("auto", "cpu", 5, {"experts": "cpu"}):
        assert (placement_for(info, alone, [], not_asked) or Placement.cpu(info)) == Placement.cpu(info)


@pytest.mark.parametrize("offload", [True, -1, 2**31, 1.5, None, "some", ["cpu"]], ids=repr)
def test_other_kinds(info: ModelInfo, offload: Any) -> None:
    """They are mistakes, with one text for all that take an offload."""
    texts = set()
    for take in (
        lambda: placement_for(info, offload, HARDWARE.gpus, not_asked),
        lambda: place_and_forecast(info, HARDWARE, {"offload": offload}),
    ):
        with pytest.raises(ValueError, match="offload must be") as caught:
            take()
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_what_is_not_there(info: ModelInfo) -> None:
    """No GPU, another device, and another model's placement."""
    with pytest.raises(Error, match='offload="gpu", but there is no GPU here'):
        placement_for(info, "gpu", [], not_asked)
    with pytest.raises(ValueError, match="uses CUDA7"):
        placement_for(info, Placement.gpu(info, ["CUDA7"]), HARDWARE.gpus, not_asked)
    with pytest.raises(ValueError, match="device must be one of"):
        placement_for(info, {"experts": "CUDA7"}, HARDWARE.gpus, not_asked)
    other = ModelInfo(info.metadata, info.tensors[:-1], info.files, info.file_bytes)
    with pytest.raises(ValueError, match="this placement is for"):
        placement_for(info, Placement.cpu(other), HARDWARE.gpus, not_asked)


def test_tuned(info: ModelInfo, tuned: Placement) -> None:
    """The placement that was kept, and the settings that are not given; batches stay within ``n_batch``."""
    placement, settings = tuned_beside(info, {"n_ctx": None, "load_mode": DEFAULT_LOAD_MODE})
    assert placement == tuned
    assert settings == {**SETTINGS, **REST}
    given = {"n_ctx": 128, "type_k": "f16", "load_mode": "mmap", "n_batch": 64}
    rest = {name: value for name, value in settings.items() if name not in given}
    assert tuned_beside(info, given)[1] == {**rest, "n_ubatch": 64}


def test_nothing_is_tuned(info: ModelInfo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is no reason to plan something else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Error, match="nothing is tuned for this model"):
        place_and_forecast(info, HARDWARE, {"offload": "tuned"})


def test_forecasts(info: ModelInfo, tuned: Placement) -> None:
    """They are those for the placement with the settings that a load would have."""
    planned = plan(info, hardware=HARDWARE, n_ctx=2048, n_ubatch=64)
    options = {"n_ctx": 2048, "n_batch": 64, "n_ubatch": None, "progress": print}
    assert place_and_forecast(info, HARDWARE, options) == (planned, planned.forecast())
    for offload, placement in (
        ("cpu", Placement.cpu(info)),
        (5, Placement.from_layers(info, HARDWARE, 5)),
        (planned, planned),
    ):
        for switch in ("auto", "off"):
            found = place_and_forecast(info, HARDWARE, {**options, "offload": offload, "pin_weights": switch})
            # Where a GPU copies weights from RAM, as a load would do it.
            pins = switch == "auto" and bool(found[1].weights_in_ram)
            expected = forecast(info, placement, HARDWARE, n_ctx=2048, n_ubatch=64, pin_weights=pins)
            assert found == (placement, expected)
    settings: dict[str, Any] = {**SETTINGS, "n_ctx": 1024}
    found = place_and_forecast(info, HARDWARE, {"offload": "tuned", "n_ctx": 1024})
    assert found == (tuned, forecast(info, tuned, HARDWARE, **settings))
    assert place_and_forecast(info, NO_GPU, {"offload": 5, "n_ctx": 1024})[1].verdict == "CPU only"


@pytest.mark.parametrize(
    ("offload", "text"),
    [("some", "offload must be"), ("gpu", "there is no GPU here"), ("tuned", "nothing is tuned for this model")],
)
def test_the_same_text_everywhere(
    tiny_gpt_oss_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offload: Any, text: str
) -> None:
    """A model, a cascade and a comparison say it alike; a comparison goes on with the models that can be loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if offload == "gpu" and any(device.is_gpu for device in overspill.devices()):
        pytest.skip("there is a GPU")
    path, options = str(tiny_gpt_oss_path), dict[str, Any](n_ctx=64, n_threads=1)
    with pytest.raises((Error, ValueError), match=text) as caught:
        Model(path, offload=offload, **options)
    with pytest.raises((Error, ValueError)) as of_cascade:
        Cascade(path, path, offload=offload, **options)
    assert str(of_cascade.value) == str(caught.value)
    if offload == "some":
        with pytest.raises(ValueError) as of_comparison:
            overspill.compare([path, path], "x", offload=[offload, "cpu"], max_tokens=1, **options)
        assert str(of_comparison.value) == str(caught.value)
    else:
        found = overspill.compare([path, path], "x", offload=[offload, "cpu"], max_tokens=1, **options)
        assert [one.problem for one in found.models] == [str(caught.value), ""]
