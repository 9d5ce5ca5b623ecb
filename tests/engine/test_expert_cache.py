"""Experts that a GPU computes while the CPU computes the others of a token.

What is to be the same to the last bit is computed on a stand-in that has the products of the CPU; it never goes, so
such tests have processes of their own. The others run on a real GPU where there is one.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from architectures import FORMS, tiny
from expert_caches import counts, decode_routed, loaded, replayed, slots_by_layer
from header_files import Header, Routes, Shapes, gpt_oss, write_random_model
from model_fixtures import N_THREADS
from overspill import ClosedError, Device, Model, OutOfMemoryError
from programs import in_process
from routed_models import markov_routes, write_routed_model
from sweeps import sweep

# --- the same results, whatever is resident -----------------------------------------------------


def divided(header: Header) -> Header:
    """Return the model with gate and up of its experts in two tensors, where they are in one."""
    tensors: Shapes = {}
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
from overspill import Error, ModelInfo
from upstream_tools import stand_in_gpu

tools, shares, *paths = sys.argv[1:]
stand_in_gpu(Path(tools), "GPU0", 1 << 30, computes_as_host=True)

def answers(path, n_slots, shuffled, n_threads=1):
    options = {"n_slots": n_slots, "n_threads": n_threads}
    with loaded(path, "GPU0", **options) as model:
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
    with loaded(path, "GPU0", **options) as model:
        reply = [token.id for token in model.stream(tokens[:5], max_tokens=24, temperature=0)]
    hits, requests = (np.diff(one, prepend=0) for one in (hits, requests))
    return np.array(logits), reply, slots, hits, requests

def compared(path):
    logits, reply, *_ = answers(path, 0, False)
    found = {}
    info = ModelInfo.from_file(path)
    for share in json.loads(shares):
        for shuffled in (False, True):
            n_slots = int(share * info.n_experts * len(info.expert_layers))
            # Threads that wait for each other take long where others use the cores.
            n_threads = 2 if shuffled and share == 0.6 and path in paths[:3] else 1
            again, reply_again, slots, hits, requests = answers(path, n_slots, shuffled, n_threads)
            found[f"{share}{' shuffled' * shuffled}"] = {
                "same_logits": np.array_equal(logits, again),
                "same_reply": reply == reply_again,
                "wanted_slots": n_slots,
                "slots": slots,
                "hits": hits.tolist(),
                "requests": requests.tolist(),
            }
    return {"std": float(logits.std()), "cases": found}

results = []
for path in paths:
    try:
        results.append(compared(path))
    except Error as error:
        results.append({"error": str(error)})
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
    assert "error" not in answers[name], answers[name]["error"]
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
        # Prompts are not counted, nor tokens that are decoded without the cache to find out whether that is faster.
        assert requests[0] == requests[17] == 0, case
        assert (requests > 0).sum() >= 5, case
        assert hits[1] == 0, case  # nothing is resident at first
        if case == "1.0 shuffled":
            assert (hits[2:] == requests[2:]).all(), case
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
options = {"offload": {"default": "GPU0", "experts": "cpu"}, "n_ctx": 512, "n_threads": 1}
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
N_SAME = 4
RESIDENT = (0.06, 0.125, 0.25, 0.31, 0.5)


def routes_like(name: str) -> Routes:
    """Return routes of that model's shape, behind a layer that always uses the same four experts.

    If it has five slots, one stays empty. While a cache is not full, it is not left out to find out whether decoding is
    faster without.
    """
    routes = markov_routes(N_TOKENS, *ROUTINGS[name])
    same = np.broadcast_to(np.arange(N_SAME, dtype=np.uint16), (N_TOKENS, 1, N_SAME))
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


@pytest.mark.parametrize(
    ("name", "resident"),
    sweep([(name, share) for name in ROUTINGS for share in RESIDENT], always=[0, 1, 2, 3, 4, 7]),
)
def test_hits_are_those_of_the_replay(
    gpu: str, routed: Callable[[str], tuple[Path, Routes]], name: str, resident: float
) -> None:
    """Token by token, and insertions in all."""
    path, routes = routed(name)
    n_experts, n_layers = ROUTINGS[name][1], routes.shape[1]
    n_slots = round(resident * n_experts) * n_layers + 1
    n_decoded = n_with_it = n_hits = 0
    for found in islice(decode_routed(path, gpu, n_slots, N_TOKENS, n_threads=1), 12):
        expected = replayed(routes[found.begin : found.begin + len(found.hits)], n_experts, n_slots)
        # Some tokens are decoded without the cache, once it is full, to find out whether that is faster.
        with_it = found.requests > 0
        assert (found.requests[with_it] == routes[0].size).all()
        assert (~with_it).sum() <= 20
        assert with_it.all() or slots_by_layer(n_slots, n_layers)[0] <= N_SAME
        assert found.hits[with_it].tolist() == expected.hits[with_it].tolist()
        assert found.n_insertions == expected.n_insertions
        n_decoded += len(with_it)
        n_with_it += int(with_it.sum())
        n_hits += int(found.hits.sum())
    assert n_decoded > 100
    assert n_with_it > 0.4 * n_decoded
    assert 0.1 < n_hits / n_with_it / routes[0].size < 0.99


def test_what_was_resident_is_resident_in_the_next_load(
    gpu: str, routed: Callable[[str], tuple[Path, Routes]], tmp_path: Path
) -> None:
    """After its first token, as far as that has left room; hits are of what is there."""
    path, routes = routed("gpt-oss-20b")
    n_layers, capacity = routes.shape[1], 8

    def resident(folder: Path | None, tokens: range) -> tuple[list[set[int]], int]:
        with loaded(path, gpu, n_slots=capacity * n_layers, memory_folder=folder, n_threads=1) as model:
            for token in tokens:
                model.eval([token])
            hits = counts(model).n_hits
        profile = model._core.expert_profile()  # which is taken when the model is closed
        return [set(profile[layer]) for layer in range(n_layers)], hits

    folders = [tmp_path / name for name in ("one", "other")]
    before, _ = resident(folders[0], range(100))
    assert [len(there) for there in before] == [N_SAME] + [capacity] * (n_layers - 1)
    shutil.copytree(folders[0], folders[1])
    after_first, hits = resident(folders[0], range(100, 101))
    assert hits == 0
    for used, old, new in zip(routes[100], before, after_first, strict=True):
        assert set(used.tolist()) <= new <= old | set(used.tolist())
        assert len(new) == len(old)
    _, hits = resident(folders[1], range(100, 102))
    assert hits == sum(len(there & set(used.tolist())) for used, there in zip(routes[101], after_first, strict=True))
    nothing_before, fewer_hits = resident(None, range(100, 102))
    assert sum(map(len, nothing_before)) < sum(map(len, after_first))
    assert fewer_hits < hits


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_routed_model_uses_the_experts_that_it_is_told(
    gpu: str, routed: Callable[[str], tuple[Path, Routes]], name: str
) -> None:
    """In each layer and in their order, in prompts and in replies."""
    path, routes = routed(name)
    order = [int(token) for token in np.random.default_rng(1).permutation(N_TOKENS)]
    # All on the CPU, since only what it computes is recorded.
    with loaded(path, gpu, n_slots=5 * routes.shape[1], offload_min_batch=65536) as model:
        bias = {token: -1e9 for token in range(N_TOKENS) if model.is_end_of_generation(token)}
        with model.stream(order, max_tokens=20, seed=1, temperature=2, logit_bias=bias, experts=True) as stream:
            reply = [token.id for token in stream]
            found = stream.read_experts()
    used = np.array([*order, *reply])[: len(found)]
    assert len(found) in (N_TOKENS + 19, N_TOKENS + 20)
    assert len(set(reply)) > 10
    assert found.tolist() == routes[used].tolist()


def test_a_routed_model_of_the_true_width(tmp_path: Path) -> None:
    """Tokens beyond the routes begin again with the first."""
    routes = markov_routes(60, 2, 8, 4)
    path = write_random_model(tmp_path / "model.gguf", gpt_oss(2, 8, 512), vocabulary=False, routes=routes)
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, 512, 30)]
    with (
        Model(path, offload="cpu", n_ctx=64, n_threads=N_THREADS) as model,
        model.stream(tokens, max_tokens=1, experts=True) as stream,
    ):
        next(stream)
        found = stream.read_experts()
    assert found[:30].tolist() == routes[np.array(tokens) % 60].tolist()


# --- what comes in between ----------------------------------------------------------------------

IN_BETWEEN = """
import json, os, signal, sys, threading, time
from pathlib import Path
import numpy as np
import overspill
from overspill import StopReason, _core
from expert_caches import counts, loaded
from upstream_tools import stand_in_counts, stand_in_gpu

path, tools = Path(sys.argv[1]), Path(sys.argv[2])
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [40, 41, 42]]
N_SLOTS = 20  # of 32

def gpu(latency_s=0):
    stand_in_gpu(tools, "GPU0", 1 << 30, computes_as_host=True, latency_s=latency_s)

def n_copies():
    return stand_in_counts(tools).n_copies

gpu()
"""

ENDED = """
N_STEPS = 8

def opened(model, prompt):
    options = _core.GenerationOptions()
    options.sampler = overspill.Sampler(temperature=0)._core
    options.max_tokens, options.keep_logits, options.look_ahead = N_STEPS, True, False
    return model._core.open_stream(prompt, options)

def steps(model):
    found = []
    for token in opened(model, PROMPTS[0]):
        found.append(token.logits.tolist())
        model._core.shuffle_experts(len(found))
    return found

# A reply; the third of some tokens that are evaluated one by one, behind the first two as one batch, as after an error.
with loaded(path, "GPU0") as model:
    expected = steps(model)
    model.eval([*PROMPTS[1], 9, 10])
    expected_evaluated = model.eval([11]).tolist()

def ended_by(n_of_token, step, end_it):
    # A token takes a second or more.
    gpu(latency_s=1 / n_of_token)
    before = n_copies()
    def watch():
        while n_copies() - before < n_of_token / 2:
            time.sleep(0.001)
        end_it()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        how = "a token" if step() is not None else "none"
    except KeyboardInterrupt:
        how = "interrupted"
    except StopIteration:
        how = "no token"
    watcher.join()
    gpu()
    return how, n_copies() - before

results = []
for way in ("closed", "interrupted", "evaluation interrupted"):
    with loaded(path, "GPU0", n_slots=N_SLOTS, expert_insertions=1) as model:  # copies of weights come last, unended
        model.eval(PROMPTS[1])
        model.eval([9])
        model._core.shuffle_experts(1)
        before = n_copies()
        model.eval([10])
        n_of_token, n_hits = n_copies() - before, counts(model).n_hits
        stream = opened(model, PROMPTS[0])
        next(stream)
        interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
        end_it = (lambda: stream.close(_core.StopReason.closed)) if way == "closed" else interrupt
        step = (lambda: model.eval([11])) if "evaluation" in way else (lambda: next(stream))
        how, n_copied = ended_by(n_of_token, step, end_it)
        evaluated = model.eval([11]).tolist()
        results.append({
            "hits": n_hits,
            "how": how,
            "share_copied": n_copied / n_of_token,
            "same_evaluation": evaluated == expected_evaluated,
            "same_steps": steps(model) == expected,
            "hits_after": counts(model).n_hits - n_hits,
        })
print(json.dumps(results), flush=True)
os._exit(0)
"""


@pytest.mark.usefixtures("heeds_interrupts")
def test_a_token_is_ended_in_the_middle(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """By close() and by a signal, while a GPU has experts to compute; then all is as it was."""
    results = in_process(IN_BETWEEN + ENDED, str(tiny_gpt_oss_path), str(upstream_tools))
    assert [found["how"] for found in results] == ["no token", "interrupted", "interrupted"]
    for found in results:
        assert found["hits"] > 0
        assert 0.4 < found["share_copied"] < 0.95
        assert found["same_evaluation"]
        assert found["same_steps"]
        assert found["hits_after"] > 0


TURNS = """
OPTIONS = {"max_tokens": 16, "temperature": 0}

def alone(model):
    return [[token.id for token in model.stream(prompt, **OPTIONS)] for prompt in PROMPTS]

def by_turns(model):
    # Streams whose experts are read share no batch.
    streams = [model.stream(prompt, experts=True, **OPTIONS) for prompt in PROMPTS]
    replies = [[], []]
    for number in range(16):
        model._core.shuffle_experts(number)
        for stream, reply in zip(streams, replies):
            reply.append(next(stream).id)
    return replies

def many(model, parallel):
    replies = dict(model.generate_many(PROMPTS, parallel=parallel, **OPTIONS))
    return [[token.id for token in replies[number].tokens] for number in (0, 1)]

results = []
for ask in (alone, by_turns, lambda model: many(model, 1), lambda model: many(model, 2)):
    with loaded(path, "GPU0", n_threads=1) as model:
        without = ask(model)
    with loaded(path, "GPU0", n_slots=N_SLOTS, n_threads=1) as model:
        results.append([without, ask(model), counts(model).n_hits])
print(json.dumps(results), flush=True)
os._exit(0)
"""


def test_streams_that_take_turns(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """And replies that are made at once; each has the tokens that it has without a cache."""
    results = in_process(IN_BETWEEN + TURNS, str(tiny_gpt_oss_path), str(upstream_tools))
    assert [with_it for _, with_it, _ in results] == [without for without, _, _ in results]
    assert [len(reply) for reply in results[0][0]] == [16, 16]
    assert all(without == results[0][0] for without, _, _ in results)
    *one_by_one, _ = [hits for _, _, hits in results]  # two tokens at a time are the CPU's alone
    assert min(one_by_one) > 0


# --- memory -------------------------------------------------------------------------------------


def test_no_room_for_the_cache(gpu: str, tiny_gpt_oss_path: Path, device_now: Callable[[], Device]) -> None:
    """Who asks for it is told which GPU refused how much; what the model had there already is given back."""
    with loaded(tiny_gpt_oss_path, gpu, n_slots=16) as model:
        expected = model.eval([1, 2, 3]).copy()
    free_bytes = device_now().free_bytes
    too_much = device_now().total_bytes + (1 << 30)
    with (
        pytest.raises(OutOfMemoryError, match=f"{gpu} refused .* for a cache of experts") as caught,
        loaded(tiny_gpt_oss_path, gpu, n_slots=16, expert_cache={gpu: too_much}),
    ):
        pass
    assert caught.value.device == gpu
    assert caught.value.needed_bytes == too_much
    del caught
    if device_now().backend == "StandIn":
        assert device_now().free_bytes == free_bytes
    with loaded(tiny_gpt_oss_path, gpu, n_slots=16) as model:
        assert np.array_equal(model.eval([1, 2, 3]), expected)


SCARCE = """
import logging

warnings = []
class Keep(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
logging.getLogger("overspill").addHandler(Keep(logging.WARNING))

def free_bytes():
    return next(device for device in overspill.devices() if device.name == "GPU0").free_bytes

with loaded(path, "GPU0", n_threads=1) as model:
    expected = [model.eval([token]).tolist() for token in range(6)]
with loaded(path, "GPU0", n_slots=N_SLOTS, n_threads=1) as model:
    model.eval([0])
    model.reset()
    stand_in_gpu(tools, "GPU0", 1 << 30, refuse_bytes=1, computes_as_host=True)
    same = [model.eval([token]).tolist() for token in range(6)] == expected
    usual = counts(model).n_hits
gpu()
warnings.clear()
with loaded(path, "GPU0", n_slots=N_SLOTS, n_threads=1) as model:
    model.eval([0, 1])  # where experts can be is not decided before the first token by itself
    model.reset()
    stand_in_gpu(tools, "GPU0", 1 << 30, refuse_bytes=(1 << 30) - free_bytes(), computes_as_host=True)
    scarce = [model.eval([token]).tolist() for token in range(6)] == expected
    found = counts(model)
print(json.dumps([same, usual, scarce, found.n_hits, found.n_resident, warnings]), flush=True)
os._exit(0)
"""


def test_no_room_to_compute_experts(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """What the GPU needs beside the cache, it asks for at the first token: if it is refused, a warning says so."""
    same, usual, scarce, hits, resident, warnings = in_process(
        IN_BETWEEN + SCARCE, str(tiny_gpt_oss_path), str(upstream_tools)
    )
    assert same
    assert usual > 0
    assert scarce
    assert hits == resident == 0
    assert [text for text in warnings if "expert" in text] == [
        "no experts are cached on GPUs: the GPU has no room to compute them; a model that is loaded anew with "
        'experts="static" uses their memory'
    ]


def test_memory_of_a_cache_is_given_back(
    gpu: str, routed: Callable[[str], tuple[Path, Routes]], device_now: Callable[[], Device]
) -> None:
    """After each of twenty loads, whether the model was closed or dropped, and whether it had decoded before."""
    path, routes = routed("gpt-oss-20b")
    free_bytes = []
    for number in range(21):
        with loaded(path, gpu, n_slots=8 * routes.shape[1], n_threads=1) as model:
            loaded_bytes = device_now().free_bytes
            for token in range(number % 4):
                model.eval([token])
            stream = model.stream([1, 2, 3], max_tokens=8)
            next(stream)
            if number % 2:
                model.close()
            del stream
        del model
        free_bytes.append(device_now().free_bytes)
        assert loaded_bytes < free_bytes[-1]
    lost = [before - after for before, after in pairwise(free_bytes[1:])]
    if device_now().backend == "StandIn":
        assert lost == [0] * 19
    else:  # other programs take and give back memory of a real GPU, but not each time
        assert median(lost) <= 0


def test_a_model_is_closed_while_experts_are_inserted(
    gpu: str, routed: Callable[[str], tuple[Path, Routes]], device_now: Callable[[], Device]
) -> None:
    """In the middle of replies, whose threads are told, and right after a token."""
    path, routes = routed("gpt-oss-20b")
    free_bytes = []
    for _ in range(4):
        ends: list[str] = []
        with loaded(path, gpu, n_slots=5 * routes.shape[1], n_threads=1) as model:

            def reply(first: int, model: Model = model, ends: list[str] = ends) -> None:
                try:
                    for number in range(first, 10_000):
                        for _ in model.stream([number % N_TOKENS], max_tokens=100, temperature=4, seed=number):
                            pass
                except ClosedError:
                    ends.append("closed")

            threads = [threading.Thread(target=reply, args=(first,)) for first in (0, 1)]
            for thread in threads:
                thread.start()
            while counts(model).n_insertions < 500:
                time.sleep(0.001)
            model.close()
            for thread in threads:
                thread.join()
            assert ends == ["closed"] * 2
        with loaded(path, gpu, n_slots=5 * routes.shape[1], n_threads=1) as model:
            for token in range(3):
                model.eval([token])
            assert counts(model).n_insertions > 0
            model.close()
        free_bytes.append(device_now().free_bytes)
    if device_now().backend == "StandIn":
        assert len(set(free_bytes)) == 1


JUDGED = """
import json, logging, os, sys
from dataclasses import replace
from pathlib import Path
import overspill
from upstream_tools import stand_in_gpu

tools, path, latency_s, n_tokens, trusted, cache = sys.argv[1:]
os.environ["XDG_CACHE_HOME"] = cache
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("overspill").addHandler(handler)
logging.getLogger("overspill.llama").setLevel(logging.INFO)
stand_in_gpu(Path(tools), "GPU0", 2 << 30, latency_s=float(latency_s))
info = overspill.ModelInfo.from_file(path)
here = overspill.Hardware.here(info, measure=False)
gpu = replace(here.gpus[0], bandwidth_bytes_per_s=1e12, rates={}, op_s=0, hop_s=0)
cpu = replace(here.cpu, bandwidth_bytes_per_s=1e9, rates={}, op_s=1e-6)
planned = overspill.plan(info, hardware=replace(here, devices=(gpu, cpu)), n_ctx=1024, experts="cached")
total = sum(info.layers[layer]["experts"] for layer in info.expert_layers)
planned.expert_cache = {"GPU0": total // 2}
found = []
for _ in range(2):
    choice = "cached" if trusted == "yes" else "auto"
    with overspill.Model(path, offload=planned, n_ctx=1024, n_threads=1, experts=choice) as model:
        for token in range(int(n_tokens)):
            model.eval([token % 512])
        counts = model._core.expert_counts()
        gpu_bytes = model.memory["GPU0"].weights_bytes if "GPU0" in model.memory else 0
        found.append([counts and [counts.is_off, counts.n_slots, counts.n_hits / max(1, counts.n_requests)], gpu_bytes])
print(json.dumps([found, [line for line in lines if "cache" in line]]))
"""


def judged(upstream_tools: Path, folder: Path, routes: Any, *, latency_s: float, n_tokens: int, trusted: bool) -> Any:
    """Return what became of a cache in two loads one after the other, and what was said of it."""
    path = write_routed_model(folder / "model.gguf", routes, 8)
    arguments = (str(upstream_tools), str(path), str(latency_s), str(n_tokens), "yes" if trusted else "no", str(folder))
    return in_process(JUDGED, *arguments)


def test_a_cache_that_slows_decoding_down_is_given_up(upstream_tools: Path, tmp_path: Path) -> None:
    """A GPU that takes 2 ms for each step: its memory is given back, and the next load does without."""
    routes = markov_routes(512, 4, 8, 4)
    found, lines = judged(upstream_tools, tmp_path, routes, latency_s=2e-3, n_tokens=80, trusted=False)
    (first, first_bytes), (second, _) = found
    assert first[:2] == [True, 0]
    assert 0 < first_bytes < 4 << 20  # attention is there
    assert second is None
    assert sum("decoding is faster without" in line for line in lines) == 1


def test_where_nothing_is_used_again_whole_layers_are_held(upstream_tools: Path, tmp_path: Path) -> None:
    """Of routes that have nothing to do with each other as many are hits as are resident."""
    routes = markov_routes(512, 4, 8, 4, kept=0.0, zipf=0.0)
    found, lines = judged(upstream_tools, tmp_path, routes, latency_s=0, n_tokens=600, trusted=True)
    hits = max(counts[2] for counts, _ in found)
    assert hits < 0.6  # until it is full there are fewer
    assert any("holds all experts of some layers" in line for line in lines)
    again = tmp_path / "again"
    again.mkdir()
    routes = markov_routes(512, 4, 8, 4, kept=0.7)
    found, lines = judged(upstream_tools, again, routes, latency_s=0, n_tokens=600, trusted=True)
    assert min(counts[2] for counts, _ in found) > hits
    assert not any("holds all experts of some layers" in line for line in lines)
