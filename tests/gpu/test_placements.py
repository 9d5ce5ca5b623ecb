"""Placements on a GPU: what is computed there is what the CPU computes, but for the rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model_files import LAYERS
from overspill import Device, Model, Placement, Token
from placement_cases import placements
from rounding import is_same
from upstream_tools import MinimalLoop

PROMPT = "The capital of France is Paris, and"
N_TOKENS = 16
# With the same kind of attention everywhere: "auto" decides by where layers and their KV caches are.
OPTIONS: dict[str, Any] = {
    "n_ctx": 512,
    "n_threads": 1,
    "repack": "off",
    "kernels": "llama.cpp",
    "flash_attention": "on",
}
# The largest difference of two logits, as a share of the largest logit. The stand-in computes with the CPU's code. A
# GPU quantizes the activations that it multiplies with quantized weights, otherwise than the CPU does: on an H100 the
# share is 0.018 for this model. It is about 1 for any two prompts, and so for wrong weights.
ROUNDING = {"StandIn": 1e-3}
ROUNDING_OF_GPUS = 0.05
CASES = placements("gpu", n_layers=LAYERS, experts=True)


@dataclass(frozen=True)
class Reply:
    """What a model says, and how likely everything was after the prompt."""

    tokens: Sequence[Token]
    logits: NDArray[np.float32]

    @classmethod
    def of(cls, model: Model) -> Reply:
        """Let it reply greedily."""
        logits = model.eval(model.tokenize(PROMPT)).copy()
        return cls(model.generate(PROMPT, temperature=0, max_tokens=N_TOKENS, logprobs=10).tokens, logits)

    def assert_like(self, other: Reply, rounding: float) -> None:
        """Assert that logits are as close as rounding leaves them, and tokens the same, up to a near tie."""
        largest = np.abs(other.logits).max()
        assert np.abs(self.logits - other.logits).max() <= rounding * largest
        is_same(self.tokens, other.tokens, nats=2 * rounding * float(largest))


@pytest.fixture(scope="module")
def on_the_cpu(tiny_gpt_oss_path: Path) -> Reply:
    """Return the reply of the CPU, which rounds as placements do: its weights are as they are in the file."""
    with Model(tiny_gpt_oss_path, offload="cpu", **OPTIONS) as model:
        return Reply.of(model)


@pytest.fixture
def rounding(device_now: Callable[[], Device]) -> float:
    """Return how far logits may be from the CPU's."""
    return ROUNDING.get(device_now().backend, ROUNDING_OF_GPUS)


@pytest.mark.parametrize("case", CASES)
def test_the_cpus_answer(gpu: str, case: str, tiny_gpt_oss_path: Path, on_the_cpu: Reply, rounding: float) -> None:
    """Tokens, logits, and where everything lies, as llama.cpp says after loading."""
    mapping = placements(gpu, n_layers=LAYERS, experts=True)[case]
    with Model(tiny_gpt_oss_path, offload=mapping, **OPTIONS) as model:
        Reply.of(model).assert_like(on_the_cpu, rounding)
        assert model.placement == Placement.from_mapping(model.info, [gpu], mapping)
        assert {name for name, use in model.memory.items() if use.kv_bytes} == set(model.placement.kv)
        assert (gpu in model.placement.devices_used) == bool(mapping)


@pytest.mark.parametrize("offload", ["auto", "gpu", 0, 1, LAYERS, LAYERS + 1])
def test_whatever_chooses_the_placement(
    gpu: str,
    offload: Any,
    tiny_gpt_oss_path: Path,
    on_the_cpu: Reply,
    rounding: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planner, everything, and numbers of layers give the same answer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # what is measured of a stand-in is nobody else's
    with Model(tiny_gpt_oss_path, offload=offload, **OPTIONS) as model:
        Reply.of(model).assert_like(on_the_cpu, rounding)
        if offload == "gpu":
            assert set(model.placement.layers[:].experts) == {gpu}


@pytest.fixture
def loops(upstream_tools: Path, tiny_gpt_oss_path: Path) -> Callable[..., list[int]]:
    """Return a function that decodes with llama.cpp alone, from its own terms for a placement."""

    def greedy(prompt: list[int], n_gpu_layers: int, overrides: list[tuple[str, str]]) -> list[int]:
        settings = {"n_ctx": 512, "n_threads": 1, "n_gpu_layers": n_gpu_layers}
        loop = MinimalLoop(upstream_tools, tiny_gpt_oss_path, overrides=overrides, **settings)
        try:
            return loop.greedy(prompt, N_TOKENS)
        finally:
            loop.close()

    return greedy


@pytest.mark.parametrize(
    ("mapping", "n_gpu_layers", "overrides"),
    [
        ({"default": "gpu"}, LAYERS + 1, []),
        ({"default": "gpu", "experts": "cpu"}, LAYERS + 1, [(r"ffn_(gate|up|down)_exps", "CPU")]),
        ({f"layers 1-{LAYERS - 1}": "gpu", "output": "gpu"}, LAYERS, []),
    ],
    ids=["everything", "all but the experts", "all but a layer"],
)
def test_llama_cpps_answer(
    gpu: str,
    tiny_gpt_oss_path: Path,
    loops: Callable[..., list[int]],
    mapping: dict[str, str],
    n_gpu_layers: int,
    overrides: list[tuple[str, str]],
) -> None:
    """The same tokens as a loop on llama.cpp itself, on the same devices."""
    with Model(tiny_gpt_oss_path, offload=mapping, **OPTIONS) as model:
        prompt = model.tokenize(PROMPT)
        ours = [token.id for token in model.generate(prompt, temperature=0, max_tokens=N_TOKENS).tokens]
    assert ours == loops(prompt, n_gpu_layers, overrides)
