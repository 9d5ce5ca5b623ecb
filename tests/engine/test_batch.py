"""Many prompts at once: the replies of one by one, as they end."""

from __future__ import annotations

import itertools
import json
import threading
from typing import Any

import pytest

import overspill
from overspill import ContextFullError, Model, OutOfMemoryError, StopReason
from rounding import is_same
from sweeps import sweep

# A step that is to be ended takes long on a CPU, and not on a GPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

WORDS = ("the sea", "a dog", "love", "music", "rain", "Paris", "a book", "light", "time", "gold", "fire", "war")
PROMPTS = [f"Question {i}: What is {word}?" for i, word in enumerate(WORDS)]


@pytest.mark.parametrize(
    ("parallel", "name"),
    sweep(itertools.product((1, 3, 16), ("tiny_gpt_oss", "smollm2", "gemma")), always=(0, 3, 6)),
)
def test_replies_are_those_of_one_by_one(request: pytest.FixtureRequest, parallel: int, name: str) -> None:
    """Of prompts of all lengths, longer than a batch among them, in any number at a time."""
    model: Model = request.getfixturevalue(name)
    # Gemma's odds after a long text without sense depend on how it was cut into batches, alone as well.
    prompts: list[Any] = [*PROMPTS[:6], model.tokenize("again and " * (20 if name == "gemma" else 300)), "x"]
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logprobs": 5}
    found = dict(model.generate_many(prompts, parallel=parallel, **options))
    assert sorted(found) == list(range(len(prompts)))
    same = 0
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt, **options)
        same += is_same(alone.tokens, found[i].tokens)
        assert found[i].stats.prompt_tokens == alone.stats.prompt_tokens
        assert found[i].stats.tokens == len(found[i].tokens)
    assert same >= len(prompts) // 2


@pytest.mark.slow
def test_what_ends_first_comes_first(smollm2: Model) -> None:
    """Stop strings, ends of generation, grammars and seeds are each reply's own."""
    order = [i for i, _ in smollm2.generate_many(["a", "a b c d " * 40], parallel=2, max_tokens=30, stop=["zzzz"])]
    assert sorted(order) == [0, 1]
    found = dict(smollm2.generate_many(PROMPTS[:5], parallel=2, grammar='root ::= "yes" | "no"', seed=1))
    assert {reply.text for reply in found.values()} <= {"yes", "no"}
    assert {reply.stats.stop_reason for reply in found.values()} == {StopReason.EOS}
    one, other = (reply.text for _, reply in smollm2.generate_many(["Once"] * 2, max_tokens=12, seed=7))
    assert one == other == smollm2.generate("Once", max_tokens=12, seed=7).text
    schema = {"enum": [1, 2]}
    assert all(json.loads(r.text) in (1, 2) for _, r in smollm2.generate_many(["a", "b"], json_schema=schema))
    assert list(smollm2.generate_many([])) == []


@pytest.mark.slow
def test_leaving_early_and_closing(smollm2_path: Any) -> None:
    """The model is usable afterwards; closing it ends a batch, as does another thread."""
    with Model(smollm2_path, n_ctx=512, n_threads=2) as model:
        for _ in model.generate_many(PROMPTS, max_tokens=8, parallel=4):
            break
        batch = model.generate_many(PROMPTS, max_tokens=100, parallel=4, logit_bias={2: -100.0})
        next_one = threading.Thread(target=lambda: next(batch, None))
        next_one.start()
        assert model.generate("Meanwhile", max_tokens=4).text  # they take turns
        next_one.join()
        batch.close()  # type: ignore[attr-defined]
        assert model.generate("After that", max_tokens=4).text
        open_one = model.generate_many(PROMPTS, max_tokens=4, parallel=4)
        next(open_one)
    assert list(open_one) == []
    with pytest.raises(overspill.ClosedError):
        model.generate_many(PROMPTS)


def test_more_than_ram_holds(smollm2: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before it is allocated."""
    monkeypatch.setattr("overspill.engine.loading.available_ram_bytes", lambda: 100 << 20)
    with pytest.raises(OutOfMemoryError, match="KV caches for 12 prompts of 1024 tokens would take 270") as caught:
        smollm2.generate_many(PROMPTS)
    assert caught.value.device == "CPU"
    assert caught.value.needed_bytes == 12 * 1024 * 30 * 2 * 192 * 2


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "text"),
    [
        ("Hello", {}, TypeError, "prompts must be a sequence"),
        ([5], {}, TypeError, r"prompts\[0\] must be"),
        (["a", []], {}, ValueError, "at least one token"),
        (["a", [10**6]], {}, ValueError, "not in the vocabulary"),
        (["a"], {"parallel": 0}, ValueError, "parallel must be 1 to 256"),
        (["a"], {"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
        (["a"], {"stop": [""]}, ValueError, "stop must not contain"),
        (["a"], {"grammar": "root"}, ValueError, "grammar"),
        (["a", "b " * 3000], {}, ContextFullError, "prompt 1 has"),
    ],
)
def test_bad_input(smollm2: Model, prompts: Any, options: Any, kind: type[Exception], text: str) -> None:
    """It is told before anything is decoded."""
    with pytest.raises(kind, match=text):
        smollm2.generate_many(prompts, **options)
