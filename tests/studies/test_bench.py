"""Where a token's time goes, and what of it the memory needs. How long anything takes is not asked."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from commands import overspill
from model_files import VOCABULARY, WIDTH
from overspill import Breakdown, Error, Model, ModelInfo, Placement, _core, bench
from overspill.planning.tuned import save_tuned
from overspill.studies.bench.measure import read_bytes_by_device, weight_speeds
from programs import in_process
from rpc_server import running_server

# What is read, and in how many pieces, is counted for the CPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

PARTS = ("wait_s", "decode_s", "sync_s", "logits_s", "sample_s", "python_s", "text_s")


def breakdown(model: Model, **options: Any) -> Breakdown:
    """Return that of 32 tokens after the first, checked for what is always so."""
    with model.stream([1, 2, 3], max_tokens=33, logit_bias={VOCABULARY - 1: -100.0}, **options) as stream:
        for _ in stream:
            pass
    stats = stream.stats
    spent = stats.breakdown
    assert spent.tokens == 32
    assert all(getattr(spent, part) >= 0 for part in (*PARTS, "caller_s"))
    assert min(spent.decode_s, spent.logits_s, spent.text_s) > 0
    assert sum(getattr(spent, part) for part in PARTS) <= stats.decode_s
    assert spent.graph_splits == 1
    assert 0 < spent.graphs_reused <= 32
    assert spent.major_page_faults is None or spent.major_page_faults >= 0
    return spent


def test_time_is_named_by_what_it_went_to(tiny_gpt_oss: Model) -> None:
    """The sampler's is the sampler's, that of functions of the caller is theirs, and only where there are any."""
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 1}, {"grammar": "root ::= [a-z ]+"}):
        spent = breakdown(tiny_gpt_oss, **options)
        assert spent.sample_s > 0
        assert spent.python_s == 0
    spent = breakdown(tiny_gpt_oss, sampler=lambda logits, tokens: int(logits[:-1].argmax()))
    assert spent.python_s > 0
    pause_s = 0.002
    with tiny_gpt_oss.stream([1, 2, 3], temperature=0, max_tokens=5) as stream:
        for _ in stream:
            end = time.perf_counter() + pause_s
            while time.perf_counter() < end:
                pass
    assert stream.stats.breakdown.caller_s >= 4 * pause_s  # it cannot have been less


def test_nothing_after_the_first_token_took_no_time(tiny_gpt_oss: Model) -> None:
    """Neither before the first token nor after it; a prompt is none of it."""
    with tiny_gpt_oss.stream([1, 2, 3], max_tokens=1) as stream:
        assert stream.stats.breakdown.tokens == 0
        next(stream)
    spent = stream.stats.breakdown
    assert spent == Breakdown(graph_splits=1, major_page_faults=spent.major_page_faults, read_bytes=0)
    assert spent.gigabytes_per_s is None
    assert str(spent) == "no token after the first"


def test_read_bytes_are_those_of_the_header(tiny_gpt_oss: Model, gemma: Model) -> None:
    """Of a mixture of experts, what is used; of the KV cache, what is filled."""
    info = tiny_gpt_oss.info
    spent = breakdown(tiny_gpt_oss, temperature=0)
    # Every tensor once; half of the experts; one row of the embedding.
    experts = sum(n for name, *_, n in info.tensors if "_exps" in name)
    embedding = next(n for name, *_, n in info.tensors if name == "token_embd.weight")
    row = WIDTH // 32 * 34  # Q8_0
    assert embedding == VOCABULARY * row
    weights = sum(n for *_, n in info.tensors) - experts // 2 - embedding + row
    kv = 4 * 2 * 2 * 64 * 2 * (3 + 16)  # layers, keys and values, heads, their width, F16, tokens halfway
    assert spent.read_bytes == 32 * (weights + kv)
    assert spent.gigabytes_per_s == pytest.approx(spent.read_bytes / (spent.decode_s + spent.sync_s) / 1e9)
    together = next(reply for _, reply in tiny_gpt_oss.generate_many(["a", "b"], max_tokens=4))
    assert together.stats.breakdown.read_bytes is None
    assert together.stats.breakdown.decode_s > 0
    # An output matrix that is the embedding is read in full, and one row of it again.
    placed = read_bytes_by_device(gemma.info, gemma.placement, 1)
    whole = sum(n for *_, n in gemma.info.tensors)
    assert whole < placed["CPU"] < whole * 1.01


def test_every_device_reads_what_lies_on_it(tiny_gpt_oss: Model) -> None:
    """Whatever lies where, all devices together read as much."""
    info = tiny_gpt_oss.info
    alone = read_bytes_by_device(info, Placement.cpu(info), 100)
    mappings: list[dict[str, str]] = [
        {"default": "GPU0"},
        {"default": "GPU0", "experts": "cpu"},
        {"layers 2-3": "GPU0"},
        {"kv": "GPU0", "attention": "GPU0"},
    ]
    for mapping in mappings:
        placement = Placement.from_mapping(info, ["GPU0"], mapping)
        read = read_bytes_by_device(info, placement, 100)
        assert sum(read.values()) == sum(alone.values())
        assert read["GPU0"] > 0
    experts = sum(n for name, *_, n in info.tensors if "_exps" in name)
    split = read_bytes_by_device(info, Placement.from_mapping(info, ["GPU0"], mappings[1]), 100)
    embedding_row = WIDTH // 32 * 34
    assert split["CPU"] == experts // 2 + embedding_row


def test_only_weights_in_ram_have_a_speed_there(gemma_path: Path, tiny_gpt_oss_path: Path) -> None:
    """An embedding of which a token reads a row has none; one that is the output matrix as well has one."""
    settings = {"n_threads": 1, "kernels": "llama.cpp", "repack": "off"}
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    assert weight_speeds(info, Placement.gpu(info, ["GPU0"]), settings) == ()
    info = ModelInfo.from_file(gemma_path)
    (embedding,) = (kind for name, kind, *_ in info.tensors if name == "token_embd.weight")
    read = weight_speeds(info, Placement.cpu(info), settings)
    assert {one.weights for one in read} == {kind for _, kind, shape, _ in info.tensors if len(shape) > 1}
    assert embedding in {one.weights for one in read}
    assert {one.kernels for one in read} == {"llama.cpp"}


# In a process of its own, since a device cannot be taken away again.
PIECES = """
import json, os, sys
import overspill

path, endpoint = sys.argv[1:]
overspill.add_rpc_server(endpoint)
found = []
for mapping in ({"default": "RPC0"}, {"default": "RPC0", "experts": "cpu"}, {"layers 2-3": "RPC0"}, {"kv": "cpu"}):
    with overspill.Model(path, offload=mapping, n_ctx=256, n_threads=1) as model:
        timed = model._core.time_devices(list(range(1, 25)), 8)
        devices = {name: [one.seconds, one.n_pieces] for name, one in timed.devices.items()}
        times = {"devices": devices, "moving_s": timed.moving_s, "total_s": timed.total_s}
        n_splits = model._core.memory().n_splits
        again = model.generate([1, 2, 3], max_tokens=2).stats
        found.append([times, n_splits, again.breakdown.graph_splits])
print(json.dumps(found), flush=True)
os._exit(0)
"""


def test_pieces_of_the_graph_are_those_that_llama_cpp_counts(tiny_gpt_oss_path: Path) -> None:
    """As many, each on its device; and what the devices and the ways between them take is less than all of it."""
    with running_server() as endpoint:
        command = [sys.executable, "-c", PIECES, str(tiny_gpt_oss_path), endpoint]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = json.loads(done.stdout)
    for times, n_splits, counted in cases:
        assert counted == n_splits
        assert sum(pieces for _, pieces in times["devices"].values()) == n_splits
        assert all(seconds > 0 for seconds, _ in times["devices"].values())
        whole = sum(seconds for seconds, _ in times["devices"].values()) + times["moving_s"]
        assert whole <= times["total_s"]
    (_, experts_on_cpu, _, on_cpu) = (times for times, *_ in cases)
    assert experts_on_cpu["devices"]["CPU"][1] == 5  # the embedding, and the experts of four layers
    assert experts_on_cpu["devices"]["RPC0"][1] == 5
    assert on_cpu["devices"].keys() == {"CPU"}


def test_bad_tokens_to_time(tiny_gpt_oss: Model) -> None:
    """The core says which numbers it can do with."""
    with pytest.raises(ValueError, match="n must be 1 to the number of tokens less 2, not 3"):
        tiny_gpt_oss._core.time_devices([1, 2, 3, 4], 3)
    with pytest.raises(ValueError, match="tokens"):
        tiny_gpt_oss._core.time_devices([1, 2, 99999, 4], 1)
    assert tiny_gpt_oss.generate([1], max_tokens=1).tokens


def test_json_is_llama_benchs(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """All that llama-bench writes of the same tests, of the same kinds, and the same where it is no time."""
    tool = [str(upstream_tools / "llama-bench"), "--model", str(tiny_gpt_oss_path), "--threads", "2"]
    ours = [sys.executable, "-m", "overspill", "bench", str(tiny_gpt_oss_path), "--threads", "2", "--offload", "cpu"]
    sizes = ["-p", "64", "-n", "16", "-r", "2"]
    answers = []
    for command in ([*tool, *sizes, "--output", "json"], [*ours, *sizes, "--json"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        answers.append(json.loads(done.stdout))
    same = {"model_filename", "model_size", "model_n_params", "n_threads", "type_k", "type_v", "n_batch", "n_ubatch"}
    same |= {"n_prompt", "n_gen", "n_depth", "split_mode", "main_gpu", "cpu_info", "embeddings", "poll", "cpu_mask"}
    same |= {"tensor_buft_overrides", "n_cpu_moe", "no_kv_offload", "tensor_split"}
    assert [len(answer) for answer in answers] == [2, 2]
    for theirs, test in zip(*answers, strict=True):
        assert test.keys() - {"overspill"} >= theirs.keys()
        for key, value in theirs.items():
            assert isinstance(test[key], float if isinstance(value, float) else type(value)), key
        for key in same - ({"n_batch"} if theirs["n_batch"] != test["n_batch"] else set()):
            assert test[key] == theirs[key], key
        assert len(test["samples_ns"]) == len(test["samples_ts"]) == 2
        n = test["n_prompt"] + test["n_gen"]
        assert test["samples_ts"] == pytest.approx([n * 1e9 / ns for ns in test["samples_ns"]], rel=1e-3)
        assert test["avg_ts"] == pytest.approx(sum(test["samples_ts"]) / 2)
    found = answers[1][1]["overspill"]
    assert found["token_s"] > 0
    assert found["roofline_s"] == pytest.approx(sum(one["floor_s"] for one in found["devices"]))
    assert sum(found["parts_s"].values()) >= 0.99 * found["token_s"]
    kernels = {one["weights"]: one["kernels"] for one in found["weights"]}
    types = _core.cpu_kernel_types()
    assert kernels == {
        weights: _core.cpu_kernels() if kind in types else "llama.cpp"
        for weights, kind in {"mxfp4:experts": "mxfp4", "q8_0": "q8_0", "f32": "f32"}.items()
    }
    for one in found["weights"]:
        assert one["bytes_per_s"] > 0
        assert one["share"] == pytest.approx(one["bytes_per_s"] / one["plain_reads_bytes_per_s"])


@pytest.mark.slow
def test_table_and_picture(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """The table has each device and part once, and the picture is one."""
    steps: list[tuple[str, float]] = []
    found = bench(
        tiny_gpt_oss_path,
        n_prompt=0,
        n_gen=8,
        n_depth=300,
        repetitions=1,
        n_threads=2,
        offload="cpu",
        progress=lambda what, share: steps.append((what, share)),
    )
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    assert "tg8 @ d300" in text
    assert "pp" not in text.split("device")[0].split("test")[1]
    for part, seconds in found.parts.items():
        assert (part in text) == (seconds >= 5e-8)
    assert found.limit in text
    (types,) = (part for part in text.split("\n\n") if part.startswith("weights in RAM"))
    assert {line.split("  ")[0] for line in types.splitlines()[1:]} >= {"MXFP4 experts", "Q8_0", "F32"}
    for one in found.weights:
        assert f"{one.bytes_per_s / 1e9:.1f} GB/s" in types
        assert f"{one.plain_reads_bytes_per_s / 1e9:.1f} GB/s" in types
        assert f"{one.bytes_per_s / one.plain_reads_bytes_per_s:.2f}" in types
    shares = [share for _, share in steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    picture = tmp_path / "token.png"
    found.plot(picture)
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    width = int.from_bytes(data[16:20], "big")
    assert width >= 1000


@pytest.mark.parametrize(
    ("arguments", "text", "code"),
    [
        (["--plot", "token.doc"], r"the picture must end in one of .*\.png.*, not token.doc", 2),
        (["--plot", "nowhere/token.png"], "nowhere/token.png cannot be written", 1),
        (["-n", "3"], "--n-gen must be at least 4, not 3", 2),
        (["-r", "0"], "repetitions must be 1 to 1000, not 0", 2),
        (["-p", "-1"], "--n-prompt must be at least 0, not -1", 2),
        (["--type-k", "q9_9"], "--type-k must be", 2),
        (["--offload", "gpu"], "there is no GPU here", 1),
    ],
)
def test_mistakes_on_the_command_line(tiny_gpt_oss_path: Path, arguments: list[str], text: str, code: int) -> None:
    """One line, before anything takes long."""
    done = overspill("bench", tiny_gpt_oss_path, *arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.search(text, line), line


def test_without_matplotlib(tiny_gpt_oss_path: Path) -> None:
    """It says what to install."""
    code = "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
    code += "from overspill.studies.bench.plot import check_plotting\ncheck_plotting('a.png')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a picture needs matplotlib: pip install 'overspill[plot]'" in done.stderr
    assert Error.__name__ in done.stderr


def test_depth_needs_no_more_context_than_it_says(tiny_gpt_oss_path: Path) -> None:
    """The context is as large as the longest test, whatever the model was trained for."""
    found = bench(tiny_gpt_oss_path, n_prompt=16, n_gen=4, repetitions=1, n_threads=2, offload="cpu")
    assert found.settings["n_ctx"] == 17
    assert found.prefill is not None
    assert found.prefill.name == "pp16"
    assert ModelInfo.from_file(tiny_gpt_oss_path).n_ctx_train == 131072


def test_tuned_settings_are_what_is_measured(
    tiny_gpt_oss_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token reads the KV cache in its tuned type, which nobody gave."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    placement = Placement.cpu(info)
    settings = {"n_ctx": 64, "n_ubatch": 64, "n_threads": 1, "flash_attention": "auto", "repack": "off"}
    more = {"type_k": "q8_0", "type_v": "q8_0", "kernels": "auto", "load_mode": "read", "offload_min_batch": None}
    save_tuned(info, placement, {**settings, **more}, 1.0)
    found = bench(tiny_gpt_oss_path, n_prompt=0, n_gen=4, n_depth=100, repetitions=1, offload="tuned")
    assert (found.settings["type_k"], found.settings["n_threads"], found.settings["load_mode"]) == ("q8_0", 1, "read")
    (device,) = found.devices
    assert device.read_bytes == read_bytes_by_device(info, placement, 102, "q8_0", "q8_0")["CPU"]
    assert device.read_bytes < read_bytes_by_device(info, placement, 102, "f16", "f16")["CPU"]


WITH_A_CACHE = """
import json, os, sys
from pathlib import Path
from overspill import ModelInfo, bench
from upstream_tools import stand_in_gpu

path, tools = sys.argv[1:]
stand_in_gpu(Path(tools), "GPU0", 4 << 30)
info = ModelInfo.from_file(path)
placement = {"default": "gpu", "experts": "cpu"}
found = bench(path, offload=placement, experts="cached", n_prompt=0, n_gen=24, repetitions=2, n_threads=1)
print(json.dumps([found.to_dicts()[-1]["overspill"], str(found._verdict()), info.n_experts_used, info.n_layers]))
sys.stdout.flush()
os._exit(0)
"""


def test_a_cache_of_experts_is_counted(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """Its hits are of the measured runs' tokens, and what they read is counted for the GPU."""
    found, verdict, n_used, n_layers = in_process(WITH_A_CACHE, str(tiny_gpt_oss_path), str(upstream_tools))
    experts, info = found["experts"], ModelInfo.from_file(tiny_gpt_oss_path)
    assert 0 < experts["hits"] <= experts["requests"] == 2 * 25 * n_used * n_layers
    share = experts["hits"] / experts["requests"]
    assert f"answered {share:.0%} of the requests" in verdict
    # One expert's matrices, as often as they were used.
    (bytes_of_all,) = {info.layers[layer]["experts"] for layer in info.expert_layers}
    used_bytes = (experts["hit_bytes"] + experts["miss_bytes"]) / experts["requests"]
    assert used_bytes == pytest.approx(bytes_of_all / info.n_experts, rel=0.02)
    reads = {one["device"]: one["read_bytes"] for one in found["devices"]}
    static = Placement.gpu(info, ["GPU0"])
    static.layers[:].experts = "cpu"
    expected = read_bytes_by_device(info, static, 1 + 12, "f16", "f16")
    assert reads["GPU0"] - expected["GPU0"] == pytest.approx(experts["hit_bytes"] / 50, abs=2)
    assert sum(reads.values()) == sum(expected.values())
