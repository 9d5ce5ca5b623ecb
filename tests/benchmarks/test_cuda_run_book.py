"""The run book of benchmarks/cuda, with an RPC server on loopback in the place of a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from header_files import gpt_oss, n_bytes
from model_files import VOCABULARY
from overspill import Placement
from programs import python_environment
from rpc_server import running_server

FOLDER = Path(__file__).parents[2] / "benchmarks" / "cuda"
NAMES = ["whole layers", "experts on CPU", "planner", "llama.cpp's fit", "planner, llama.cpp"]
MARGIN_BYTES = 1 << 30
N_TOKENS, N_LONG = 8, 100

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="keeps the model in a file of memory")


def compare(folder: Path, endpoint: str, vram: str) -> tuple[str, list[dict[str, Any]]]:
    """Compare placements of a small model; return what is printed, and the rows of the JSON."""
    file = folder / "result.json"
    command = [sys.executable, str(FOLDER / "compare_placements.py"), "--shape", "gpt-oss-2-layers", "--rpc", endpoint]
    command += ["--vram", vram, "--n-ctx", "256", "--prompt-tokens", "16", "--tokens", str(N_TOKENS)]
    command += ["--long-prompt-tokens", str(N_LONG)]
    command += ["--rounds", "1", "--threads", "1", "--json", str(file)]
    # With the products that the server has, so that all placements say the same.
    environment = python_environment(FOLDER.parent, XDG_CACHE_HOME=str(folder), OVERSPILL_KERNELS="llama.cpp")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(file.read_text(), parse_constant=pytest.fail)  # Infinity and NaN are no JSON
    (model,) = result["models"]
    assert (model["name"], model["problem"]) == ("gpt-oss-2-layers", None)
    assert [device["name"] for device in model["hardware"]["devices"]] == ["RPC0", "CPU"]
    assert [row["name"] for row in model["rows"]] == NAMES
    return done.stdout, model["rows"]


@pytest.mark.slow
def test_comparison(tmp_path: Path, rpc_server: str, upstream_tools: Path) -> None:
    """Four placements run, and say the same; each is where it says, and whole layers are as many as fit.

    The planner's runs with llama.cpp's products, too.
    """
    budget = 1_400_000_000
    printed, rows = compare(tmp_path, rpc_server, f"{budget // 1_000_000}MB")
    header = gpt_oss(2, 8, VOCABULARY)
    for row in rows:
        assert row["problem"] is None, row["problem"]
        assert row["tokens_per_s"] == max(row["tokens_per_s_by_round"]) > 0
        assert row["first_token_s"] > 0
        if row["kernels"] == "auto":
            assert row["forecast"]["tokens_per_s"] > 0
            assert row["forecast"]["n_splits"] == row["n_splits"]
        else:
            assert row["forecast"] is None
        assert len(row["tokens"]) == N_TOKENS
        assert 0 <= row["device_bytes"] <= budget - 0.99 * MARGIN_BYTES  # forecasts are exact to a little
        on_device = Placement.from_dict(row["placement"]).bytes_by_device()["RPC0"]
        assert on_device <= row["device_bytes"]
        # The embedding is in RAM; whatever is not on the device is there, too.
        assert header.tensor_bytes - on_device <= row["ram_bytes"]
        assert row["name"] in printed
        assert f"{row['tokens_per_s']:.2f}" in printed
    assert len({tuple(row["tokens"]) for row in rows if row["kernels"] == "auto"}) == 1
    assert f"All replies are the same {N_TOKENS} tokens." in printed
    layer_bytes = sum(n_bytes(*tensor) for name, tensor in header.tensors.items() if name.startswith("blk.0."))
    whole, experts, planner, fit, without = rows
    assert without["placement"] == planner["placement"]
    assert 0 < whole["device_bytes"] <= budget - MARGIN_BYTES < whole["device_bytes"] + layer_bytes
    assert {run["experts"] for run in experts["placement"]["layers"]} == {"CPU"}
    assert {run["attention"] for run in experts["placement"]["layers"]} == {"RPC0"}
    assert fit["fit"]["n_gpu_layers"] == 3


@pytest.mark.slow
def test_a_placement_that_fails(tmp_path: Path, upstream_tools: Path) -> None:
    """A device that refuses memory takes its row's figures away, says so, and leaves the other rows alone."""
    header = gpt_oss(2, 8, VOCABULARY)
    weights_bytes = header.tensor_bytes - n_bytes(*header.tensors["token_embd.weight"])
    # Enough for all but the experts, which take a third of them with their buffers.
    with running_server(room_bytes=weights_bytes * 2 // 3) as endpoint:
        printed, (whole, experts, *_) = compare(tmp_path, endpoint, "24GB")
    assert whole["tokens_per_s"] is None
    assert "RPC0 refused" in whole["problem"]
    assert f"whole layers: {whole['problem']}" in printed
    assert experts["problem"] is None
    assert experts["tokens_per_s"] > 0


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU, which it would build for")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--vram", "24"], 'must be a size with its unit, such as "24GB" or "24GiB", not "24"'),
        (["--tokens", "1"], "--tokens must be at least 2"),
        (["--n-ctx", "100"], "--n-ctx has no room for --prompt-tokens and --tokens together"),
        ([], "nvidia-smi finds no GPU here"),
        (["--arch"], "--arch needs a CMAKE_CUDA_ARCHITECTURES value"),
    ],
)
def test_mistakes_before_the_build(options: list[str], expected: str) -> None:
    """What is wrong with the command line or the machine is said before anything is built."""
    done = subprocess.run([str(FOLDER / "run.sh"), *options], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert done.stdout == ""
    assert expected in done.stderr
    assert done.stderr.count("error: ") == 1
