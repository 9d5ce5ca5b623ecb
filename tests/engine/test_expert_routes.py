"""Which experts the tokens of a stream used, against llama.cpp's own nodes."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from architectures import FORMS, tiny
from header_files import write_random_model
from model_fixtures import N_THREADS
from overspill import Error, Model, _core
from sweeps import sweep

UNKNOWN = _core.UNKNOWN_EXPERT
N_PROMPT, N_REPLY = 40, 12
MIXTURES = [name for name in FORMS if "expert_count" in tiny(name).keys]
QUICK = [MIXTURES.index(name) for name in ("qwen3moe", "deepseek2", "llama4")]


def loaded(path: Path, **options: Any) -> Model:
    """Return a model on the CPU whose weights are as the file has them."""
    return Model(path, **{"offload": "cpu", "repack": "off", "n_threads": N_THREADS, "n_ctx": 512, **options})


def prompt_of(model: Model) -> list[int]:
    """Return some tokens of its vocabulary."""
    return [int(token) for token in np.random.default_rng(1).integers(0, model.n_vocab - 1, N_PROMPT)]


def routes_of(path: Path, **options: Any) -> tuple[list[int], NDArray[np.uint16]]:
    """Return the tokens that a stream decodes, and the experts that they used."""
    with loaded(path, **options) as model:
        prompt = prompt_of(model)
        bias = {token: -1e9 for token in range(model.n_vocab) if model.is_end_of_generation(token)}
        with model.stream(prompt, max_tokens=N_REPLY + 1, temperature=0, logit_bias=bias, experts=True) as stream:
            reply = [token.id for token in stream]
            return [*prompt, *reply[:-1]], stream.read_experts()


def said_upstream(tools: Path, path: Path, tokens: Sequence[int], layers: Sequence[int]) -> NDArray[np.uint16]:
    """Return what llama.cpp's nodes say, in the same form."""
    command = [str(tools / "experts"), str(path), str(N_PROMPT), *map(str, tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    found = np.full((len(tokens), len(layers), len(lines[0]) - 2), UNKNOWN, np.uint16)
    for token, layer, *experts in lines:
        found[token, layers.index(layer)] = experts
    return found


def check_against_upstream(tools: Path, path: Path) -> None:
    """Check all tokens and layers with llama.cpp's kernels, and nearly all with ours, which round otherwise."""
    with loaded(path, vocab_only=True) as model:
        layers = model.info.expert_layers
    tokens, routes = routes_of(path, kernels="llama.cpp", n_batch=N_PROMPT)
    theirs = said_upstream(tools, path, tokens, layers)
    assert routes.dtype == np.uint16
    assert routes.shape == theirs.shape == (N_PROMPT + N_REPLY, len(layers), routes.shape[2])
    assert routes.tolist() == theirs.tolist()
    assert (theirs[N_PROMPT - 1 :] != UNKNOWN).all()
    assert len(np.unique(theirs[:, 0])) > 3
    for options in ({}, {"n_batch": 32, "n_ubatch": 16}, {"kernels": "llama.cpp", "n_ubatch": 7, "n_batch": 21}):
        same, otherwise = routes_of(path, **options)
        replies = zip(same[N_PROMPT:], tokens[N_PROMPT:], strict=True)
        n = N_PROMPT + next((i for i, (one, other) in enumerate(replies) if one != other), N_REPLY)
        here, there = otherwise[:n], theirs[:n]
        both = (here != UNKNOWN) & (there != UNKNOWN)
        assert np.mean(here[both] == there[both]) > 0.9
        # Where the last layer is computed for one token of a batch, each batch has one.
        assert ((here != UNKNOWN) | (there == UNKNOWN)).all()


def test_experts_are_those_of_llama_cpps_nodes_in_gpt_oss(upstream_tools: Path, tiny_gpt_oss_path: Path) -> None:
    """Those of prompts and of replies, in every layer."""
    check_against_upstream(upstream_tools, tiny_gpt_oss_path)


@pytest.mark.parametrize("architecture", sweep(MIXTURES, QUICK))
def test_experts_are_those_of_llama_cpps_nodes(tmp_path: Path, upstream_tools: Path, architecture: str) -> None:
    """Routers of all kinds: groups of experts, sigmoids, layers that are dense."""
    path = write_random_model(tmp_path / "model.gguf", tiny(architecture), vocabulary=False)
    check_against_upstream(upstream_tools, path)


def test_experts_are_read_step_by_step(tiny_gpt_oss: Model) -> None:
    """Each reading goes on where the one before ended; another stream's tokens are not among them."""
    prompt = list(range(5, 45))
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0}
    with tiny_gpt_oss.stream(prompt, experts=True, **options) as stream:
        whole = [token.id for token in stream]
        at_once = stream.read_experts()
        assert len(stream.read_experts()) == 0
    assert len(at_once) == len(prompt) + len(whole) - 1
    parts, n_tokens = [], 0
    with (
        tiny_gpt_oss.stream(prompt, experts=True, **options) as stream,
        tiny_gpt_oss.stream([7, 8], experts=True, **options) as other,
        tiny_gpt_oss.stream([9], **options) as untraced,
    ):
        for token in stream:
            n_tokens += 1
            next(other)
            next(untraced)
            parts.append(stream.read_experts())
            assert len(prompt) + n_tokens - 1 <= sum(map(len, parts)) <= len(prompt) + n_tokens
            assert token.id == whole[n_tokens - 1]
        assert np.concatenate(parts).tolist() == at_once.tolist()
        assert len(other.read_experts()) in (2 + 19, 2 + 20)
        with pytest.raises(Error, match="experts=True"):
            untraced.read_experts()
    # What nobody asked for is not recorded afterwards, and the replies are the same.
    assert [token.id for token in tiny_gpt_oss.stream(prompt, **options)] == whole


def test_experts_of_a_prompt_that_was_reused_are_not_there(tiny_gpt_oss: Model) -> None:
    """Only what is decoded is recorded."""
    prompt = list(range(5, 45))
    for _ in range(2):
        with tiny_gpt_oss.stream(prompt, max_tokens=1, reuse=True, experts=True) as stream:
            next(stream)
        assert len(stream.read_experts()) == len(prompt) - stream.stats.cached_tokens
    assert stream.stats.cached_tokens > 0


def test_models_without_experts_say_so(smollm2: Model) -> None:
    """And a flag is a flag."""
    with pytest.raises(Error, match="has no experts"):
        smollm2.stream("Once", experts=True)
    with pytest.raises(TypeError, match="experts must be True or False"):
        smollm2.stream("Once", experts="all")  # type: ignore[arg-type]


def test_a_ring_loses_what_is_not_read(tiny_gpt_oss: Model) -> None:
    """Whole batches, which are counted; what is read makes room."""
    options = _core.GenerationOptions()
    options.max_tokens, options.look_ahead = 30, False
    options.recorder = ring = _core.ExpertRecorder(4, 4, 12)
    stream = tiny_gpt_oss._core.open_stream(list(range(5, 15)), options)
    for _ in range(6):
        next(stream)
    assert (len(ring.read()), ring.n_lost) == (12, 3)
    for _ in range(14):
        next(stream)
    assert (ring.read().shape, ring.n_lost) == ((12, 4, 4), 5)
    stream.close(_core.StopReason.closed)
    for sizes in ((0, 4, 12), (4, 0, 12), (4, 4, 0)):
        with pytest.raises(ValueError, match="must be 1 to"):
            _core.ExpertRecorder(*sizes)


def test_a_recorder_of_another_shape_takes_what_it_has_room_for(tiny_gpt_oss: Model) -> None:
    """Fewer layers and experts of a token than the model has, or more, which stay unknown."""
    prompt = list(range(5, 15))

    def read(*shape: int) -> NDArray[np.uint16]:
        options = _core.GenerationOptions()
        options.recorder = ring = _core.ExpertRecorder(*shape)
        next(tiny_gpt_oss._core.open_stream(prompt, options))
        return ring.read()[: len(prompt)]

    whole, few, many = read(4, 4, 100), read(2, 3, 100), read(6, 5, 100)
    assert few.tolist() == whole[:, :2, :3].tolist()
    assert many[:, :4, :4].tolist() == whole.tolist()
    assert (many[:, 4:] == UNKNOWN).all()
    assert (many[:, :, 4:] == UNKNOWN).all()


def test_experts_in_ram_are_seen_beside_a_gpu(gpu: str, tiny_gpt_oss_path: Path) -> None:
    """The router is on the GPU then; layers whose experts are there, too, stay unknown."""
    _, expected = routes_of(tiny_gpt_oss_path)
    offload = {"default": "gpu", "experts": "cpu"}
    _, routes = routes_of(tiny_gpt_oss_path, offload=offload, offload_min_batch=65536)
    assert (routes[:N_PROMPT] != UNKNOWN).all()
    assert np.mean(routes[:N_PROMPT] == expected[:N_PROMPT]) > 0.9
    # Of a layer with only the last of its products on the CPU, the experts are the same.
    offload |= {"layers 1-2 experts": "gpu", r"/blk\.2\.ffn_down_exps/": "cpu"}
    _, routes = routes_of(tiny_gpt_oss_path, offload=offload, offload_min_batch=65536, n_batch=32, n_ubatch=16)
    assert (routes[:, 1] == UNKNOWN).all()
    seen = [0, 2, 3]
    assert (routes[:N_PROMPT, seen] != UNKNOWN).all()
    assert np.mean(routes[:N_PROMPT, seen] == expected[:N_PROMPT, seen]) > 0.9
