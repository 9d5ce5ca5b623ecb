"""Experts that a GPU computes while the CPU computes the others of a token.

What is to be the same to the last bit is computed on a stand-in that has the CPU's products; it does not come and go, so
such tests have processes of their own. The others run on a real GPU where there is one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from architectures import FORMS, tiny
from expert_caches import counts, loaded, pool_bytes, replayed
from header_files import Header, Routes, gpt_oss, write_random_model
from model_fixtures import N_THREADS
from overspill import ClosedError, Device, Model, ModelInfo, OutOfMemoryError
from programs import in_process
from routed_models import markov_routes, write_routed_model
from sweeps import sweep

# --- the same results, whatever is resident -----------------------------------------------------


def divided(header: Header) -> Header:
    """Return the model with gate and up of its experts in two tensors, where they are in one."""
    tensors = {}
    for name, (shape, kind) in header.tensors.items():
        if "ffn_gate_up_exps" in name:
            n_experts, n_rows, width = shape
            for part in ("gate", "up"):
                tensors[name.replace("gate_up", part)] = ((n_experts, n_rows // 2, width), kind)
        else:
            tensors[name] = (shape, kind)
    return replace(header, tensors=tensors)


MODELS: dict[str, Callable[[], Header]] = {
    "gpt-oss": partial(gpt_oss, 3, 8, 512, width=256, expert_width=256, n_heads=4, n_heads_kv=2),
    **{name: partial(tiny, name) for name in FORMS if "expert_count" in tiny(name).keys},
    "deepseek2, gate and up apart": lambda: divided(tiny("deepseek2")),
}
# Each expert has activations of its own.
NOT_CACHED = {"llama4"}
SHARES = (0.25, 0.6, 1.0)

SAME = """
import json, os, sys
from pathlib import Path
import numpy as np
from expert_caches import counts, loaded
from upstream_tools import stand_in_gpu

tools, shares, *paths = sys.argv[1:]
stand_in_gpu(Path(tools), "GPU0", 1 << 30, computes_as_host=True)

def answers(path, n_slots, shuffled):
    with loaded(path, "GPU0", n_slots=n_slots) as model:
        tokens = np.random.default_rng(1).integers(0, model.n_vocab, 40).tolist()
        # A prompt, tokens one by one, and another prompt among them.
        parts = [tokens[:8], *([token] for token in tokens[8:24]), tokens[24:30], *([token] for token in tokens[30:])]
        logits, hits, requests = [], [], []
        for number, part in enumerate(parts):
            if shuffled:
                model._core.shuffle_experts(number)
            logits.append(model.eval(part).copy())
            if n_slots:
                found = counts(model)
                hits.append(found.n_hits)
                requests.append(found.n_requests)
        slots = counts(model).n_slots if n_slots else 0
    with loaded(path, "GPU0", n_slots=n_slots) as model:
        reply = [token.id for token in model.stream(tokens[:5], max_tokens=24, temperature=0)]
    hits, requests = (np.diff(one, prepend=0) for one in (hits, requests))
    return np.array(logits), reply, slots, hits, requests

results = []
for path in paths:
    logits, reply, *_ = answers(path, 0, False)
    found = {}
    with loaded(path, "GPU0") as model:
        n_experts = model.info.n_experts * len(model.info.expert_layers)
    for share in json.loads(shares):
        for shuffled in (False, True):
            n_slots = int(share * n_experts)
            again, reply_again, slots, hits, requests = answers(path, n_slots, shuffled)
            found[f"{share}{' shuffled' * shuffled}"] = {
                "same_logits": np.array_equal(logits, again),
                "same_reply": reply == reply_again,
                "wanted_slots": n_slots,
                "slots": slots,
                "hits": hits.tolist(),
                "requests": requests.tolist(),
            }
    results.append({"std": float(logits.std()), "cases": found})
print(json.dumps(results), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, upstream_tools: Path) -> dict[str, Any]:
    """Return what each of the models answers with a cache, beside what it answers without."""
    folder = tmp_path_factory.mktemp("models")
    paths = [
        write_random_model(folder / f"{number}.gguf", header(), vocabulary=False)
        for number, header in enumerate(MODELS.values())
    ]
    found = in_process(SAME, str(upstream_tools), json.dumps(SHARES), *map(str, paths))
    return dict(zip(MODELS, found, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_results_do_not_depend_on_what_is_resident(answers: dict[str, Any], name: str) -> None:
    """With the cache's own choice and with a random one before each token, logits are the same to the last bit."""
    assert answers[name]["std"] > 0.1
    cases = answers[name]["cases"]
    assert len(cases) == 2 * len(SHARES)
    for case, found in cases.items():
        assert found["same_logits"], case
        assert found["same_reply"], case
        if name in NOT_CACHED:
            assert found["slots"] == sum(found["hits"]) == 0, case
            continue
        assert found["slots"] == found["wanted_slots"], case
        hits, requests = np.array(found["hits"]), np.array(found["requests"])
        assert (hits <= requests).all(), case
        assert hits.sum() > 0, case
        # Nothing is resident at first, and what a token misses comes after it. Prompts are not counted.
        is_single = requests > 0
        assert is_single.tolist() == [False, *[True] * 16, False, *[True] * 10], case
        assert hits[1] == 0, case
        if case == "1.0 shuffled":
            # Some are decoded without the cache, to find out whether that is faster.
            with_it = hits > 0
            assert with_it.sum() >= 6, case
            assert (hits[with_it] == requests[with_it]).all(), case
        elif "shuffled" in case:  # some of a token's experts are here, and some there
            assert ((hits > 0) & (hits < requests)).any(), case


TWO_GPUS = """
import json, os, sys
from pathlib import Path
import numpy as np
from expert_caches import counts, pool_bytes
from overspill import Model, ModelInfo
from upstream_tools import stand_in_counts, stand_in_gpu

path, tools = sys.argv[1], Path(sys.argv[2])
for name in ("GPU0", "GPU1"):
    stand_in_gpu(tools, name, 1 << 30, computes_as_host=True)
options = {"offload": {"default": "GPU0", "experts": "cpu"}, "n_ctx": 512, "n_threads": 2}
info = ModelInfo.from_file(path)
n_slots = info.n_experts * len(info.expert_layers) // 2

def logits(**more):
    with Model(path, **options, **more) as model:
        found = []
        for token in range(20):
            model._core.shuffle_experts(token)
            found.append(model.eval([token]).copy())
        return np.array(found), model._core.expert_counts()

expected, _ = logits()
results = []
for parts in ([1, 0], [0.5, 0.5], [0.25, 0.75], [0, 1]):
    pools = {f"GPU{i}": pool_bytes(info, int(n_slots * part)) for i, part in enumerate(parts) if part}
    found, counts = logits(experts="cached", expert_cache=pools, expert_insertions=1000)
    results.append([bool(np.array_equal(found, expected)), counts.n_slots, counts.n_hits])
print(json.dumps([n_slots, results]), flush=True)
os._exit(0)
"""


def test_a_cache_on_two_gpus(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """Or on one that has nothing else of the model; the results are the same."""
    n_slots, results = in_process(TWO_GPUS, str(tiny_gpt_oss_path), str(upstream_tools))
    for same, slots, hits in results:
        assert same
        assert 0.9 * n_slots <= slots <= n_slots
        assert hits > 0


# --- hits ---------------------------------------------------------------------------------------

ROUTINGS = {"gpt-oss-20b": (24, 32, 4), "gpt-oss-120b": (36, 128, 4)}
N_TOKENS = 512
RESIDENT = (0.06, 0.125, 0.25, 0.31, 0.5)


def routes_like(name: str) -> Routes:
    """Return routes of that model's shape, behind a layer that always uses the same experts.

    With five slots it has one that stays empty. Until a cache is full, it is not left out to find out whether decoding
    is faster without.
    """
    n_layers, n_experts, n_used = ROUTINGS[name]
    routes = markov_routes(N_TOKENS, n_layers, n_experts, n_used)
    same = np.broadcast_to(np.arange(n_used, dtype=np.uint16), (N_TOKENS, 1, n_used))
    return np.concatenate([same, routes], axis=1)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Routes]]:
    """Return a function from a routing's name to a model that has it, and its routes."""
    folder, known = tmp_path_factory.mktemp("routed"), dict[str, tuple[Path, Routes]]()

    def model(name: str) -> tuple[Path, Routes]:
        if name not in known:
            routes = routes_like(name)
            path = write_routed_model(folder / f"{name}.gguf", routes, ROUTINGS[name][1], width=N_TOKENS)
            known[name] = path, routes
        return known[name]

    return model


def decoded(path: Path, gpu: str, n_slots: int, n_tokens: int) -> tuple[npt.NDArray[np.int64], bool]:
    """Return the hits of each token in turn, from the first of those given on, and whether the cache was given up."""


@pytest.mark.parametrize(
    ("name", "resident"),
    sweep([(name, share) for name in ROUTINGS for share in RESIDENT], always=[0, 1, 2, 3, 4, 7]),
)
def test_hits_are_those_of_the_replay(
    gpu: str, routed: Callable[[str], tuple[Path, Routes]], name: str, resident: float
) -> None:
    """Token by token, in what is decoded with the cache."""
    path, routes = routed(name)
    n_experts, n_layers = ROUTINGS[name][1], routes.shape[1]
    n_slots = round(resident * n_experts) * n_layers + 1
    begin, n_hits, n_replayed, n_with_it = 0, 0, 0, 0
    while begin < N_TOKENS:
        hits, requests, n_insertions = [0], [0], 0
        with loaded(path, gpu, n_slots=n_slots) as model:
            for token in range(begin, N_TOKENS):
                model.eval([token])
                found = counts(model)
                assert found.n_tokens == token - begin + 1
                hits.append(found.n_hits)
                requests.append(found.n_requests)
                if found.is_off:  # given up for good: another one begins where it has ended
                    break
            assert found.n_slots == n_slots
            assert found.n_experts == n_experts * n_layers
        by_token = np.diff(hits)
        assert (np.diff(requests) == routes[0].size).all()
        end = begin + len(by_token)
        expected = replayed(routes[begin:end], n_experts, n_slots)
        with_it = (by_token > 0) | (expected == 0)
        assert (~with_it).sum() <= 18
        if n_slots // n_layers >= 5:
            assert with_it.all()
        assert by_token[with_it].tolist() == expected[with_it].tolist()
        n_hits += int(by_token[with_it].sum())
        n_replayed += int(expected[with_it].sum())
        n_with_it += int(with_it.sum())
        begin = end
    n_requests = n_with_it * routes[0].size
    assert n_with_it > 0.4 * N_TOKENS
    assert abs(n_hits - n_replayed) < 0.01 * n_requests
    assert 0.1 < n_hits / n_requests < 0.99
