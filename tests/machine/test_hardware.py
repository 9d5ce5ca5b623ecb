"""Hardware that is given, and hardware that is measured."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

import overspill
from model_files import EXPERT_WIDTH, EXPERTS, EXPERTS_USED, HEAD_WIDTH, HEADS, HEADS_KV, WIDTH
from overspill import Model, ModelInfo, _core
from overspill.base.values import Kernels, Switch
from overspill.machine.hardware import DeviceSpec, Hardware
from overspill.machine.measure import weight_shapes
from programs import python_environment

# They count what is measured, on this machine's CPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

GIB = 2**30
# docs/design.md names them.
OURS = {"mxfp4", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs", "q8_0", "q4_K", "q5_K", "q6_K"}


@pytest.fixture(autouse=True)
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache folder of its own; return the file that measurements are kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # What is measured here is to be kept, whatever else this machine is doing.
    monkeypatch.setattr("overspill.machine.measure._MOST_INTERRUPTIONS_PER_S", math.inf)
    return tmp_path / "cache" / "overspill" / "hardware.json"


@pytest.fixture(scope="module")
def info(tiny_gpt_oss_path: Path) -> ModelInfo:
    """Return the header of the tiny gpt-oss."""
    return ModelInfo.from_file(tiny_gpt_oss_path)


def meter(device: str = "CPU", *, working_set_bytes: int = 16 << 20) -> _core.DeviceMeter:
    """Return one that is quick rather than right."""
    return _core.DeviceMeter(device, n_threads=1, working_set_bytes=working_set_bytes, gpus=[], budget_s=1e-6)


# --- given hardware ----------------------------------------------------------------------------


def test_given() -> None:
    """What is said is what is there; what is not said is assumed, and called so."""
    full = {"gpu_bandwidth": "1008GB/s", "ram_bandwidth": "89.6GB/s", "link": "25GB/s", "hop_s": 2e-5, "op_s": 1e-6}
    full |= {"unpinned_link": "8GB/s", "gpu_flops": 30e12, "cpu_flops": 0.3e12}
    hardware = Hardware.given(vram="24GiB", ram="128GiB", n_threads=8, **full)  # type: ignore[arg-type]
    assert (hardware.source, hardware.n_threads, len(hardware.gpus)) == ("given", 8, 1)
    gpu = DeviceSpec("GPU0", "gpu", 24 * GIB, 1008e9, {}, 1e-6, 2e-5, 25e9, "", True, True)
    assert hardware.gpus[0] == replace(gpu, unpinned_link_bytes_per_s=8e9, flops_per_s=30e12)
    assert hardware.cpu == DeviceSpec("CPU", "cpu", 128 * GIB, 89.6e9, {}, 1e-6, flops_per_s=0.3e12)
    more = {"unpinned_link": "6GB/s", "gpu_flops": 1e12, "cpu_flops": 2e11}
    (gpu,), cpu = (hardware := Hardware.given(vram="24GiB", ram="128GiB", **more)).gpus, hardware.cpu  # type: ignore[arg-type]
    assert (gpu.copy_bytes_per_s(pinned=True), gpu.copy_bytes_per_s(pinned=False)) == (25e9, 6e9)
    assert (gpu.batch_flops("q8_0"), cpu.batch_flops("mxfp4:experts")) == (1e12, 2e11)
    slow = Hardware.given(vram="24GiB", ram="128GiB", link="3GB/s").gpus[0]
    assert slow.copy_bytes_per_s(pinned=False) == 3e9  # never faster than what is pinned
    known = replace(gpu, flops={"q8_0": 3e12, "mxfp4:experts": 2e12})
    assert [known.batch_flops(key) for key in ("q8_0", "q8_0:experts", "mxfp4:experts", "mxfp4")] == [
        *(3e12, 3e12, 2e12, 1e12),
    ]
    assert Hardware.given(vram="24GiB", ram="128GiB").source == "assumed"
    assert Hardware.given(ram="8GiB", ram_bandwidth=40e9, op_s=0, cpu_flops=1e12).source == "given"
    assert Hardware.given(ram="8GiB", ram_bandwidth=40e9, roofline=True, op_s=0).source == "given"
    assert {Hardware.given(**{**full, left_out: None}, vram="24GiB", ram="8GiB").source for left_out in full} == {  # type: ignore[arg-type]
        "assumed"
    }


def test_several_gpus() -> None:
    """One rate is for all, a list has one for each; without VRAM there is no GPU."""
    hardware = Hardware.given(vram=["24GiB", "16 GB"], ram=GIB, gpu_bandwidth=["936GB/s", 500e9], link="12GB/s")
    assert [gpu.name for gpu in hardware.gpus] == ["GPU0", "GPU1"]
    assert [gpu.memory_bytes for gpu in hardware.gpus] == [24 * GIB, 16_000_000_000]
    assert [gpu.bandwidth_bytes_per_s for gpu in hardware.gpus] == [936e9, 500e9]
    assert [gpu.link_bytes_per_s for gpu in hardware.gpus] == [12e9, 12e9]
    assert Hardware.given(ram=GIB).gpus == Hardware.given(ram=GIB, vram=0).gpus == ()
    with pytest.raises(ValueError, match="gpu_bandwidth must be one rate, or one for each of the 3 GPUs, not 2"):
        Hardware.given(vram=[GIB] * 3, ram=GIB, gpu_bandwidth=[1e9, 1e9])


def test_roofline() -> None:
    """Bytes over bandwidth, and nothing else."""
    roofline = Hardware.given(vram="24GiB", ram="128GiB", roofline=True)
    assert all(device.op_s == device.hop_s == 0 for device in roofline.devices)
    usual = Hardware.given(vram="24GiB", ram="128GiB")
    assert usual.gpus[0].hop_s > 0
    assert usual.cpu.hop_s == 0


def test_device_names() -> None:
    """In any case, and by what they are."""
    hardware = Hardware.given(vram=[GIB, GIB], ram=GIB)
    assert hardware.device("gpu") is hardware.device("gpu0") is hardware.gpus[0]
    assert hardware.device("GPU1") is hardware.gpus[1]
    assert hardware.device("Cpu") is hardware.cpu
    with pytest.raises(ValueError, match="device must be one of GPU0, GPU1, CPU, not CUDA7"):
        hardware.device("CUDA7")
    with pytest.raises(ValueError, match="device must be one of CPU, not gpu"):
        Hardware.given(ram=GIB).device("gpu")
    assert hardware.without({"gpu": 1, "cpu": 2}) == hardware.without({"GPU0": 1, "CPU": 2}) != hardware
    with pytest.raises(ValueError, match="taken must be one of GPU0, GPU1, CPU, not banana"):
        hardware.without({"banana": 1})


def test_json_round_trip() -> None:
    """Strict JSON, so an endless link is null."""
    hardware = Hardware.given(vram=["24GiB", "8GiB"], ram="64GiB", gpu_bandwidth=[936e9, 400e9])
    gpu, *others, cpu = hardware.devices
    cpu = replace(cpu, rates={"q8_0": 3e10}, plain_reads={"q8_0": 4e10})
    hardware = replace(hardware, devices=(replace(gpu, rates={"q8_0": 5e11}), *others, cpu))
    text = json.dumps(hardware.to_dict(), allow_nan=False)
    assert Hardware.from_dict(json.loads(text)) == hardware
    assert json.loads(text)["devices"][-1]["link_bytes_per_s"] is None
    assert hardware.device("gpu").rate("q8_0") == 5e11
    assert hardware.device("gpu").rate("q4_K") == 936e9


@pytest.mark.parametrize(
    "damage",
    [
        {"devices": []},
        {"devices": None},
        {"source": "guessed"},
        {"n_threads": 0},
        {"n_threads": "many"},
        {"devices": [{"name": "CPU"}]},
    ],
)
def test_damaged_json(damage: dict[str, object]) -> None:
    """What was not saved by this is a ValueError, whatever is wrong with it."""
    data = Hardware.given(vram=GIB, ram=GIB).to_dict()
    with pytest.raises(ValueError):
        Hardware.from_dict({**data, **damage})
    for figure in ("memory_bytes", "bandwidth_bytes_per_s", "op_s", "hop_s", "link_bytes_per_s"):
        broken = Hardware.given(vram=GIB, ram=GIB).to_dict()
        broken["devices"][0][figure] = -1
        with pytest.raises(ValueError, match=f"GPU0: {figure}"):
            Hardware.from_dict(broken)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e308, 0])
@pytest.mark.parametrize("device", [0, 1])
def test_extreme_figures(device: int, value: float) -> None:
    """Whichever figure is extreme, it is refused by its name, or can be saved and read again."""
    whole = Hardware.given(vram=GIB, ram=GIB).to_dict()
    figures = [key for key, known in whole["devices"][device].items() if key.endswith(("_s", "_bytes")) or known == {}]
    assert len(figures) > 7
    for figure in figures:
        changed = copy.deepcopy(whole)
        changed["devices"][device][figure] = {"q8_0": value} if changed["devices"][device][figure] == {} else value
        refused = ""
        try:
            hardware = Hardware.from_dict(changed)
        except ValueError as error:
            refused = str(error)
        assert figure in refused if refused else read_again(hardware) == hardware


def read_again(hardware: Hardware) -> Hardware:
    """Save it as strict JSON, and read that."""
    return Hardware.from_dict(json.loads(json.dumps(hardware.to_dict(), allow_nan=False)))


# --- memory ------------------------------------------------------------------------------------


def test_caps() -> None:
    """What a model may use is at most what is free, and at most what is allowed."""
    free = Hardware.here(measure=False)
    assert free.cpu.memory_bytes > 0
    assert Hardware.here(measure=False, memory={"cpu": "1MiB"}).cpu.memory_bytes == 2**20
    assert Hardware.here(measure=False, memory={"CPU": "1000TB"}).cpu.memory_bytes < 2**45
    with pytest.raises(ValueError, match=r"memory: there is no device 'CUDA7' here, only .*CPU"):
        Hardware.here(memory={"CUDA7": "1GiB"})
    with pytest.raises(ValueError, match=r"memory\['cpu'\] must have a unit"):
        Hardware.here(memory={"cpu": "24"})
    with pytest.raises(ValueError, match="n_threads must be 1 to 512, not 0"):
        Hardware.here(n_threads=0)
    with pytest.raises(ValueError, match=r"kv_type must be one of f32, f16, .*, not 'q9_9'"):
        Hardware.here(kv_type="q9_9")


# --- measuring ---------------------------------------------------------------------------------


def assert_sane(device: DeviceSpec, figures: set[str]) -> None:
    """Assert that it has these rates, and that no machine is faster or slower than they say."""
    assert set(device.rates) == figures
    for rate in (*device.rates.values(), device.bandwidth_bytes_per_s):
        assert 1e6 < rate < 2e12
    assert 0 < device.op_s < 0.1
    assert 0 <= device.hop_s < 1


def test_shapes(info: ModelInfo) -> None:
    """The largest of each kind is taken, and biases, norms and the embedding are not."""
    shapes = weight_shapes(info)
    assert shapes["mxfp4:experts"] == ("mxfp4", WIDTH, EXPERT_WIDTH, EXPERTS, EXPERTS_USED)
    assert shapes["f32"] == ("f32", WIDTH, EXPERTS, 0, 0)
    assert shapes["q8_0"][:2] == ("q8_0", WIDTH)
    assert set(shapes) == {"mxfp4:experts", "f32", "q8_0"}
    experts = {name for name, *_ in info.tensors if "_exps" in name}
    assert weight_shapes(info, experts) == {"mxfp4:experts": shapes["mxfp4:experts"]}
    assert weight_shapes(info, ()) == {}


def test_measuring_and_keeping(info: ModelInfo, cache_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second call measures nothing, and a third one only what is new."""
    caplog.set_level(logging.DEBUG, "overspill")
    shares: list[float] = []
    texts: list[str] = []

    def progress(text: str, share: float) -> None:
        texts.append(text)
        shares.append(share)

    first = Hardware.here(info, n_threads=1, progress=progress)
    assert first.source == "measured"
    assert first.cpu.link_bytes_per_s == math.inf
    assert_sane(first.cpu, {"mxfp4:experts", "q8_0", "f32", "f16:kv"})
    assert shares == sorted(shares)
    assert shares[0] == 0 < shares[-1] < 1
    assert all(text.startswith("CPU: ") for text in texts)

    def n_measured() -> int:
        found = [record for record in caplog.records if record.message.startswith("measured")]
        caplog.clear()
        return len(found)

    n_figures = 3 * 3 + 2 + 2  # of three types of weights and the KV cache; F16 weights and operations
    assert n_measured() == len(texts) == n_figures
    assert first.cpu.flops.keys() == first.cpu.rates.keys()
    assert all(flops > 0 for flops in first.cpu.flops.values())
    assert first.cpu.plain_reads.keys() == {"mxfp4:experts", "q8_0", "f32"}
    assert all(1e6 < rate < 2e12 for rate in first.cpu.plain_reads.values())
    written = cache_file.read_bytes()
    again = Hardware.here(info, n_threads=1, progress=progress)
    assert n_measured() == 0
    assert len(texts) == n_figures
    assert again.cpu == replace(first.cpu, memory_bytes=again.cpu.memory_bytes)
    assert cache_file.read_bytes() == written
    assert Hardware.here(info, n_threads=1, measure=False).source == "measured"
    assert Hardware.here(info, n_threads=1, kv_type="q8_0").cpu.rates.keys() == {*first.cpu.rates, "q8_0:kv"} - {
        "f16:kv"
    }
    assert n_measured() == 2
    Hardware.here(info, n_threads=1, refresh=True)
    assert n_measured() == n_figures


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not count how often a thread was interrupted")
def test_what_was_measured_beside_other_programs_is_not_kept(
    cache_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is used, with a warning, and measured again the next time."""
    monkeypatch.setattr("overspill.machine.measure._MOST_INTERRUPTIONS_PER_S", 20)
    spin = [sys.executable, "-c", "while True: pass"]
    with ExitStack() as others:
        for _ in range(2 * (os.cpu_count() or 1)):
            process = others.enter_context(subprocess.Popen(spin))
            others.callback(process.kill)
        assert Hardware.here(n_threads=1).source == "measured"
    assert "other programs kept the CPU busy" in caplog.text
    assert Hardware.here(n_threads=1, measure=False).source == "assumed"


def test_what_is_not_measured_is_assumed(info: ModelInfo, cache_file: Path) -> None:
    """It says so, and nothing is written."""
    hardware = Hardware.here(info, n_threads=1, measure=False)
    assert hardware.source == "assumed"
    assert hardware.cpu.rates == {}
    assert hardware.cpu.rate("q8_0") == hardware.cpu.bandwidth_bytes_per_s > 0
    assert not cache_file.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"format": 99, "devices": {}}',
        b'{"format": 2, "devices": []}',
        b'{"format": 2, "devices": {"x": {"y": "z"}}}',
        b'{"format": 2, "devices": {"x": {"y": NaN, "z": -1}}}',
    ],
)
def test_a_corrupt_cache_is_written_anew(content: bytes, cache_file: Path) -> None:
    """It is ignored, not trusted and not fatal."""
    cache_file.parent.mkdir(parents=True)
    cache_file.write_bytes(content)
    assert Hardware.here(measure=False).source == "assumed"
    assert cache_file.read_bytes() == content
    assert Hardware.here(n_threads=1).source == "measured"
    devices = json.loads(cache_file.read_bytes())["devices"]
    assert all(value > 0 for figures in devices.values() for value in figures.values())
    assert [file.name for file in cache_file.parent.iterdir()] == [cache_file.name]


def test_a_cache_that_cannot_be_written(cache_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The figures are right all the same, and a warning tells."""
    cache_file.parent.parent.mkdir(parents=True)
    cache_file.parent.write_text("a file where the folder should be")
    assert Hardware.here(n_threads=1).source == "measured"
    assert "could not be kept" in caplog.text


def test_an_interrupted_measurement_keeps_what_it_has(info: ModelInfo, cache_file: Path) -> None:
    """Ctrl-C between two measurements loses neither the first nor the exception."""

    def interrupt(text: str, share: float) -> None:
        if share > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Hardware.here(info, n_threads=1, progress=interrupt)
    (figures,) = json.loads(cache_file.read_bytes())["devices"].values()
    assert list(figures) == ["f16 4096x4096"]


@pytest.mark.parametrize("kernels", get_args(Kernels))
@pytest.mark.parametrize(("repack", "repacks"), [("auto", None), ("on", True), ("off", False)])
def test_weights_lie_where_llama_cpp_puts_them(
    tiny_gpt_oss_path: Path,
    info: ModelInfo,
    caplog: pytest.LogCaptureFixture,
    kernels: Kernels,
    repack: Switch,
    repacks: bool | None,
) -> None:
    """The buffers that are measured are those that llama.cpp says it loads into, repacked ones where it repacks."""
    caplog.set_level(logging.DEBUG, "overspill.llama")
    with Model(tiny_gpt_oss_path, n_ctx=64, n_threads=1, offload="cpu", kernels=kernels, repack=repack):
        pass
    loaded = set(re.findall(r"(\w+) model buffer size", caplog.text))
    one = meter()
    one.use_products(kernels, repacks)
    buffers = {shape[0]: one.weight_rate(*shape).buffer_type for shape in weight_shapes(info).values()}
    assert buffers["f32"] == "CPU"
    assert set(buffers.values()) == {name.replace("CPU_Mapped", "CPU") for name in loaded}


@pytest.mark.parametrize(
    "kind", ["f32", "f16", "bf16", "q4_0", "q5_1", "q8_0", "q2_K", "q6_K", "iq2_xxs", "iq4_nl", "mxfp4"]
)
def test_types(kind: str) -> None:
    """Types with and without scales, tables and repacked layouts can be measured, with experts and without."""
    one = meter()
    for shape in ((1024, 512, 0, 0), (1024, 512, 8, 2), (256, 1, 3, 3), (2048, 500_000, 0, 0), (1024, 1024, 1024, 8)):
        rate = one.weight_rate(kind, *shape)
        assert 1e6 < rate.bytes_per_s < 2e12
        assert rate.buffer_type.startswith(("CPU", "AMX"))


@pytest.mark.skipif(_core.cpu_kernels() == "llama.cpp", reason="this CPU has no kernels of ours")
def test_products_are_those_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of types that are ours, up to as many tokens as docs/design.md says, and from the file's layout alone."""
    ours = _core.cpu_kernels()
    one = meter()

    def kernels(kind: str, n_tokens: int = 1, n_experts: int = 0) -> str:
        return one.weight_rate(kind, 512, 64, n_experts, min(n_experts, 2), n_tokens).kernels

    one.use_products("auto", repack=False)
    for n_experts in (0, 4):
        assert [kernels(kind, 1, n_experts) for kind in ("mxfp4", "q8_0", "q4_K", "f16")] == [ours] * 3 + ["llama.cpp"]
    most_bytes, most_super_blocks = (None, 64) if ours.startswith("avx512") else (4, 8)
    assert kernels("q4_K", most_super_blocks) == ours
    assert kernels("q4_K", most_super_blocks + 1) == "llama.cpp"
    assert kernels("q8_0", most_bytes or 512) == ours
    assert most_bytes is None or kernels("q8_0", most_bytes + 1) == "llama.cpp"
    assert kernels("mxfp4", 512) == ours
    one.use_products("llama.cpp", repack=False)
    assert kernels("mxfp4") == "llama.cpp"
    one.use_products(ours, repack=True)
    repacked = one.weight_rate("q4_0", 512, 64, 0, 0)
    assert (repacked.kernels == ours) == (repacked.buffer_type == "CPU")
    with pytest.raises(ValueError, match=f"kernels must be one of auto, llama.cpp, .*{ours}.*, not mmx"):
        one.use_products("mmx", None)
    assert meter("CPU").weight_rate("f16", 512, 64, 0, 0).kernels == "llama.cpp"
    by_default = {kind for kind in OURS if meter().weight_rate(kind, 512, 64, 0, 0).kernels == ours}
    assert set(_core.cpu_kernel_types()) == by_default
    assert by_default == OURS or "AMX_INT8" in _core.cpu_features()
    monkeypatch.setenv("OVERSPILL_KERNELS", "llama.cpp")
    assert _core.cpu_kernel_types() == []
    assert meter().weight_rate("mxfp4", 512, 64, 0, 0).kernels == "llama.cpp"


def test_bad_measurements() -> None:
    """llama.cpp would end the process over some of these."""
    one = meter()
    for arguments, message in (
        (("i32", 64, 64, 0, 0), "type must be one that weights have"),
        (("q8_K", 256, 64, 0, 0), "type must be one that weights have"),
        (("what", 64, 64, 0, 0), "not what"),
        (("q4_K", 100, 64, 0, 0), "n_in must be a multiple of 256 for q4_K, not 100"),
        (("f32", 0, 64, 0, 0), "n_in must be 1 to"),
        (("f32", 64, -1, 0, 0), "n_out must be 1 to"),
        (("f32", 64, 64, 4, 5), "n_used must be 1 to 4, not 5"),
        (("f32", 64, 64, 4, 0), "n_used must be 1 to 4, not 0"),
        (("f32", 64, 64, 0, 1), "n_used must be 0 to 0, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            one.weight_rate(*arguments)
    with pytest.raises(ValueError, match="n_tokens must be 1 to 8192, not 0"):
        one.weight_rate("f32", 64, 64, 0, 0, 0)
    with pytest.raises(ValueError, match="n_heads must be a multiple of n_heads_kv"):
        one.attention_bytes_per_s("f16", 6, 4, 64, 256)
    with pytest.raises(ValueError, match="head_width must be a multiple of 32 for q8_0, not 48"):
        one.attention_bytes_per_s("q8_0", 8, 4, 48, 256)
    for batch, message in (
        (("q4_K", 100, 64, 0, 0, 8), "n_in must be a multiple of 256 for q4_K, not 100"),
        (("f32", 64, 64, 4, 5, 8), "n_used must be 1 to 4, not 5"),
        (("f32", 64, 64, 0, 0, 0), "n_tokens must be 1 to 8192, not 0"),
        (("f32", 64, 64, 0, 0, 8193), "n_tokens must be 1 to 8192, not 8193"),
    ):
        with pytest.raises(ValueError, match=message):
            one.batch_flops(*batch)
    with pytest.raises(ValueError, match="n_heads must be a multiple of n_heads_kv"):
        one.attention_flops("f16", 6, 4, 64, 256)
    with pytest.raises(ValueError, match="n_tokens must be 1 to 8192, not 0"):
        one.attention_flops("f16", 8, 4, 64, 0)
    for n_bytes in (0, 1 << 33):
        with pytest.raises(ValueError, match="n_bytes must be 1 to 4294967296"):
            one.link_rates(n_bytes, pinned=False)
    with pytest.raises(overspill.Error, match="MiB are too few"):
        meter(working_set_bytes=1 << 20).weight_rate("f32", 1 << 20, 64, 0, 0)
    with pytest.raises(ValueError, match=r"device must be one of .*CPU.*, not CUDA7"):
        meter("CUDA7")
    with pytest.raises(ValueError, match="working_set_bytes must be"):
        meter(working_set_bytes=1000)


# In a process of its own, since a device cannot be taken away again.
TRIAL = """
import json, sys
import overspill
from overspill.machine.hardware import Hardware
overspill.machine.measure._MOST_INTERRUPTIONS_PER_S = float("inf")

path, endpoint = sys.argv[1:]
info = overspill.ModelInfo.from_file(path)
alone = Hardware.here(info, n_threads=1)
(added,) = overspill.add_rpc_server(endpoint)
asked = []
with_server = Hardware.here(info, n_threads=1, progress=lambda text, share: asked.append(text))
again = Hardware.here(info, n_threads=1, memory={"gpu": "2MiB"}, progress=lambda text, share: asked.append(text))
assert again.gpus[0].memory_bytes == 2 * 2**20 < with_server.gpus[0].memory_bytes
assert (again.gpus[0].rates, again.cpu.rates) == (with_server.gpus[0].rates, alone.cpu.rates)
print(json.dumps([asked, endpoint, with_server.to_dict()]))
"""


@pytest.mark.slow
def test_a_remote_device(rpc_server: str, tiny_gpt_oss_path: Path, cache_file: Path) -> None:
    """It is measured as the CPU is, with what it costs to get there; the CPU's figures are kept."""
    command = [sys.executable, "-c", TRIAL, str(tiny_gpt_oss_path), rpc_server]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    asked, endpoint, data = json.loads(done.stdout)
    # Those of the CPU, and of the way there: four links, and a visit.
    n_figures = 3 * 2 + 2 + 2 + 5
    assert [text.partition(":")[0] for text in asked] == ["RPC0"] * n_figures
    hardware = Hardware.from_dict(data)
    assert [device.name for device in hardware.devices] == ["RPC0", "CPU"]
    remote = hardware.device("gpu")
    assert_sane(remote, {"mxfp4:experts", "q8_0", "f32", "f16:kv"})
    assert remote.hop_s > 0
    assert 1e6 < remote.link_bytes_per_s < 1e12
    assert remote.description == endpoint
    assert any(endpoint in device for device in json.loads(cache_file.read_bytes())["devices"])


def test_attention_reads_the_cache_of_all_heads() -> None:
    """Of types with and without blocks, and for one head as for many."""
    one = meter()
    for kind in ("f16", "q8_0"):
        for shape in ((HEADS, HEADS_KV, HEAD_WIDTH, 256), (1, 1, 128, 300), (64, 8, 64, 1024)):
            assert 1e6 < one.attention_bytes_per_s(kind, *shape) < 2e12


NUMPY = """
import json
import numpy as np
from time import perf_counter

a = np.ones((512, 1024), np.float32)
b = np.ones((1024, 1024), np.float32)
times = []
for _ in range(8):
    start = perf_counter()
    a @ b
    times.append(perf_counter() - start)
print(json.dumps(2 * 512 * 1024 * 1024 / min(times)))
"""


def test_a_batch_is_multiplied_about_as_fast_as_numpy_does_it() -> None:
    """Within a factor of five, on one thread each, of any part of the rows; neither counts a multiplication twice."""
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run([sys.executable, "-c", NUMPY], capture_output=True, env={**os.environ, **one_thread})
    rival = json.loads(done.stdout)
    for n_out in (1024, 65536):
        assert rival / 5 < meter(working_set_bytes=64 << 20).batch_flops("f32", 1024, n_out, 0, 0, 512) < rival * 5


def test_a_batch_is_faster_than_its_tokens_one_by_one() -> None:
    """Weights are read once for all of them; with experts, once for all that use one. Any shape can be asked about."""
    one = meter(working_set_bytes=64 << 20)
    assert one.batch_flops("f16", 4096, 4096, 0, 0, 512) > one.batch_flops("f16", 4096, 4096, 0, 0, 1)
    for kind in ("f32", "q8_0", "q4_K", "mxfp4"):
        for shape in ((1024, 512, 8, 2), (256, 1, 3, 3), (2048, 500_000, 0, 0), (1024, 1024, 1024, 8)):
            for n_tokens in (1, 33):
                assert 1e6 < one.batch_flops(kind, *shape, n_tokens) < 1e15


def test_attention_of_a_batch() -> None:
    """Of types with and without blocks, of heads that share keys and values or not, of a batch of any length."""
    one = meter(working_set_bytes=32 << 20)
    for kind in ("f16", "q8_0"):
        for shape in ((HEADS, HEADS_KV, HEAD_WIDTH, 33), (1, 1, 128, 256), (64, 8, 64, 300), (6, 6, 64, 1)):
            assert 1e6 < one.attention_flops(kind, *shape) < 1e15


# In a process of its own, since a device cannot be taken away again.
LINK = """
import json, math, sys
from pathlib import Path
from overspill import _core
from upstream_tools import stand_in_gpu

tools = Path(sys.argv[1])
rates = []
exchanges = []
for options in json.loads(sys.argv[2]):
    stand_in_gpu(tools, "GPU0", 1 << 30, **options)
    meter = _core.DeviceMeter("GPU0", n_threads=1, working_set_bytes=2**26, gpus=[], budget_s=1e-6)
    for pinned in (False, True):
        found = meter.link_rates(1 << 20, pinned)
        rates.append([found.to_device_bytes_per_s, found.from_device_bytes_per_s])
    exchanges.append([meter.exchange_s("q8_0", 1024, 512, n_used) for n_used in (1, 4)])
assert 1e6 < meter.batch_flops("q8_0", 1024, 1024, 8, 2, 64) < 1e15
assert 1e6 < meter.attention_flops("f16", 8, 2, 64, 64) < 1e15
cpu = _core.DeviceMeter("CPU", n_threads=1, working_set_bytes=2**26, gpus=[], budget_s=0)
assert cpu.link_rates(1 << 20, True).to_device_bytes_per_s == math.inf
assert cpu.exchange_s("q8_0", 1024, 512, 1) == 0
print(json.dumps([rates, exchanges]))
"""


def link_rates(tools: Path, *options: dict[str, float]) -> tuple[list[list[float]], list[list[float]]]:
    """Return the rates to and from a stand-in GPU with each of the options, of ordinary and of pinned memory.

    And the seconds of exchanges with one and with four experts there.
    """
    command = [sys.executable, "-c", LINK, str(tools), json.dumps(options)]
    environment = python_environment(Path(__file__).parent)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rates, exchanges = json.loads(done.stdout)
    return rates, exchanges


def test_a_link_is_measured_in_both_directions(upstream_tools: Path) -> None:
    """Never above what it can do; a slow one as well, by blocks that are smaller than was asked for."""
    links = [math.inf, 1e8, 1e6]
    found, exchanges = link_rates(
        upstream_tools, *({"link_bytes_per_s": 0 if link == math.inf else link} for link in links)
    )
    for rates, limit in zip(found, [link for link in links for _ in ("ordinary", "pinned")], strict=True):
        assert all(0 < rate < limit for rate in rates)
    for link, seconds in zip(links, exchanges, strict=True):
        # The activations there, and a result of each expert back.
        for n_used, found_s in zip((1, 4), seconds, strict=True):
            assert found_s > 4 * 1024 * (1 + n_used) / link


def test_pinned_memory_has_a_rate_of_its_own(upstream_tools: Path) -> None:
    """The link's for what its driver gives out, and the same as any memory's where there is no such link."""
    (slow, pinned), _ = link_rates(upstream_tools, {"link_bytes_per_s": 1e7, "pinned_bytes_per_s": 1e8})
    assert all(rate < 1e7 for rate in slow)
    assert all(1e7 < rate < 1e8 for rate in pinned)
