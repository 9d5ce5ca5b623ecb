"""Measure decoding on a CPU and a device beside it, and compare it with what the planner had predicted.

The device is an RPC server of its own process on loopback: it takes weights and KV cache like a GPU, and moving to it
costs something. One thread here and one there, since waiting threads of llama.cpp spin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from rpc_server import running_server

# A prediction may be so far from what is measured, for so many of the ten.
WITHIN, N_WITHIN = 0.2, 8
# Rates that differ by less than the same placement's from time to time count as equal.
ALIKE = 0.97

# In a process of its own, since a device cannot be taken away again. What else uses the memory slows down for seconds,
# and nothing makes faster. So a placement is compared with the machine as it was measured amid its own tokens, whose
# time is the one that a tenth of them stay below. A slow spell may begin in between, so if too many are off, these are
# measured again: noise passes, a wrong prediction stays. Which are the best is predicted from all measurements of the
# machine, the same for each placement.
MEASURE = """
import json, os, statistics, sys, time
import overspill

path, endpoint = sys.argv[1:3]
within, n_within, alike = map(float, sys.argv[3:])
overspill.add_rpc_server(endpoint)
info = overspill.ModelInfo.from_file(path)
gpus = [device for device in overspill.devices() if device.is_gpu]
half = f"layers {info.n_layers // 2}-{info.n_layers - 1}"
mappings = {
    "all on the CPU": {},
    "all on the device": {"default": "RPC0"},
    "experts on the CPU": {"default": "RPC0", "experts": "cpu"},
    "experts on the device": {"experts": "RPC0"},
    "half of the layers": {half: "RPC0"},
    "the output alone": {"output": "RPC0"},
    "experts of 3 layers on the CPU": {"default": "RPC0", "layers 0-2 experts": "cpu"},
    "attention and KV on the CPU": {"default": "RPC0", "attention": "cpu", "kv": "cpu"},
    "one matrix of each expert on the CPU": {"default": "RPC0", "/ffn_down_exps/": "cpu"},
    "the output on the CPU": {"default": "RPC0", "output": "cpu"},
}
cases = {name: overspill.Placement.from_mapping(info, gpus, mapping) for name, mapping in mappings.items()}
machines = []
visits = {}

def decode(model):
    # A step of each token is all of its work, as with logits=True the stream does not look ahead.
    with model.stream([1, 2, 3, 4], temperature=0, max_tokens=26, logits=True) as stream:
        next(stream)
        times = [time.perf_counter(), *(time.perf_counter() for _ in stream)]
    return [after - before for before, after in zip(times, times[1:])], stream.stats.breakdown

def measure(name):
    with overspill.Model(path, offload=cases[name], n_ctx=512, n_threads=1) as model:
        tokens_s, _ = decode(model)
        machine = overspill.Hardware.here(info, n_threads=1, refresh=True)
        more_s, spent = decode(model)
    machines.append(machine)
    visits[name] = machine, sorted(tokens_s + more_s), spent
    for device in machine.devices:
        rates = {weights: f"{rate / 1e9:.2f} GB/s" for weights, rate in device.rates.items()}
        print(device, rates, f"{device.op_s * 1e6:.2f} us an operation", file=sys.stderr)
    print(name, [f"{1e3 * token_s:.1f} ms" for token_s in tokens_s + more_s], file=sys.stderr, flush=True)

def forecast(name, machine):
    return overspill.forecast(info, cases[name], machine, n_ctx=512, depth=16)

def compare(name):
    machine, tokens_s, spent = visits[name]
    outlook = forecast(name, machine)
    token_s = tokens_s[len(tokens_s) // 10]
    return {
        "predicted": outlook.tokens_per_s, "measured": 1 / token_s, "median": 1 / statistics.median(tokens_s),
        "best_predicted": max(forecast(name, one).tokens_per_s for one in machines),
        "terms": outlook.seconds_by_term, "splits": spent.graph_splits, "predicted_splits": outlook.n_splits,
        "gigabytes_per_s": spent.read_bytes / spent.tokens / token_s / 1e9, "tokens_s": tokens_s,
    }

for name in cases:
    measure(name)
found = {name: compare(name) for name in cases}
best_two = sorted(cases, key=lambda name: -found[name]["best_predicted"])[:2]
second = sorted(one["measured"] for one in found.values())[-2]
off = [name for name in cases if abs(found[name]["predicted"] / found[name]["measured"] - 1) > within]
off = [] if len(cases) - len(off) >= n_within else off
off += [name for name in best_two if name not in off and found[name]["measured"] < alike * second]
for name in off:
    measure(name)
print(json.dumps({name: compare(name) for name in cases}), flush=True)
os._exit(0)
"""


def test_predicted_against_measured(benchmark: BenchmarkFixture, gpt_oss_20b_of_6_layers: Path, tmp_path: Path) -> None:
    """Of ten placements of layers as gpt-oss-20b's, eight do within 20 % what was predicted; the best two are known."""

    def measure() -> dict[str, dict[str, float]]:
        with running_server() as endpoint:
            bounds = map(str, (WITHIN, N_WITHIN, ALIKE))
            command = [sys.executable, "-c", MEASURE, str(gpt_oss_20b_of_6_layers), endpoint, *bounds]
            # What is measured here is nothing to be kept for the user.
            environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        print(done.stderr)
        results: dict[str, dict[str, float]] = json.loads(done.stdout)
        return results

    results = benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(results)
    print(f"\n{'tokens/s':38}predicted  measured  ratio  median  predicted at best  splits  GB/s")
    for name, result in results.items():
        ratio = result["predicted"] / result["measured"]
        print(
            f"{name:38}{result['predicted']:9.2f}  {result['measured']:8.2f}  {ratio:5.2f}  {result['median']:6.2f}  "
            f"{result['best_predicted']:17.2f}  {result['splits']:6}  {result['gigabytes_per_s']:4.1f}"
        )
        assert result["splits"] == result["predicted_splits"]
    near = [name for name, result in results.items() if abs(result["predicted"] / result["measured"] - 1) <= WITHIN]
    assert len(near) >= N_WITHIN, near

    second = sorted(result["measured"] for result in results.values())[-2]
    best_two = sorted(results, key=lambda name: -results[name]["best_predicted"])[:2]
    assert all(results[name]["measured"] >= ALIKE * second for name in best_two), best_two
