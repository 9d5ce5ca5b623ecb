"""Traces of experts and their replays, against slow references."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from commands import overspill
from header_files import write_header
from model_fixtures import N_THREADS
from overspill import (
    Error,
    ExpertTrace,
    Hardware,
    Model,
    ModelInfo,
    _core,
    plan_expert_cache,
    replay_experts,
    trace_experts,
)
from overspill.studies.experts.trace import POLICIES, Policy

N_EXPERTS, N_USED, N_LAYERS = 16, 3, 2
UNKNOWN = _core.UNKNOWN_EXPERT

Routes = Sequence[Sequence[int]]
"""Of one layer, the experts of each token."""


def routes(n_tokens: int, seed: int, n_experts: int = N_EXPERTS, n_used: int = N_USED) -> NDArray[np.uint16]:
    """Return those of a router that mostly stays with what it used, and has favourites that change."""
    random = np.random.default_rng(seed)
    found = np.zeros((n_tokens, N_LAYERS, n_used), np.uint16)
    scores = np.zeros((N_LAYERS, n_experts))
    for token in range(n_tokens):
        scores = 0.7 * scores + random.standard_normal(scores.shape) + np.linspace(0.5, 0, n_experts)
        found[token] = np.argsort(-scores, axis=1)[:, :n_used]
    return found


def trace(*requests: NDArray[np.uint16], n_experts: int = N_EXPERTS, n_prompt: tuple[int, ...] = ()) -> ExpertTrace:
    """Return a trace of all layers."""
    layers = tuple(range(requests[0].shape[1]))
    return ExpertTrace(requests, n_prompt or (0,) * len(requests), n_experts, layers, "a router")


Admits = Callable[[Routes, int, int, int, int], bool]


def lru(tokens: Routes, capacity: int, admits: Admits) -> int:
    """Return the hits; ``admits`` says whether a miss is inserted.

    It gets the token, the expert, how many of the token were inserted before it, and how many are resident.
    """
    resident: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for now, experts in enumerate(tokens):
        here = set(resident)
        hits += len(here & set(experts))
        n_inserted = 0
        for expert in experts:
            if expert not in here:
                if not admits(tokens, now, expert, n_inserted, len(resident)):
                    continue
                n_inserted += 1
            resident[expert] = None
            resident.move_to_end(expert)
        while len(resident) > capacity:
            resident.popitem(last=False)
    return hits


def lfu(tokens: Routes, capacity: int) -> int:
    """Return the hits, with exact fractions."""
    resident: set[int] = set()
    hits = 0
    uses: Counter[int] = Counter()
    scores: dict[int, Fraction] = {}
    for experts in tokens:
        hits += len(resident & set(experts))
        scores = {expert: score * Fraction(99, 100) for expert, score in scores.items()}
        for expert in experts:
            scores[expert] = scores.get(expert, Fraction(0)) + 1
            uses[expert] += 1
        candidates = sorted(resident | set(experts), key=lambda expert: (-scores[expert], expert))
        resident = set(candidates[:capacity])
    return hits


def fixed(tokens: Routes, capacity: int) -> int:
    """Return the hits in the second half."""
    half = len(tokens) // 2
    uses = Counter(expert for experts in tokens[:half] for expert in experts)
    resident = set(sorted(range(N_EXPERTS), key=lambda expert: (-uses[expert], expert))[:capacity])
    return sum(len(resident & set(experts)) for experts in tokens[half:])


def most_hits(tokens: Routes, capacity: int) -> int:
    """Return the most hits that any policy can have, by trying all of them."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for experts in tokens:
        following: dict[frozenset[int], int] = {}
        for resident, hits in best.items():
            now = hits + len(resident & set(experts))
            there = resident | set(experts)
            for kept in combinations(sorted(there), min(capacity, len(there))):
                state = frozenset(kept)
                following[state] = max(following.get(state, 0), now)
        best = following
    return max(best.values())


REFERENCES: dict[Policy, Callable[[Routes, int], int]] = {
    "lru": lambda tokens, capacity: lru(tokens, capacity, lambda *_: True),
    "lru-one-insertion": lambda tokens, capacity: lru(tokens, capacity, lambda _, __, ___, before, ____: before == 0),
    "second-touch": lambda tokens, capacity: lru(
        tokens,
        capacity,
        lambda all_, now, expert, _, n: n < capacity or any(expert in one for one in all_[max(0, now - 2) : now]),
    ),
    "lfu": lfu,
    "fixed": fixed,
}


@pytest.mark.parametrize("policy", REFERENCES)
@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8, 15, 16])
def test_replays_are_those_of_the_references(policy: Policy, capacity: int) -> None:
    """Layer by layer, below and above what a token uses."""
    found = trace(routes(150, capacity))
    replayed = found.replay(policy, capacity / N_EXPERTS)
    assert replayed.resident == capacity
    by_layer = [found.routes()[:, layer].tolist() for layer in range(N_LAYERS)]
    assert list(replayed.hits_by_layer) == [REFERENCES[policy](tokens, capacity) for tokens in by_layer]
    n_tokens = 75 if policy == "fixed" else 150
    assert replayed.tokens == n_tokens
    assert replayed.requests_by_layer == (n_tokens * N_USED,) * N_LAYERS


@pytest.mark.parametrize("capacity", [1, 2, 3, 4])
def test_belady_has_the_most_hits_that_there_are(capacity: int) -> None:
    """Of six experts, all that can be kept was tried."""
    for seed in range(20):
        one = routes(14, seed, n_experts=6, n_used=2)
        replayed = trace(one, n_experts=6).replay("belady", capacity / 6)
        assert list(replayed.hits_by_layer) == [most_hits(one[:, layer].tolist(), capacity) for layer in range(2)]


def test_a_shared_cache_is_one_for_all_layers() -> None:
    """It has as many places as all layers together, and keeps apart experts of one number."""
    one = routes(120, 7)
    apart = one.astype(int) + np.arange(N_LAYERS)[:, None] * N_EXPERTS
    capacity, hits = 4 * N_LAYERS, 0
    resident: list[int] = []
    for layers in apart.tolist():
        for experts in layers:
            hits += len(set(experts) & set(resident))
            resident = [expert for expert in resident if expert not in experts] + experts
            resident = resident[-capacity:]
    assert trace(one).replay("lru-shared", 4 / N_EXPERTS).hits == hits


def test_no_policy_beats_belady_and_lru_has_inclusion() -> None:
    """More residents are never less hits for LRU; with all, only first uses are misses."""
    found = trace(routes(400, 3), routes(300, 4))
    before = 0
    first_uses = int((found.counts() > 0).sum())
    for capacity in range(1, N_EXPERTS + 1):
        replays = {policy: found.replay(policy, capacity / N_EXPERTS) for policy in POLICIES}
        best = replays["belady"].hits
        # What is fixed knows the first half before it begins; a shared cache may give one layer more than another.
        assert all(replays[policy].hits <= best for policy in ("lru", "lru-one-insertion", "second-touch", "lfu"))
        assert before <= replays["lru"].hits
        before = replays["lru"].hits
        for replay in replays.values():
            misses = np.subtract(replay.requests_by_layer, replay.hits_by_layer)
            assert (np.array(replay.insertions_by_layer) <= misses).all()
    for policy in ("lru", "lfu", "belady", "lru-shared"):
        replay = replays[policy]
        assert replay.requests - replay.hits == first_uses == sum(replay.insertions_by_layer)
    assert replays["fixed"].hit_share == 1


def test_reuse_distances_are_those_of_a_list() -> None:
    """And their sums are what LRU hits."""
    found = trace(routes(300, 5))
    counts = [0] * (N_EXPERTS + 1)
    for layer in range(N_LAYERS):
        used: list[int] = []
        for experts in found.routes()[:, layer].tolist():
            for expert in experts:
                counts[used[::-1].index(expert) if expert in used else N_EXPERTS] += 1
            used = [expert for expert in used if expert not in experts] + experts
    distances = found.reuse_distances()
    assert distances.tolist() == counts
    for capacity in range(1, N_EXPERTS + 1):
        assert found.replay("lru", capacity / N_EXPERTS).hits == sum(counts[:capacity])


def test_counts_and_repetitions_are_those_of_the_routes() -> None:
    """Of the tokens that are asked for."""
    one, other = routes(40, 1), routes(30, 2)
    found = trace(one, other, n_prompt=(10, 30))
    assert found.routes("prompt").tolist() == [*one[:10].tolist(), *other.tolist()]
    assert found.routes("decoded").tolist() == one[10:].tolist()
    assert found.routes("all").tolist() == [*one.tolist(), *other.tolist()]
    counts = found.counts("decoded")
    assert counts.shape == (N_LAYERS, N_EXPERTS)
    for layer in range(N_LAYERS):
        assert dict(enumerate(counts[layer])) == {
            e: Counter(one[10:, layer].ravel().tolist())[e] for e in range(N_EXPERTS)
        }
    pairs = [
        (expert in before[layer])
        for before, now in zip(one[10:].tolist(), one[11:].tolist(), strict=False)
        for layer in range(N_LAYERS)
        for expert in now[layer]
    ]
    assert found.repeated_share() == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_unknown_is_no_request(policy: Policy) -> None:
    """A layer that was not seen for some tokens asked for nothing then."""
    one = routes(80, 9)
    one[10:50, 1] = UNKNOWN
    replayed = trace(one).replay(policy, 0.5)
    assert replayed.requests_by_layer == ((40 * 3, 30 * 3) if policy == "fixed" else (80 * 3, 40 * 3))
    if policy not in ("lru-shared", "fixed", "second-touch"):
        gap = np.concatenate([one[:10], one[50:]])
        assert replayed.hits_by_layer[1] == trace(gap).replay(policy, 0.5).hits_by_layer[1] or policy == "lfu"


def test_files_come_back(tmp_path: Path) -> None:
    """What is unknown, too, with few experts and with many."""
    for n_experts in (16, 255, 256, 300):
        one, other = routes(20, 1, n_experts), routes(12, 2, n_experts)
        one[3:9, 1] = UNKNOWN
        before = ExpertTrace((one, other), (9, 0), n_experts, (1, 5), "a model")
        before.save(tmp_path / "trace.npz")
        after = ExpertTrace.load(tmp_path / "trace.npz")
        assert [request.tolist() for request in after.requests] == [one.tolist(), other.tolist()]
        assert (after.n_prompt, after.n_experts, after.layers, after.model) == ((9, 0), n_experts, (1, 5), "a model")


def test_files_of_other_tools_are_read(tmp_path: Path) -> None:
    """Arrays of requests alone, of any integers; 255 is an expert then."""
    one = routes(20, 1, n_experts=256)
    one[0, 0, 0] = 255
    for kind in (np.uint8, np.int32, np.uint16):
        np.savez(tmp_path / "other.npz", request_000=one.astype(kind), request_001=one[:4].astype(kind))
        found = ExpertTrace.load(tmp_path / "other.npz")
        assert (found.n_experts, found.model, len(found.requests)) == (256, "other", 2)
        assert found.requests[0].tolist() == one.tolist()
    assert ExpertTrace.load(tmp_path / "other.npz", n_experts=300).n_experts == 300
    np.savez(tmp_path / "other.npz", request_000=one.astype(np.uint8), n_experts=np.array(256))
    assert ExpertTrace.load(tmp_path / "other.npz").requests[0].tolist() == one.tolist()


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    """Each in one line that names the file."""
    file = tmp_path / "bad.npz"
    with pytest.raises(Error, match=r"bad\.npz: No such file"):
        ExpertTrace.load(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("request_000", "a text")
    with pytest.raises(ValueError, match="not other content"):
        ExpertTrace.load(file)
    for content in (b"", b"PK\x03\x04", b"no archive"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz is no \.npz file"):
            ExpertTrace.load(file)
    one = routes(5, 1)
    for arrays, text in [
        ({"tokens": one}, "must be named"),
        ({"request_000": one.astype(float)}, "must be integers"),
        ({"request_000": one[0]}, "must be integers of shape"),
        ({"request_000": one, "request_001": one[:, :1]}, "all with as many layers"),
        ({"request_000": one.astype(np.int64) - 5}, "experts must be 0"),
        ({"request_000": np.array([{}])}, "no .npz file of arrays"),
        ({"request_000": one, "n_experts": np.array(4)}, "under n_experts = 4"),
        ({"request_000": one, "n_prompt": np.array([6])}, "n_prompt"),
        ({"request_000": one, "n_prompt": np.array([3.7])}, "n_prompt must be a list of integers"),
        ({"request_000": one, "layers": np.array([1])}, "layers must be 2 numbers"),
        ({"request_000": one, "layers": np.array([-1, 2])}, "layers must be numbers from 0"),
        ({"request_000": one[:, :, [0, 1, 0]]}, "an expert twice"),
        ({"request_000": np.zeros((0, 10**12, 4), np.uint8)}, "at most 65535 layers"),
    ]:
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=text):
            ExpertTrace.load(file)
    np.savez_compressed(file, request_000=np.tile(one, (50, 1, 1)))
    content = file.read_bytes()
    for place in range(len(content)):  # whatever is damaged: read, or refused in one line
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x5A]) + content[place + 1 :])
        with contextlib.suppress(ValueError, Error):
            ExpertTrace.load(file)
    with pytest.raises(ValueError, match="under n_experts = 2"):
        np.savez(file, request_000=one)
        ExpertTrace.load(file, n_experts=2)
    with pytest.raises(ValueError, match=r"end in \.npz"):
        trace(one).save(tmp_path / "trace.txt")


def test_wrong_arguments_are_named() -> None:
    """The core checks what would lead out of its memory."""
    found = trace(routes(5, 1))
    with pytest.raises(ValueError, match="resident must be over 0"):
        found.replay("lru", 0)
    with pytest.raises(ValueError, match="policy"):
        found.replay("mru", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens"):
        found.routes("none")  # type: ignore[arg-type]
    ids = np.zeros((3, 1, 2), np.uint16)
    with pytest.raises(ValueError, match="expert 0 is there twice"):
        _core.replay_experts(ids, 4, _core.CachePolicy.lru, 1)
    ids[:, :, 1] = 4
    with pytest.raises(ValueError, match="under n_experts, which is 4, not 4"):
        _core.expert_reuse_distances(ids, 4)
    with pytest.raises(ValueError, match="capacity must be 1 to 5, not 6"):
        _core.replay_experts(ids, 5, _core.CachePolicy.belady, 6)
    with pytest.raises(TypeError, match="uint16"):
        _core.replay_experts(ids.astype(np.int32), 5, _core.CachePolicy.lru, 1)
    with pytest.raises(ValueError, match="contiguous"):
        _core.replay_experts(ids[:, :, :1], 5, _core.CachePolicy.lru, 1)


# --- recording


def test_a_trace_has_the_experts_of_prompts_and_replies(tiny_gpt_oss_path: Path) -> None:
    """As the streams of the same requests have them, in their order."""
    prompts: list[str | list[int]] = [list(range(5, 30)), "Once upon a time"]
    steps: list[tuple[str, float]] = []
    found = trace_experts(
        tiny_gpt_oss_path,
        prompts,
        max_tokens=9,
        n_ctx=256,
        n_threads=N_THREADS,
        progress=lambda *step: steps.append(step),
        temperature=0.0,
    )
    assert (found.n_experts, found.n_used, found.layers) == (8, 4, (0, 1, 2, 3))
    with Model(tiny_gpt_oss_path, offload="cpu", n_threads=N_THREADS, n_ctx=256) as model:
        for number, prompt in enumerate(prompts):
            with model.stream(prompt, max_tokens=10, temperature=0, experts=True) as stream:
                n = sum(1 for _ in stream)
                expected = stream.read_experts()
            assert found.n_prompt[number] == stream.stats.prompt_tokens
            assert found.requests[number].tolist() == expected[: stream.stats.prompt_tokens + n - 1].tolist()
    assert len(found.routes("prompt")) == sum(found.n_prompt)
    assert not found.requests[0].flags.writeable
    assert steps[0] == ("loading", 0.0)
    assert steps[-1] == ("done", 1.0)
    assert [share for _, share in steps] == sorted(share for _, share in steps)


def test_a_trace_of_a_prompt_alone(tiny_gpt_oss_path: Path) -> None:
    """Nothing is decoded then, and the prompt can be replayed."""
    found = trace_experts(tiny_gpt_oss_path, "Once upon a time", max_tokens=0, n_threads=N_THREADS, n_ctx=256)
    assert len(found.requests[0]) == found.n_prompt[0]
    with pytest.raises(ValueError, match='"prompt" or "all"'):
        replay_experts(found)
    assert replay_experts(found, tokens="prompt", resident=[1.0]).replays[0].requests == found.n_prompt[0] * 4 * 4


def test_what_cannot_be_traced_is_refused(smollm2_path: Path, tiny_gpt_oss_path: Path) -> None:
    """Before anything is loaded."""
    with pytest.raises(Error, match="has no experts"):
        trace_experts(smollm2_path, "Once")
    with pytest.raises(ValueError, match="prompts must be at least one"):
        trace_experts(tiny_gpt_oss_path, [])
    with pytest.raises(ValueError, match="max_tokens must be at least 0"):
        trace_experts(tiny_gpt_oss_path, "Once", max_tokens=-1)


# --- the study


@pytest.fixture
def gpt_oss_20b(tmp_path: Path) -> ModelInfo:
    """Return the header of gpt-oss-20b."""
    return ModelInfo.from_file(write_header(tmp_path / "20b.gguf", "gpt-oss-20b"))


def of_20b(n_tokens: int) -> ExpertTrace:
    """Return a trace of as many layers and experts."""
    both = [routes(n_tokens, seed, n_experts=32, n_used=4) for seed in range(12)]
    return ExpertTrace((np.concatenate(both, axis=1),), (0,), 32, tuple(range(24)), "a router")


def printed(study: object) -> str:
    """Return what a pipe gets."""
    file = io.StringIO()
    Console(file=file, width=200).print(study)
    return file.getvalue()


def test_a_study_has_a_row_for_each_size_and_a_column_for_each_policy(gpt_oss_20b: ModelInfo) -> None:
    """Shares that come to as many experts make one row; the forecast is that of the hits and of the copies."""
    found = of_20b(120)
    cache = plan_expert_cache(gpt_oss_20b, Hardware.given(ram="64GiB", vram="8GiB"))
    study = replay_experts(found, resident=[0.25, 0.26, 0.5, 0.9], policies=["lru", "belady"], cache=cache)
    assert [(one.resident, one.policy) for one in study.replays] == [
        (n, policy) for n in (8, 16, 29) for policy in ("lru", "belady")
    ]
    for one in study.replays:
        assert one == found.replay(one.policy, one.resident_share)
        assert study.tokens_per_s(one) == cache.tokens_per_s(one.hit_share, one.insertions_per_token)
    data = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert np.array_equal(data["counts"], found.counts())
    assert [one["hits"] for one in data["replays"]] == [one.hits for one in study.replays]
    assert data["tokens"] == {"prompt": 0, "decoded": 120}
    lines = printed(study).splitlines()
    assert [line.split()[1] for line in lines if "resident" in line and "%" in line] == ["resident"] * 9
    assert f"{study.replays[0].hit_share:.3f}" in printed(study)
    # Nine tenths of the experts are more than what is left of 8 GiB.
    assert sum("GiB *" in line for line in lines) == 3
    assert "forecast" not in printed(replay_experts(found))


def test_a_forecast_for_another_model_is_refused(gpt_oss_20b: ModelInfo) -> None:
    """A trace with other experts of a token is taken, and that is said."""
    cache = plan_expert_cache(gpt_oss_20b, Hardware.given(ram="64GiB", vram="8GiB"))
    with pytest.raises(ValueError, match="the trace has 2 layers of 16 experts, gpt-oss 24 of 32"):
        replay_experts(trace(routes(20, 1)), cache=cache)
    fewer = ExpertTrace((of_20b(40).requests[0][:, :, :2].copy(),), (0,), 32, tuple(range(24)), "a router")
    study = replay_experts(fewer, cache=cache, resident=[0.25], policies=["lru"])
    assert "The trace has 2 experts of a token, and the model uses 4" in printed(study)
    one = study.replays[0]
    assert study.tokens_per_s(one) == cache.tokens_per_s(one.hit_share, 2 * one.insertions_per_token)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    """In the formats of matplotlib."""
    study = replay_experts(of_20b(60))
    study.plot(tmp_path / "experts.png")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    study.plot(tmp_path / "experts.svg")
    text = (tmp_path / "experts.svg").read_text()
    assert "<svg" in text
    with pytest.raises(ValueError, match="the picture must end in"):
        study.plot(tmp_path / "experts.txt")


# --- the command


def test_the_command_records_and_reads(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """What it has saved gives the same tables again, with a forecast where hardware is given."""
    saved, picture = tmp_path / "trace.npz", tmp_path / "picture.png"
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time", encoding="utf-8")
    model = str(tiny_gpt_oss_path)
    common = ["--resident", "25%", "--resident", "0.5", "--policy", "lru", "--policy", "belady", "--json"]
    recorded = overspill(
        *(
            "experts",
            model,
            "A story",
            "--file",
            str(text),
            "-n",
            "12",
            "--temp",
            "0",
            "--ctx",
            "256",
            "--threads",
            "1",
        ),
        *("--save", str(saved), "--plot", str(picture), *common),
    )
    assert recorded.returncode == 0, recorded.stderr
    data = json.loads(recorded.stdout)
    assert (data["requests"], data["n_experts"], data["n_used"], data["layers"]) == (2, 8, 4, [0, 1, 2, 3])
    assert [(one["resident"], one["policy"]) for one in data["replays"]] == [
        (n, policy) for n in (2, 4) for policy in ("lru", "belady")
    ]
    assert data["hardware"] is None
    assert picture.stat().st_size > 0
    assert "the trace is in" in recorded.stderr
    read = overspill("experts", "--trace", str(saved), *common)
    assert json.loads(read.stdout) == data
    forecast = overspill("experts", model, "--trace", str(saved), "--ram", "8GiB", "--vram", "2GiB")
    assert forecast.returncode == 0, forecast.stderr
    assert "tokens/s" in forecast.stdout
    assert "forecast for hardware of which some figures are assumed (GPU0, 2.0 GiB)" in forecast.stdout


def test_mistakes_on_the_command_line_are_named(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """In one line, and with the exit code of a wrong command line."""
    np.savez(tmp_path / "trace.npz", request_000=routes(20, 1))
    trace_file = str(tmp_path / "trace.npz")
    for arguments, text in [
        ([], "give MODEL and a PROMPT or --file, or --trace"),
        ([str(tiny_gpt_oss_path)], "give MODEL and a PROMPT or --file, or --trace"),
        ([str(tiny_gpt_oss_path), "Once", "--trace", trace_file], "give no PROMPT and no --file"),
        (["--trace", trace_file, "--resident", "120%"], "--resident must be a share"),
        (["--trace", trace_file, "--resident", "many"], "--resident must be a share"),
        (["--trace", trace_file, "--policy", "mru"], "--policy must be one of lru"),
        (["--trace", trace_file, "--tokens", "few"], "tokens"),
        (["--trace", trace_file, "--ram", "8GiB", "--vram", "1GiB"], "a forecast needs MODEL"),
        (["--trace", trace_file, "--experts", "3"], "under n_experts = 3"),
        (["--trace", trace_file, "--save", str(tmp_path / "other.txt")], "--save must end in .npz"),
        ([str(tiny_gpt_oss_path), "--trace", trace_file, "--ram", "8GiB", "--vram", "1GiB"], "experts under n_experts"),
    ]:
        done = overspill("experts", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert text in done.stderr, arguments
        assert done.stderr.count("\n") == 1
