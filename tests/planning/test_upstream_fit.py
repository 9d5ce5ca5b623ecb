"""The tools of the planner's tests: headers without weights, GPUs that are not there, llama.cpp's fit on them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from header_files import HEADERS, n_bytes
from overspill import ModelInfo
from programs import python_environment
from upstream_tools import DryRunPlacement, DryRunSettings, upstream_dry_run, upstream_fit

GIB = 1 << 30
HeaderPath = Callable[[str], Path]

# In a process of its own, since a device cannot be taken away again.
TRIAL = """
import sys
from pathlib import Path

import overspill
from upstream_tools import stand_in_gpu

path, tools = Path(sys.argv[1]), Path(sys.argv[2])
options = {"n_ctx": 256, "n_threads": 1}

def greedy(**offload):
    with overspill.Model(path, **options, **offload) as model:
        return [token.id for token in model.generate("Once upon a time", temperature=0, max_tokens=24).tokens]

alone = greedy()
stand_in_gpu(tools, "GPU0", 1 << 30, latency_s=1e-6, link_bytes_per_s=16e9)
(device,) = [device for device in overspill.devices() if device.kind == "gpu"]
assert (device.name, device.total_bytes, device.free_bytes) == ("GPU0", 1 << 30, 1 << 30), device
for offload in (0, 1, 3, "gpu"):
    assert greedy(offload=offload) == alone, offload
(device,) = [device for device in overspill.devices() if device.kind == "gpu"]
assert device.free_bytes == 1 << 30, device
stand_in_gpu(tools, "GPU0", 1 << 30, refuse_bytes=1 << 20)
try:
    greedy(offload="gpu")
except overspill.Error:
    print("same, then refused")
"""


@pytest.mark.parametrize("name", HEADERS)
def test_headers_open(name: str, header_path: HeaderPath, upstream_tools: Path) -> None:
    """llama.cpp finds every tensor in a header, in its place and of its size, and nothing lies on the disk."""
    header = HEADERS[name]()
    path = header_path(name)
    assert path.stat().st_size > header.tensor_bytes
    assert path.stat().st_blocks * 512 < 1 << 20
    info = ModelInfo.from_file(path)
    assert sum(info.bytes_by_part.values()) == header.tensor_bytes
    embedding = n_bytes(*header.tensors["token_embd.weight"])
    n_layers = info.n_layers + 1
    slack = 128 * len(header.tensors)  # each tensor is aligned
    for n_gpu_layers, on_host in ((0, header.tensor_bytes), (n_layers, embedding)):
        placement = DryRunPlacement(["GPU0"], n_gpu_layers, [n_gpu_layers])
        dry_run = upstream_dry_run(upstream_tools, path, {"GPU0": 1000 * GIB}, placement)
        assert dry_run.layers == ["GPU0" if n_gpu_layers else "CPU"] * n_layers
        assert 0 <= dry_run.memory["CPU"].weights_bytes - on_host <= slack
        # An embedding that is the output head, too, is copied.
        on_device = header.tensor_bytes - on_host + (embedding if info.tied_embedding and n_gpu_layers else 0)
        assert 0 <= dry_run.memory["GPU0"].weights_bytes - on_device <= slack


def test_kv_cache(header_path: HeaderPath, upstream_tools: Path) -> None:
    """Keys and values of 1024 numbers for each of 32 layers, wherever the layers are."""
    placement = DryRunPlacement(["GPU0", "GPU1"], 25, [10, 15])
    settings = DryRunSettings(n_ctx=4096, type_k="q8_0", type_v="q8_0")
    memory = {"GPU0": 24 * GIB, "GPU1": 24 * GIB}
    dry_run = upstream_dry_run(upstream_tools, header_path("llama-3-8b"), memory, placement, settings)
    assert dry_run.layers == ["CPU"] * 8 + ["GPU0"] * 10 + ["GPU1"] * 15
    layer = 4096 * 2 * 1024 * 34 // 32
    assert {name: memory.kv_bytes for name, memory in dry_run.memory.items()} == {
        "CPU": 8 * layer,
        "GPU0": 10 * layer,
        "GPU1": 14 * layer,
    }


def test_fit_moves_experts(header_path: HeaderPath, upstream_tools: Path) -> None:
    """24 GiB hold gpt-oss-120b's attention and the experts of some layers, and the fit leaves its margin."""
    fit = upstream_fit(upstream_tools, header_path("gpt-oss-120b"), {"GPU0": 24 * GIB})
    assert fit.success
    assert (fit.placement.devices, fit.placement.n_gpu_layers, fit.placement.tensor_split) == (["GPU0"], 37, [37])
    assert {device for _, device in fit.placement.overrides} == {"CPU"}
    header = HEADERS["gpt-oss-120b"]()
    moved = [name for name in header.tensors if any(re.search(pattern, name) for pattern, _ in fit.placement.overrides)]
    assert all("_exps." in name for name in moved)
    on_host = sum(n_bytes(*header.tensors[name]) for name in (*moved, "token_embd.weight"))
    assert fit.dry_run.memory["CPU"].weights_bytes == pytest.approx(on_host, rel=1e-4)
    left = 23 * GIB - fit.dry_run.memory["GPU0"].total_bytes
    assert 0 <= left < 1692e6  # not even a layer's experts more
    again = upstream_dry_run(
        upstream_tools, header_path("gpt-oss-120b"), {"GPU0": 24 * GIB}, fit.placement, DryRunSettings()
    )
    assert again == fit.dry_run


@pytest.mark.parametrize(("n_ctx", "expected"), [(0, 131072), (4096, 4096)])
def test_fit_of_what_fits_anyway(n_ctx: int, expected: int, header_path: HeaderPath, upstream_tools: Path) -> None:
    """Then the fit says nothing, and llama.cpp's defaults share the layers out by free memory."""
    memory = {"GPU0": 48 * GIB, "GPU1": 16 * GIB}
    fit = upstream_fit(upstream_tools, header_path("llama-3-8b"), memory, DryRunSettings(n_ctx=n_ctx))
    assert fit.success
    assert fit.placement == DryRunPlacement(["GPU0", "GPU1"], 33, [25, 8])
    assert fit.dry_run.n_ctx == expected


def test_stand_in_gpu(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """It computes what the CPU computes, and gives no more memory than it is told to."""
    command = [sys.executable, "-c", TRIAL, str(tiny_gpt_oss_path), str(upstream_tools)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=python_environment())
    assert (done.returncode, done.stdout) == (0, "same, then refused\n"), done.stderr[-2000:]
