"""The same text as llama.cpp's own tools, from the same libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_fixtures import N_THREADS
from overspill import Model
from sweeps import sweep
from upstream_tools import completion

PROMPTS = {
    "english": "Once upon a time",
    "japanese": "昔々、あるところに",
    "code": "def fibonacci(n):\n    ",
    "emoji": "The best emoji for a party are 🎉, 🥳 and",
    # More than one batch of 512.
    "long": "The quick brown fox jumps over the lazy dog. " * 60 + "The moral of the story is",
}


@pytest.mark.parametrize("prompt", sweep(PROMPTS.values(), always=[1]), ids=PROMPTS)
@pytest.mark.parametrize("name", sweep(["gemma", "smollm2"], always=[1]))
def test_greedy_text_is_upstreams(request: pytest.FixtureRequest, upstream_tools: Path, name: str, prompt: str) -> None:
    """64 greedy tokens are those of ``llama-completion --temp 0``, with the same products."""
    path: Path = request.getfixturevalue(f"{name}_path")
    with Model(path, n_ctx=1024, n_threads=N_THREADS, adapt_threads=False, kernels="llama.cpp") as model:
        reply = model.generate(prompt, temperature=0, max_tokens=64)
    assert reply.text == completion(upstream_tools, path, prompt, 64)


# Where several files share the text, its end names the tokenizer.
VOCABULARIES = [
    "bert-bge",
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_tokens_are_those_that_upstream_expects(vocabularies: Path, name: str) -> None:
    """llama.cpp keeps, beside each vocabulary, texts and the tokens that the original tokenizer makes of them."""
    file = vocabularies / f"ggml-vocab-{name}.gguf"
    texts = file.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [list(map(int, line.split())) for line in file.with_suffix(".gguf.out").read_text().splitlines()]
    with Model(file, vocab_only=True) as model:
        # Some files end with a separator, after which comes no text.
        assert len(expected) >= 40
        assert len(texts) - len(expected) in (0, 1)
        for text, tokens in zip(texts, expected, strict=False):
            assert model.tokenize(text, add_special=False, parse_special=False) == tokens, repr(text)
