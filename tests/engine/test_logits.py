"""Views of logits: no copies, and no way to look at memory that is gone."""

from __future__ import annotations

import gc
import importlib.util
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from overspill import ClosedError, ContextFullError, Error, Model

# A step that is to be ended takes long on a CPU, and not on a GPU.
pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def model(tiny_gpt_oss_path: Path) -> Iterator[Model]:
    """Return a model of its own, so that nothing else makes or holds contexts."""
    with Model(tiny_gpt_oss_path, n_ctx=128, n_batch=32, n_threads=1) as loaded:
        yield loaded


def test_eval_is_the_stream_by_hand(gemma: Model) -> None:
    """The loop of the documentation gives the stream's greedy tokens."""
    tokens = gemma.tokenize("The capital of France is")
    streamed = [token.id for token in gemma.stream(tokens, temperature=0, max_tokens=10)]
    gemma.reset()
    logits = gemma.eval(tokens)
    by_hand = []
    for _ in range(10):
        by_hand.append(int(logits.argmax()))
        logits = gemma.eval([by_hand[-1]])
    assert by_hand == streamed


def test_all_positions_at_once(model: Model) -> None:
    """Row by row what one token at a time gives, for more tokens than a batch too."""
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, model.n_vocab, 70)]
    every = model.eval(tokens, logits="all")
    assert every.shape == (70, model.n_vocab)
    assert every.dtype == np.float32
    every = every.copy()
    model.reset()
    one_by_one = np.stack([model.eval([token]).copy() for token in tokens])
    # A batch rounds otherwise than a single token does, after which another expert may be chosen; mostly it is not.
    alike = [np.corrcoef(row, other)[0, 1] > 0.99 for row, other in zip(every, one_by_one, strict=True)]
    assert np.mean(alike) > 0.9
    model.reset()
    last = model.eval(tokens)
    assert np.abs(last - every[-1]).max() < 0.05 * np.abs(last).max()
    assert np.shares_memory(last, model.logits)


def test_a_view_is_the_memory_itself(model: Model) -> None:
    """Writable, shared, and overwritten by the next eval."""
    first = model.eval([1, 2, 3])
    assert np.shares_memory(first, model.logits)
    assert first.flags.writeable
    assert first.flags.c_contiguous
    first[7] = 1e9
    assert model.logits[7] == 1e9
    before = first.copy()
    second = model.eval([4])
    assert np.shares_memory(first, second)
    assert not np.array_equal(first, before)


def test_a_larger_buffer_does_not_pull_the_old_one_away(model: Model) -> None:
    """As with a bytearray: BufferError while somebody looks, and nothing is lost."""
    view = model.eval([1, 2, 3])
    values = view.copy()
    with pytest.raises(BufferError, match="still in use"):
        model.eval([4, 5], logits="all")
    assert np.array_equal(view, values)
    row = view[10:20]
    del view
    with pytest.raises(BufferError, match="still in use"):
        model.eval([4, 5], logits="all")
    del row
    both = model.eval([4, 5], logits="all").copy()
    model.reset()
    # Products of other numbers of tokens add up in another order, which quantized activations make more of.
    assert np.abs(model.eval([1, 2, 3, 4, 5]) - both[-1]).max() < 0.05 * np.abs(both).max()


def test_views_outlive_stream_and_model(tiny_gpt_oss_path: Path) -> None:
    """They keep the memory that they look at, and let it go with them."""
    model = Model(tiny_gpt_oss_path, n_ctx=64, n_threads=1)
    with model.stream([1, 2], logits=True, temperature=0) as stream:
        of_stream = next(stream).logits
    of_eval = model.eval([1, 2])
    expected = of_eval.copy()
    assert not np.shares_memory(of_stream, of_eval)
    gone = weakref.ref(model)
    model.close()
    del model, stream
    gc.collect()
    assert gone() is None
    assert np.array_equal(of_eval, expected)
    assert np.isfinite(of_stream).all()
    of_stream[:] = 1.0


def test_views_of_a_stream_are_not_written_over_by_the_next(model: Model) -> None:
    """The next stream computes elsewhere, as long as somebody looks at the logits of the last one."""
    with model.stream([1, 2, 3], logits=True, temperature=0, max_tokens=1) as stream:
        view = next(stream).logits
    values = view.copy()
    model.generate([4, 5, 6], temperature=0, max_tokens=4)
    assert np.array_equal(view, values)


def test_logits_of_a_token(model: Model) -> None:
    """They are what the token was chosen from; asking too late, or without having asked for them, is an error."""
    with model.stream([1, 2, 3], temperature=0, logits=True, max_tokens=5) as stream:
        token = next(stream)
        assert token.logits.shape == (model.n_vocab,)
        assert int(token.logits.argmax()) == token.id
        assert np.shares_memory(token.logits, token.logits)
        following = next(stream)
        with pytest.raises(Error, match="the stream has gone on"):
            _ = token.logits
        assert int(following.logits.argmax()) == following.id
    assert int(following.logits.argmax()) == following.id
    (token,) = model.stream([1, 2, 3], max_tokens=1)
    with pytest.raises(Error, match="logits=True"):
        _ = token.logits


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_while_tokens_are_decoded_again(tiny_gpt_oss_path: Path) -> None:
    """A call for more rows decodes everything again; interrupted there, nothing is lost."""
    with Model(tiny_gpt_oss_path, n_ctx=8192, n_batch=32, n_threads=1) as model:
        tokens = [int(token) for token in np.random.default_rng(0).integers(0, model.n_vocab, 6000)]
        model.eval(tokens)
        timer = threading.Timer(0.1, lambda: signal.raise_signal(signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            model.eval([7, 8], logits="all")
        timer.join()
        after = model.eval([9]).copy()
        model.reset()
        model.eval(tokens)
        assert np.abs(model.eval([9]) - after).max() < 1e-3 * np.abs(after).max()


def test_dlpack_shares_memory(model: Model) -> None:
    """Torch, or without it any other consumer of DLPack, sees the same floats."""
    view = model.eval([1, 2, 3])
    other = np.from_dlpack(view)
    assert np.shares_memory(other, view)
    view[3] = 41.0
    assert other[3] == 41.0
    if importlib.util.find_spec("torch") is None:
        return
    tensor = importlib.import_module("torch").from_dlpack(view)
    assert tensor.data_ptr() == view.ctypes.data
    tensor[3] = 42.0
    assert view[3] == 42.0
    del view
    assert float(tensor[3]) == 42.0


def test_mistakes(model: Model) -> None:
    """Each has its error, and what was evaluated stays."""
    with model.stream("Hello", logits=True) as stream:
        assert next(stream).logits.shape == (model.n_vocab,)
    with pytest.raises(Error, match=r"no logits yet.*a stream's are in its tokens, with stream\(logits=True\)"):
        _ = model.logits
    with pytest.raises(ValueError, match="must not be empty"):
        model.eval([])
    with pytest.raises(ValueError, match="logits must be one of last, all"):
        model.eval([1], logits="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not in the vocabulary"):
        model.eval([1, model.n_vocab])
    expected = model.eval([1, 2, 3]).copy()
    with pytest.raises(ContextFullError, match="3 tokens and 126 more do not fit"):
        model.eval([1] * 126)
    after = model.eval([4]).copy()
    model.reset()
    assert np.array_equal(model.eval([1, 2, 3]), expected)
    assert np.array_equal(model.eval([4]), after)
    model.close()
    with pytest.raises(ClosedError):
        model.eval([1])
