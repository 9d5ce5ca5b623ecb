"""Text to tokens and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overspill import Model

TEXTS = ["Hello, world!", "  two  spaces\n\ttab", "日本語のテキスト", "naïve café 🙂🏳️‍🌈", "x" * 3000, "a\0b"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_tokens_are_the_text(smollm2: Model, text: str) -> None:
    """A byte-level vocabulary loses nothing."""
    tokens = smollm2.tokenize(text, add_special=False, parse_special=False)
    assert b"".join(map(smollm2.token_bytes, tokens)) == text.encode()
    assert smollm2.detokenize(tokens) == text


@pytest.fixture(scope="session")
def gpt2(vocab_path: Path) -> Iterator[Model]:
    """Return GPT-2's vocabulary."""
    with Model(vocab_path, vocab_only=True) as model:
        yield model


@given(text=st.text(max_size=60))
def test_any_text_comes_back(gpt2: Model, text: str) -> None:
    """Whatever text, special tokens' names included, is text when it is not parsed."""
    tokens = gpt2.tokenize(text, add_special=False, parse_special=False)
    assert gpt2.detokenize(tokens) == text


def test_special_tokens(gemma: Model, smollm2: Model) -> None:
    """They are added and recognised only when asked for, and named by their role."""
    bos = gemma.special_tokens["bos"]
    assert gemma.tokenize("Hi") == [bos, *gemma.tokenize("Hi", add_special=False)]
    mark = "<|im_start|>"
    (parsed,) = smollm2.tokenize(mark, add_special=False)
    assert len(smollm2.tokenize(mark, add_special=False, parse_special=False)) > 1
    assert smollm2.token_bytes(parsed) == mark.encode()
    assert smollm2.token_bytes(parsed, special=False) == b""
    assert smollm2.detokenize([parsed]) == mark
    assert smollm2.detokenize([parsed], skip_special=True) == ""
    assert smollm2.is_end_of_generation(smollm2.special_tokens["eos"])
    assert not smollm2.is_end_of_generation(smollm2.tokenize("a", add_special=False)[0])


def test_bytes_that_are_no_text(smollm2: Model) -> None:
    """A part of a character is bytes; as text it is replaced."""
    first, *rest = smollm2.tokenize("🏳", add_special=False)
    assert rest, "one token for the whole character: choose another"
    assert smollm2.detokenize([first]) == "\ufffd"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda model: model.detokenize([0, model.n_vocab]), ValueError, "not in the vocabulary"),
        (lambda model: model.token_bytes(-1), ValueError, "token must be"),
        (lambda model: model.token_bytes(model.n_vocab), ValueError, "not in the vocabulary"),
        (lambda model: model.token_bytes("a"), TypeError, "token must be an integer"),
        (lambda model: model.is_end_of_generation(2**40), ValueError, "token must be"),
        (lambda model: model.tokenize(b"bytes"), TypeError, "text must be a string"),
    ],
)
def test_bad_tokens(smollm2: Model, call: object, error: type[Exception], text: str) -> None:
    """Ids outside the vocabulary never reach llama.cpp."""
    assert callable(call)
    with pytest.raises(error, match=text):
        call(smollm2)
