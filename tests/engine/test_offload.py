"""Placements loaded for real, on two devices that are other processes: same answers, and everything where it should be.

Each model is loaded in a process of its own, since a device cannot be taken away again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overspill import Error, Model, ModelInfo, Placement
from programs import in_process
from rpc_server import running_server
from sweeps import sweep

# The devices are those that the tests add.
pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture(scope="module")
def endpoints() -> Iterator[list[str]]:
    """Return two servers."""
    with running_server() as one, running_server() as other:
        yield [one, other]


SAME = """
import json, os, sys
import numpy as np
import overspill
from placement_cases import placements

path, *endpoints = sys.argv[1:]
for endpoint in endpoints:
    overspill.add_rpc_server(endpoint)
# With the same products and the same kind of attention, all devices round alike.
options = {"n_ctx": 512, "n_threads": 1, "repack": "off", "kernels": "llama.cpp", "flash_attention": "on"}
info = overspill.ModelInfo.from_file(path)
gpus = [device for device in overspill.devices() if device.kind == "gpu"]
results = {}
expected = None
cases = placements("RPC0", "RPC1", n_layers=info.n_layers, experts=info.n_experts > 0)
for name, mapping in cases.items():
    wanted = overspill.Placement.from_mapping(info, gpus, mapping)
    with overspill.Model(path, offload=wanted, **options) as model:
        tokens = model.tokenize("The capital of France is Paris, and")
        logits = model.eval(tokens).copy()
        text = [token.id for token in model.generate(tokens, temperature=0, max_tokens=16).tokens]
        expected = expected or (text, logits)
        kv = {device for device, use in model.memory.items() if use.kv_bytes}
        results[name] = {
            "same_text": text == expected[0],
            "off": float(np.abs(logits - expected[1]).max() / np.abs(expected[1]).max()),
            "as_wanted": model.placement == wanted,
            "kv_as_wanted": kv == set(wanted.kv) and sum(model.placement.kv_bytes_by_layer) == sum(
                use.kv_bytes for use in model.memory.values()
            ),
        }
print(json.dumps(results), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("name", sweep(["tiny_gpt_oss", "gemma", "smollm2"], always=[0]))
def test_same_answers_wherever_it_lies(request: pytest.FixtureRequest, endpoints: list[str], name: str) -> None:
    """Greedy tokens are the same, logits within 1e-3, and llama.cpp says that all is where it should be."""
    path: Path = request.getfixturevalue(f"{name}_path")
    results = in_process(SAME, str(path), *endpoints, folders=[Path(__file__).parent])
    assert len(results) >= 12
    for case, result in results.items():
        assert result["same_text"], case
        assert result["off"] <= 1e-3, case
        assert result["as_wanted"], case
        assert result["kv_as_wanted"], case


AUTO = """
import json, logging, os, sys
from dataclasses import replace
from pathlib import Path
import overspill
from upstream_tools import stand_in_gpu

lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append((record.levelname, record.getMessage()))
logging.getLogger("overspill").addHandler(Keep())
logging.getLogger("overspill").setLevel(logging.INFO)
logging.getLogger("overspill.llama").propagate = False

path, tools = sys.argv[1], Path(sys.argv[2])
margin = 1 << 30
results = []
for claimed, real in json.loads(sys.argv[3]):
    stand_in_gpu(tools, "GPU0", margin + claimed, refuse_bytes=real)
    # A GPU that is worth it by its figures; by those that would be measured, it may be or not.
    here = overspill.Hardware.here(measure=False)
    gpu = replace(here.gpus[0], bandwidth_bytes_per_s=1e12, rates={}, op_s=0, hop_s=0)
    cpu = replace(here.cpu, bandwidth_bytes_per_s=1e9, rates={}, op_s=1e-6)
    planned = overspill.plan(path, hardware=replace(here, devices=(gpu, cpu)), n_ctx=512, experts="static")
    lines.clear()
    with overspill.Model(path, n_ctx=512, n_threads=1, offload=planned) as model:
        text = model.generate([1, 2, 3], temperature=0, max_tokens=8).text
        use = model.memory.get("GPU0")
        results.append({
            "text": text,
            "gpu_bytes": use.total_bytes if use else 0,
            "log": [line for line in lines if "offload:" in line[1]],
        })
with overspill.Model(path, n_ctx=512, n_threads=1) as model:  # measured here, and planned by that
    results.append({"text": model.generate([1, 2, 3], temperature=0, max_tokens=8).text, "log": lines[-1:]})
with overspill.Model(path, n_ctx=512, n_threads=1, memory={"gpu": margin}) as model:
    results.append({"text": text, "gpu_bytes": "GPU0" in model.placement.devices_used, "log": []})
try:
    overspill.Model(path, n_ctx=512, n_threads=1, offload="gpu")
except overspill.OutOfMemoryError as error:
    results.append([error.device, error.needed_bytes, str(error)])
print(json.dumps(results), flush=True)
os._exit(0)
"""


def test_auto_uses_a_gpu_and_retreats_where_it_refuses(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """As much as it gives, in as many tries as it takes, said before and, if it came otherwise, after; one text."""
    # What the GPU says that it has beyond the margin, and what it really gives; 0: what it says.
    sizes = [[60_000_000, 0], [60_000_000, 10_000_000], [60_000_000, 3_000_000]]
    *results, measured, capped, refused = in_process(
        AUTO, str(tiny_gpt_oss_path), str(upstream_tools), json.dumps(sizes)
    )
    assert len({result["text"] for result in (*results, measured)}) == 1
    assert "s to the first token after" in measured["log"][0][1]
    whole, less, nothing = results
    assert whole["gpu_bytes"] > less["gpu_bytes"] > 0 == nothing["gpu_bytes"]
    assert less["gpu_bytes"] <= 10_000_000
    levels = [[level for level, _ in result["log"]] for result in results]
    assert levels == [["INFO"], ["INFO", "WARNING"], ["INFO", "WARNING"]]
    assert all("s to the first token after" in text for result in results for _, text in result["log"])
    assert "GPU0 refused" in less["log"][1][1]
    assert not capped["gpu_bytes"]
    # Who asks for everything there is told.
    device, needed_bytes, text = refused
    assert device == "GPU0"
    assert needed_bytes > 0
    assert "GPU0 refused" in text


def test_placement_of_a_model_on_the_cpu(gemma: Model, tiny_gpt_oss: Model) -> None:
    """Read back, with the bytes of the KV cache, and shown."""
    for model in (gemma, tiny_gpt_oss):
        assert model.placement == Placement.cpu(model.info)
        assert model.placement.devices_used == ("CPU",)
        caches = model.placement.kv_bytes_by_layer
        assert caches is not None
        assert sum(caches) == model.memory["CPU"].kv_bytes > 0
        assert "CPU" in str(model.placement)


def test_placements_for_something_else(tiny_gpt_oss_path: Path, gemma: Model) -> None:
    """Refused before anything is loaded: another model's, devices that are not here, what llama.cpp cannot do."""
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    with pytest.raises(ValueError, match=r"this placement is for .*, not for"):
        Model(tiny_gpt_oss_path, offload=gemma.placement)
    with pytest.raises(ValueError, match="uses CUDA7, but the devices here are CPU"):
        Model(tiny_gpt_oss_path, offload=Placement.gpu(info, ["CUDA7"]))
    with pytest.raises(ValueError, match="device must be one of CPU"):
        Model(tiny_gpt_oss_path, offload={"experts": "CUDA0"})
    with pytest.raises(Error, match="there is no GPU here"):
        Model(tiny_gpt_oss_path, offload="gpu")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"type_k": "q9"}, "type_k must be one of"),
        ({"type_v": "q8_0", "flash_attention": "off"}, "needs flash attention"),
        ({"flash_attention": "yes"}, "flash_attention must be one of auto, on, off"),
        ({"repack": "yes"}, "repack must be one of auto, on, off"),
        ({"n_ubatch": 0}, "n_ubatch must be"),
        ({"n_ubatch": 1024, "n_batch": 512}, "n_ubatch must be 1 to 512"),
        ({"offload_min_batch": 0}, "offload_min_batch must be 1 to 65536"),
        ({"pin_weights": True}, "pin_weights must be one of auto, on, off"),
        ({"prompt_tokens": 0}, "prompt_tokens must be"),
        ({"reply_tokens": 0}, "reply_tokens must be"),
    ],
    ids=str,
)
def test_bad_settings(tiny_gpt_oss_path: Path, options: dict[str, Any], text: str) -> None:
    """Each is refused with its range."""
    with pytest.raises(ValueError, match=text):
        Model(tiny_gpt_oss_path, n_ctx=64, **options)


BESIDE_A_GPU = """
import json, os, sys
import overspill
from overspill.header import info

path, endpoint = sys.argv[1:]
read_gguf, files = info.read_gguf, []
info.read_gguf = lambda file: files.append(file) or read_gguf(file)
with overspill.Model(path, rpc=[endpoint], n_ctx=512, n_threads=1) as model:
    model.generate([1, 2, 3], max_tokens=2)
    model.placement
try:
    overspill.Model(path, type_k="q9")
except ValueError as error:
    print(json.dumps([len(files), str(error)]), flush=True)
os._exit(0)
"""


def test_beside_a_gpu(tiny_gpt_oss_path: Path, endpoints: list[str]) -> None:
    """The header is read once, planning included; a mistake in a setting has the error that it has without a GPU."""
    with pytest.raises(ValueError, match="type_k must be one of f32, f16") as without:
        Model(tiny_gpt_oss_path, type_k="q9")  # type: ignore[arg-type]
    n_reads, error = in_process(BESIDE_A_GPU, str(tiny_gpt_oss_path), endpoints[0])
    assert n_reads == 1
    assert error == str(without.value)


def test_settings_change_what_they_are_for(tiny_gpt_oss_path: Path) -> None:
    """A quantized cache takes half; a small physical batch less to compute; the text does not depend on the batch."""
    texts = []
    memories = []
    for options in ({}, {"type_k": "q8_0", "type_v": "q8_0"}, {"n_ubatch": 16}):
        with Model(tiny_gpt_oss_path, n_ctx=2048, n_threads=1, **options) as model:
            memories.append(model.memory["CPU"])
            texts.append(model.generate([1, 2, 3] * 40, temperature=0, max_tokens=8).text)
    assert memories[1].kv_bytes == pytest.approx(memories[0].kv_bytes * 34 / 64)  # q8_0 has 34 bytes for 32 numbers
    assert memories[2].compute_bytes < memories[0].compute_bytes
    assert texts[2] == texts[0]
