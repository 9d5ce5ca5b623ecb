"""Show where a token's time goes, by the stream's own counters, and as a share of what the memory allows."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from overspill import bench
from quantities import devices, stream
from quantities.measuring import in_own_process
from reporting import measured, show
from rpc_server import running_server

PARTS = ("wait", "decode", "sync", "logits", "sample", "python", "text", "caller")


@pytest.mark.parametrize("sampling", stream.SAMPLINGS)
@pytest.mark.parametrize("name", ["tiny_gpt_oss", "smollm2", "gemma"])
def test_where_time_goes(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, name: str, sampling: str) -> None:
    """All but llama_decode is small, and what the counters count is nearly all that the clock sees."""
    path: Path = request.getfixturevalue(f"{name}_path")
    n = 512 if name == "tiny_gpt_oss" else 64
    quantity = partial(stream.token, path, n_tokens=n, sampling=stream.SAMPLINGS[sampling])
    (stats,) = measured(benchmark, quantity, rounds=3).ours[-1].stats
    spent = stats.breakdown
    parts_s = {part: getattr(spent, f"{part}_s") / spent.tokens for part in PARTS}
    benchmark.extra_info["us"] = {part: seconds * 1e6 for part, seconds in parts_s.items()}
    benchmark.extra_info.update(gigabytes_per_s=spent.gigabytes_per_s, major_page_faults=spent.major_page_faults)
    cells = [f"{name}, {sampling}", *(f"{seconds * 1e6:.1f}" for seconds in parts_s.values())]
    show(["µs a token", *PARTS, "GB/s"], [*cells, f"{spent.gigabytes_per_s or 0:.1f}"])
    uncounted_s = stats.decode_s / spent.tokens - sum(s for part, s in parts_s.items() if part != "caller")
    assert 0 <= uncounted_s <= 20e-6
    assert spent.graphs_reused >= 0.9 * spent.tokens


def test_hybrid(benchmark: BenchmarkFixture, tiny_gpt_oss_path: Path) -> None:
    """What a token costs on two devices; the graph has no more pieces than llama.cpp counted."""
    with running_server() as endpoint:
        arguments = (devices.parts_of_a_token, tiny_gpt_oss_path, endpoint)
        results = benchmark.pedantic(in_own_process, arguments, rounds=1)  # type: ignore[no-untyped-call]
    rows = []
    for name, test in results.items():
        found = test["overspill"]
        busy_s = {one["device"]: one["busy_s"] for one in found["devices"]}
        splits = found["breakdown"]["graph_splits"]
        parts_s = (busy_s.get("CPU", 0), busy_s.get("RPC0", 0), found["parts_s"]["moving between devices"])
        rows.append(
            [
                *(name, f"{found['token_s'] * 1e6:.0f}", f"{splits}", *(f"{seconds * 1e6:.0f}" for seconds in parts_s)),
                found["limit"],
            ]
        )
        assert sum(one["n_pieces"] for one in found["devices"]) <= splits
        benchmark.extra_info[name] = found
    show(["µs a token", "all", "splits", "CPU", "device", "moving", "limit"], *rows)


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
