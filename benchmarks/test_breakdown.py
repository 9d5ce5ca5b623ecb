"""Show where a token's time goes, by the stream's own counters, and as a share of what the memory allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from overspill import Model, bench
from rpc_server import running_server

PARTS = ("wait", "decode", "sync", "logits", "sample", "python", "text", "caller")


@pytest.mark.parametrize("sampling", ["greedy", "top-p 0.95", "argmax in Python"])
@pytest.mark.parametrize("name", ["tiny_gpt_oss", "smollm2", "gemma"])
def test_where_time_goes(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, name: str, sampling: str) -> None:
    """All but llama_decode is small, and what the counters count is nearly all that the clock sees."""
    samplings: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0},
        "top-p 0.95": {"temperature": 0.8, "top_k": 0, "min_p": 0.0, "top_p": 0.95, "seed": 1},
        "argmax in Python": {"sampler": lambda logits, tokens: int(logits.argmax())},
    }
    options = samplings[sampling]
    path: Path = request.getfixturevalue(f"{name}_path")
    n = 512 if name == "tiny_gpt_oss" else 64
    with Model(path, n_ctx=1024, n_threads=2) as model:

        def stream() -> Any:
            with model.stream("Once upon a time", max_tokens=n, **options) as one:
                for _ in one:
                    pass
            return one.stats

        stats = benchmark.pedantic(stream, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]
    spent = stats.breakdown
    benchmark.extra_info["us"] = {part: getattr(spent, f"{part}_s") / spent.tokens * 1e6 for part in PARTS}
    benchmark.extra_info.update(gigabytes_per_s=spent.gigabytes_per_s, major_page_faults=spent.major_page_faults)
    print(f"\n{name}, {sampling}: {spent}")
    counted = sum(getattr(spent, f"{part}_s") for part in PARTS if part != "caller")
    assert counted <= stats.decode_s
    assert (stats.decode_s - counted) / spent.tokens <= 20e-6
    assert spent.graphs_reused >= 0.9 * spent.tokens


# In a process of its own, since a device cannot be taken away again.
HYBRID = """
import json, os, sys
import overspill

path, endpoint = sys.argv[1:]
overspill.add_rpc_server(endpoint)
cases = {
    "all on the CPU": "cpu",
    "all on the device": {"default": "RPC0"},
    "experts on the CPU": {"default": "RPC0", "experts": "cpu"},
    "half of the layers": {"layers 2-3": "RPC0"},
    "the output alone": {"output": "RPC0"},
}
results = []
for name, offload in cases.items():
    found = overspill.bench(path, offload=offload, n_prompt=0, n_gen=64, repetitions=3, n_threads=1)
    results.append([name, found.to_dicts()[0]])
print(json.dumps(results), flush=True)
os._exit(0)
"""


def test_hybrid(benchmark: BenchmarkFixture, tiny_gpt_oss_path: Path) -> None:
    """What a token costs on two devices; the graph has no more pieces than llama.cpp counted."""

    def measure() -> list[tuple[str, dict[str, Any]]]:
        with running_server() as endpoint:
            command = [sys.executable, "-c", HYBRID, str(tiny_gpt_oss_path), endpoint]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
        assert done.returncode == 0, done.stderr[-3000:]
        results: list[tuple[str, dict[str, Any]]] = json.loads(done.stdout)
        return results

    results = benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]
    print(f"\n{'':22}  us a token  splits  {'CPU':>8}  {'device':>8}  {'moving':>8}  limit")
    for name, test in results:
        found = test["overspill"]
        busy = {one["device"]: one["busy_s"] * 1e6 for one in found["devices"]}
        pieces = sum(one["n_pieces"] for one in found["devices"])
        splits = found["breakdown"]["graph_splits"]
        print(
            f"{name:22}  {found['token_s'] * 1e6:10.0f}  {splits:6}  {busy.get('CPU', 0):8.0f}  "
            f"{busy.get('RPC0', 0):8.0f}  {found['parts_s']['moving between devices'] * 1e6:8.0f}  {found['limit']}"
        )
        assert pieces <= splits
        benchmark.extra_info[name] = found


@pytest.mark.parametrize("name", ["tiny_gpt_oss", "smollm2", "gemma"])
def test_roofline(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, name: str) -> None:
    """Decoding reaches this share of what the memory allows."""
    path: Path = request.getfixturevalue(f"{name}_path")
    found = benchmark.pedantic(  # type: ignore[no-untyped-call]
        lambda: bench(path, n_prompt=128, n_gen=64, repetitions=3, n_threads=2, offload="cpu"), rounds=1
    )
    benchmark.extra_info.update(found.to_dicts()[-1]["overspill"])
    console = Console(width=120)
    console.print()
    console.print(found)
    assert found.share > 0.05
