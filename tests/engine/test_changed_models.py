"""Files that are wrong in one place: a result, or an Error of one line, whatever the place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from fuzz.gguf_models import (
    BASES,
    Key,
    Model,
    Tensor,
    byte_vocabulary,
    key_of,
    packed,
    piece_vocabulary,
    word_vocabulary,
)

import overspill
from overspill import Error, Hardware, ModelInfo

T = TypeVar("T")

TEXTS = ["Hello", "é", "日本", "\U0001f3f3", "\ue000", "\0", "a\nb", " ", ""]


def result_or_error(work: Callable[[], T]) -> T | str:
    """Return what comes of it, or what an Error says in its one line."""
    try:
        return work()
    except Error as error:
        text = str(error)
    assert text, "an error without a message"
    assert not {"\n", "\r"} & set(text)
    return text


def llama_with(vocabulary: dict[str, Key]) -> Model:
    """Return the model with this vocabulary alone."""
    base = BASES["llama"]()
    own = tuple(key for key in base.keys if not key.name.startswith(b"tokenizer."))
    return replace(base, keys=own).with_keys(vocabulary)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "rwkv", "plamo2"])
@pytest.mark.parametrize("vocabulary", [byte_vocabulary, piece_vocabulary, word_vocabulary])
def test_vocabularies_without_a_token_for_the_unknown(tmp_path: Path, kind: str, vocabulary: object) -> None:
    """Tokens are in the vocabulary, or the text cannot be tokenized; of whichever kind the vocabulary is said to be."""
    assert callable(vocabulary)
    keys = {**vocabulary(), "tokenizer.ggml.model": kind}
    keys.pop("tokenizer.ggml.unknown_token_id", None)
    file = tmp_path / "model.gguf"
    file.write_bytes(llama_with({k: key_of(k, v) for k, v in keys.items()}).to_bytes())
    model = result_or_error(lambda: overspill.Model(file, vocab_only=True))
    if not isinstance(model, str):
        with model:
            for text in TEXTS:
                tokens = result_or_error(partial(model.tokenize, text))
                if isinstance(tokens, str):
                    assert "cannot be tokenized" in tokens
                else:
                    assert all(0 <= token < model.n_vocab for token in tokens)


@pytest.mark.parametrize("token", ["a\nb", "\n", "\r\n", "\x1b[2J", b"\xff\n", "a" * 3000])
def test_tokens_that_are_there_twice(tmp_path: Path, token: str | bytes) -> None:
    """Whatever the token is, the error has one line, which is not as long as the token may be."""
    keys, name = byte_vocabulary(), "tokenizer.ggml.tokens"
    twice = token if isinstance(token, bytes) else token.encode()
    vocabulary = {k: key_of(k, v) for k, v in keys.items()}
    texts = [*(text.encode() for text in keys[name][:-2]), twice, twice]
    vocabulary[name] = replace(vocabulary[name], value=texts)
    file = tmp_path / "model.gguf"
    file.write_bytes(llama_with(vocabulary).to_bytes())
    error = result_or_error(lambda: overspill.Model(file, vocab_only=True))
    assert isinstance(error, str)
    assert "twice" in error or len(token) > 500
    assert len(error) < 600 + len(str(file))


@pytest.mark.parametrize("n", [1, 2, 3, 2**31])
@pytest.mark.parametrize("base", BASES)
def test_layers_that_only_draft(tmp_path: Path, base: str, n: int) -> None:
    """However many are said to draft, there is a plan or an Error."""
    whole = BASES[base]()
    architecture = next(key.value for key in whole.keys if key.name == b"general.architecture")
    name = f"{architecture.decode()}.nextn_predict_layers"
    file = tmp_path / "model.gguf"
    file.write_bytes(whole.to_bytes())
    n_layers = ModelInfo.from_file(file).n_layers
    file.write_bytes(whole.with_keys({name: key_of(name, n)}).to_bytes())
    hardware = Hardware.given(vram="8GiB", ram="16GiB", n_threads=4)
    plan = result_or_error(lambda: overspill.plan(ModelInfo.from_file(file), hardware=hardware))
    assert isinstance(plan, str) == (n >= n_layers)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("base", BASES)
def test_matrices_with_other_rows(tmp_path: Path, base: str, rows: int) -> None:
    """A tensor with fewer rows, whose shape loses its last number where that is one, is planned or is an Error."""
    whole = BASES[base]()
    file = tmp_path / "model.gguf"
    hardware = Hardware.given(vram="8GiB", ram="16GiB", n_threads=4)
    places = [i for i, tensor in enumerate(whole.tensors) if len(tensor.dims) > 1 and b"blk.1" not in tensor.name]
    assert len(places) > 5
    for i in places:
        file.write_bytes(with_tensor(whole, i, fewer_rows(whole.tensors[i], rows)).to_bytes())
        assert str(result_or_error(lambda: overspill.plan(ModelInfo.from_file(file), hardware=hardware)))


def fewer_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return the beginning of a tensor."""
    n = 1
    for dim in tensor.dims[1:]:
        n *= dim
    return replace(tensor, dims=(tensor.dims[0], rows), data=tensor.data[: len(tensor.data) // n * rows])


def with_tensor(model: Model, place: int, tensor: Tensor) -> Model:
    """Return the model with another tensor in a place."""
    return replace(model, tensors=(*model.tensors[:place], tensor, *model.tensors[place + 1 :]))


@pytest.mark.parametrize("base", BASES)
def test_texts_with_lines(tmp_path: Path, base: str) -> None:
    """Whichever text of the header has several lines, what is said of it is one."""
    whole = BASES[base]()
    file = tmp_path / "model.gguf"
    texts = [key for key in whole.keys if not key.is_array and isinstance(key.value, str | bytes)]
    assert len(texts) > 3
    n_refused = 0
    for key in texts:
        changed = replace(key, value="one\ntwo\nthree")
        assert packed(key.kind, changed.value)
        file.write_bytes(whole.with_keys({key.name.decode(): changed}).to_bytes())
        model = result_or_error(lambda: overspill.Model(file, offload="cpu", n_ctx=64, n_threads=1))
        if isinstance(model, str):
            n_refused += 1
        else:
            model.close()
    assert n_refused > 1
