"""Products of weights in RAM by our own kernels, against llama.cpp's on the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from architectures import FORMS, tiny
from header_files import dense, of_type, write_random_model
from model_fixtures import N_THREADS
from overspill import Model
from overspill._core import cpu_kernels
from sweeps import sweep

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5, 6,",
    "Water boils at",
]
TYPES = [Type[name] for name in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"]]
N_VOCAB = 8192

pytestmark = pytest.mark.skipif(cpu_kernels() == "llama.cpp", reason="this CPU has no kernels of ours")
small = partial(dense, n_layers=2, width=512, ffn_width=768, n_heads=4, n_heads_kv=2, n_vocab=N_VOCAB, n_ctx=1024)


def loaded(path: Path, **options: Any) -> Model:
    """Return a model on the CPU whose weights are as the file has them."""
    return Model(path, **{"offload": "cpu", "repack": "off", "n_threads": N_THREADS, "n_ctx": 512, **options})


def last_rows(path: Path, n_prompts: int, **options: Any) -> list[list[NDArray[np.float32]]]:
    """Return the logits after prompts, by their length, and after tokens one by one."""
    random = np.random.default_rng(5)
    with loaded(path, **options) as model:

        def row(n: int) -> NDArray[np.float32]:
            return model.eval(random.integers(0, model.n_vocab, n).tolist()).copy()

        def prompt(n: int) -> NDArray[np.float32]:
            model.reset()
            return row(n)

        found = [[prompt(n) for _ in range(n_prompts)] for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 130)]
        return [*found, [row(1) for _ in range(8)]]


def difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the root of the mean square of the differences, over that of the logits."""
    return float(np.sqrt(np.mean((one - other) ** 2) / np.mean(other**2)))


def check_alike(path: Path, *, routed: bool = False, n_threads: int = N_THREADS) -> None:
    """Check that both kernels give the same logits, but for the order of sums.

    That is one in ten million, until it makes an activation the next whole number when it is quantized. Everything
    after it differs by what quantization loses then, as it does between llama.cpp's own products and attentions. Now
    and then, a token also gets another expert: of prompts of a length, the middle one counts if they are ``routed``.
    """
    n_prompts, of_length = (5, np.median) if routed else (1, np.max)
    ours, theirs, otherwise = (
        last_rows(path, n_prompts, n_threads=n_threads, **options)
        for options in ({}, {"kernels": "llama.cpp"}, {"kernels": "llama.cpp", "flash_attention": "off"})
    )

    def differences(rows: list[list[NDArray[np.float32]]]) -> list[list[float]]:
        return [[difference(*pair) for pair in zip(*rows, strict=True)] for rows in zip(rows, theirs, strict=True)]

    noise = max(of_length(lengths) for lengths in differences(otherwise))
    found = differences(ours)
    assert noise < 0.1
    assert min(min(lengths) for lengths in found) < 1e-6
    assert max(of_length(lengths) for lengths in found) < 2 * noise
    assert max(max(lengths) for lengths in found) > 0, "our kernels have not run"


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_logits_are_llama_cpps_for_each_type(tmp_path: Path, kind: Type) -> None:
    """Dense models of every type that we have products for, in prompts of all lengths and token by token."""
    check_alike(write_random_model(tmp_path / "model.gguf", of_type(small("llama", rope_freq_base=1e4), kind)))


@pytest.mark.parametrize("first", TYPES, ids=lambda kind: kind.name)
def test_types_that_share_activations(tmp_path: Path, first: Type) -> None:
    """Products of the same activations with weights of two types: queries and values, gate and up, in both orders."""
    header = small("llama", rope_freq_base=1e4)
    for second in (kind for kind in TYPES if kind != first):
        of_first = ("attn_q", "ffn_gate")
        tensors = {
            name: (shape, stored if stored == Type.F32 else first if any(part in name for part in of_first) else second)
            for name, (shape, stored) in header.tensors.items()
        }
        path = write_random_model(tmp_path / "model.gguf", replace(header, tensors=tensors))
        tokens = [5, 6, 7]
        with loaded(path) as ours, loaded(path, kernels="llama.cpp") as theirs:
            assert difference(ours.eval(tokens), theirs.eval(tokens)) < 0.03, second.name


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_logits_are_llama_cpps_for_dense_architectures(tmp_path: Path, architecture: str) -> None:
    """Q4_K_M files, with their mixed types; Gemma's with a sliding window."""
    window = 64 if architecture == "gemma3" else 0
    header = small(architecture, rope_freq_base=1e4, sliding_window=window)
    check_alike(write_random_model(tmp_path / "model.gguf", header))


def test_logits_are_llama_cpps_with_experts(tiny_gpt_oss_path: Path) -> None:
    """MXFP4 experts of which each token has its own."""
    check_alike(tiny_gpt_oss_path, routed=True)


def test_forms_have_every_type() -> None:
    """What is compared below leaves out none."""
    found = {kind for name in FORMS for _, kind in tiny(name).tensors.values()}
    assert found == {*TYPES, Type.MXFP4, Type.F32}


QUICK = [list(FORMS).index(name) for name in ("phi2", "deepseek2", "llama4", "lfm2moe")]


@pytest.mark.parametrize("architecture", sweep(FORMS, QUICK))
def test_logits_are_llama_cpps_for_every_form_of_graph(tmp_path: Path, architecture: str) -> None:
    """Weights in one, biases, parallel and latent attention, experts of all kinds, convolutions."""
    header = tiny(architecture)
    path = write_random_model(tmp_path / "model.gguf", header, vocabulary=False)
    check_alike(path, routed="expert_count" in header.keys, n_threads=1)


@pytest.mark.parametrize("architecture", sweep(FORMS, QUICK[:1]))
def test_every_product_is_ours(tmp_path: Path, architecture: str) -> None:
    """With weights of one name at a time: the last bits are others, unless it is none of our products."""
    header = tiny(architecture)

    def name_of(full: str) -> str:
        return full.split(".", 2)[-1] if full.startswith("blk.") else full

    not_ours = {"attn_k_b.weight", "attn_v_b.weight"}  # a matrix for each head
    if "output.weight" in header.tensors:
        not_ours.add("token_embd.weight")  # rows are looked up
    n_products = 0
    for name in {name_of(full) for full, (_, kind) in header.tensors.items() if kind != Type.F32}:
        tensors = {
            full: (shape, kind if name_of(full) == name else Type.F32) for full, (shape, kind) in header.tensors.items()
        }
        path = write_random_model(tmp_path / "model.gguf", replace(header, tensors=tensors), vocabulary=False)
        # Half precision would round the difference away.
        options: dict[str, Any] = {"flash_attention": "off", "type_k": "f32", "type_v": "f32", "n_threads": 1}
        with loaded(path, **options) as ours, loaded(path, kernels="llama.cpp", **options) as theirs:
            is_ours = not all(np.array_equal(ours.eval(tokens), theirs.eval(tokens)) for tokens in ([5, 6, 7], [8]))
        assert is_ours == (name not in not_ours), name
        n_products += is_ours
    assert n_products > 3


@pytest.mark.parametrize("architecture", sweep(FORMS, QUICK[-1:]))
def test_replies_at_once_are_llama_cpps(tmp_path: Path, architecture: str) -> None:
    """Several sequences in a batch; now and then two tokens are as likely, and a reply becomes another one."""
    path = write_random_model(tmp_path / "model.gguf", tiny(architecture), vocabulary=False)
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 512, n).tolist() for n in (3, 5, 5, 7, 1, 9, 5, 5)]

    def replies(kernels: Any) -> list[list[int]]:
        with loaded(path, kernels=kernels, n_threads=1) as model:
            found = dict(model.generate_many(prompts, max_tokens=8, temperature=0, parallel=4))
        return [[token.id for token in found[i].tokens] for i in range(len(prompts))]

    same = [one == other for one, other in zip(replies("auto"), replies("llama.cpp"), strict=True)]
    assert sum(same) >= len(prompts) / 2


@pytest.mark.parametrize("name", ["gemma", "smollm2"])
def test_greedy_text_is_llama_cpps(request: pytest.FixtureRequest, name: str) -> None:
    """The text of real models; where it parts, both tokens are as likely, as far as llama.cpp can tell."""
    path: Path = request.getfixturevalue(f"{name}_path")
    ours, plain, otherwise = (
        loaded(path, **options)
        for options in ({}, {"kernels": "llama.cpp"}, {"kernels": "llama.cpp", "flash_attention": "off"})
    )
    n_same = 0
    with ours, plain, otherwise:
        for prompt in PROMPTS:
            one, two = (
                [token.id for token in model.stream(prompt, max_tokens=64, temperature=0)] for model in (ours, plain)
            )
            parting = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
            n_same += len(two) if parting is None else parting
            if parting is None:
                assert one == two
                continue
            before = plain.tokenize(prompt) + two[:parting]
            logits, others = plain.eval(before).copy(), otherwise.eval(before).copy()
            assert logits[one[parting]] > logits[two[parting]] - 2 * np.abs(logits - others).max()
            plain.reset()
            otherwise.reset()
    assert n_same > 100


def test_kernels_can_be_switched_off(tiny_gpt_oss_path: Path) -> None:
    """For a model, or for all by the environment: what is computed then are llama.cpp's bits."""
    program = """
import sys
from overspill import Model
with Model(sys.argv[1], offload="cpu", repack="off", kernels=sys.argv[2], n_ctx=64, n_threads=1) as model:
    print(model.eval([1, 2, 3]).tobytes().hex())
"""

    def logits(kernels: str, environment: dict[str, str]) -> str:
        command = [sys.executable, "-c", program, str(tiny_gpt_oss_path), kernels]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=True)
        return done.stdout

    theirs = logits("llama.cpp", {})
    assert logits("auto", {"OVERSPILL_KERNELS": "llama.cpp"}) == theirs
    assert logits("auto", {}) != theirs


def test_an_unknown_name_of_kernels_is_refused(tiny_gpt_oss_path: Path) -> None:
    """With the names that there are."""
    unknown: Any = "fast"
    with pytest.raises(ValueError, match=r"kernels must be one of auto, llama\.cpp, not 'fast'"):
        Model(tiny_gpt_oss_path, kernels=unknown)
