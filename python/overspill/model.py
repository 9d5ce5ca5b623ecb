"""Load a model, and pull tokens out of it."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat, SupportsIndex, get_args

from overspill import _core
from overspill.device import devices, physical_cores
from overspill.hub import resolve
from overspill.info import ModelInfo
from overspill.types import Completion, LoadMode, Offload, Progress, Stats, StopReason, Token

__all__ = ["Model", "Stream"]

logger = logging.getLogger("overspill")

# Room that `offload="auto"` leaves on a GPU for compute buffers and for the desktop.
_GPU_MARGIN_BYTES = 1 << 30


_LARGEST = (2**31 - 1, 2**63 - 1)


def _integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if not low <= number <= high:
        # The largest integers are only what the core can hold, no range that anyone would look for.
        expected = f"at least {low}" if low > number and high in _LARGEST else f"{low} to {high}"
        raise ValueError(f"{name} must be {expected}, not {number}")
    return number


def _real(name: str, value: float) -> float:
    # The core checks the range.
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def _tokens(name: str, values: Iterable[SupportsIndex]) -> list[int]:
    try:
        tokens = [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name} must be a string or a sequence of token ids, not {values!r:.80}") from None
    for extreme in (min(tokens, default=0), max(tokens, default=0)):
        if abs(extreme) >= 2**31:
            raise ValueError(f"{name}: {extreme} is not in the vocabulary")
    return tokens


class Stream:
    """A reply as it is made: iterate over it to get :class:`Token` after token.

    Each ``next()`` runs one step of the model, without the GIL. Leaving the loop, by
    ``break`` or by an exception, ends the stream; so does :meth:`close`, or leaving the
    ``with`` block. The model is usable afterwards, and :attr:`stats` stays readable.
    """

    def __init__(self, generation: _core.Generation) -> None:
        """Wrap a native generation; :meth:`Model.stream` makes these."""
        self._generation = generation

    def __iter__(self) -> Iterator[Token]:
        """Yield the tokens; the stream is closed when the loop is left."""
        try:
            # Not `yield from`: that would hand `close()` through without our reason.
            for token in self._generation:  # noqa: UP028
                yield token
        finally:
            self.close()

    def __next__(self) -> Token:
        """Return the next token, or raise ``StopIteration`` at the end."""
        return next(self._generation)

    def __enter__(self) -> Stream:
        """Return the stream itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._generation.close(StopReason.INTERRUPTED if interrupted else StopReason.CLOSED)

    def close(self) -> None:
        """End the stream; a step that runs in another thread is cancelled. Idempotent."""
        self._generation.close(StopReason.CLOSED)

    @property
    def stats(self) -> Stats:
        """What the stream did so far, and how fast."""
        prompt_tokens, tokens, prefill_s, decode_s, first_s, reason = self._generation.stats()
        stop_reason = None if reason is None else StopReason(reason)
        return Stats(prompt_tokens, tokens, prefill_s, decode_s, first_s, stop_reason)

    def __repr__(self) -> str:
        """Return the stats in brackets."""
        return f"<overspill.Stream {self.stats}>"


class Model:
    """A language model from a GGUF file, loaded and ready to stream.

    A model may be used from several threads. Each open stream has a context (a KV cache)
    of its own, and the streams' steps take turns: one step of one stream at a time.

    Parameters
    ----------
    path
        The GGUF file; of a split model, its first file. ``hf:OWNER/REPOSITORY/FILE.gguf`` is brought
        from the Hugging Face hub (see :func:`overspill.hub.resolve`).
    offload
        What goes to the GPU: ``"auto"`` (as many layers as fit), ``"cpu"`` (nothing, the GPU is
        not touched), ``"gpu"`` (everything; an :class:`Error` without a GPU), or the number of
        layers, as llama.cpp's ``n_gpu_layers`` counts them (the output head is the first, and
        the last layers come next).
    n_ctx
        Tokens that prompt and reply may have together, at least 1. Default: what the model was
        trained for, at most 8192; the KV cache's memory grows with it.
    n_batch
        Tokens of a prompt that are processed at once, 1 to 65536. 512 is llama.cpp's default for
        a physical batch; a GPU's prefill is cancelled between batches.
    n_threads
        CPU threads, 1 to 512. Default: the physical cores, since decoding waits for memory.
    load_mode
        ``"mmap"`` maps the file, ``"read"`` reads it into memory (which lets a GPU pin it),
        ``"mlock"`` and ``"mmap+mlock"`` keep it from being swapped out, ``"direct-io"`` reads
        past the page cache.
    vocab_only
        Load the vocabulary alone, to tokenize; such a model cannot stream.
    check_tensors
        Look for invalid values in the weights while loading; slower.
    progress
        Called with the share that is loaded, 0.0 to 1.0, from this thread; returning ``False``
        cancels the load with :class:`CancelledError`, an exception reaches the caller.

    Raises
    ------
    ModelLoadError
        The file is missing, is not a GGUF, is damaged, or is not of a known architecture.
    Error
        Anything else that llama.cpp could not do, such as too little memory.
    ValueError, TypeError
        An argument is out of the range given above.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offload: Offload = "auto",
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_threads: int | None = None,
        load_mode: LoadMode = "mmap",
        vocab_only: bool = False,
        check_tensors: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Load the model."""
        if load_mode not in get_args(LoadMode):
            raise ValueError(f"load_mode must be one of {', '.join(get_args(LoadMode))}, not {load_mode!r}")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, not {progress!r}")
        self._path = resolve(path) if isinstance(path, str) else Path(path)
        n_ctx = None if n_ctx is None else _integer("n_ctx", n_ctx, 1, 2**31 - 1)
        self._core = _core.Model(
            os.fsencode(self._path),
            cpu_only=offload == "cpu",
            n_gpu_layers=self._gpu_layers(offload, n_ctx, vocab_only),
            n_ctx=n_ctx or 0,
            n_batch=_integer("n_batch", n_batch, 1, 65536),
            n_threads=physical_cores() if n_threads is None else _integer("n_threads", n_threads, 1, 512),
            load_mode=load_mode,
            vocab_only=bool(vocab_only),
            check_tensors=bool(check_tensors),
            progress=progress,
        )

    def _gpu_layers(self, offload: Offload, n_ctx: int | None, vocab_only: bool) -> int:
        """Translate ``offload`` for llama.cpp; -1 stands for every layer."""
        if isinstance(offload, bool) or not (
            offload in ("auto", "cpu", "gpu") or (isinstance(offload, int) and 0 <= offload < 2**31)
        ):
            raise ValueError(f'offload must be "auto", "cpu", "gpu" or a number of layers from 0, not {offload!r}')
        if vocab_only:
            return 0
        gpus = [device for device in devices() if device.kind != "cpu"] if offload != "cpu" else []
        if offload == "gpu" and not gpus:
            raise _core.Error('offload="gpu", but there is no GPU here; overspill.devices() lists what there is')
        if isinstance(offload, int) and offload > 0 and not gpus:
            logger.warning("offload=%d has no effect: there is no GPU here, the model runs on the CPU", offload)
        if isinstance(offload, int):
            return offload
        if offload == "gpu":
            return -1
        if not gpus:
            return 0
        free = sum(max(gpu.free_bytes - _GPU_MARGIN_BYTES, 0) for gpu in gpus)
        return self.info.layers_that_fit(free, n_ctx)

    @property
    def path(self) -> Path:
        """The file that was loaded."""
        return self._path

    @cached_property
    def info(self) -> ModelInfo:
        """What the file's header says: architecture, layers, experts, bytes by part."""
        return ModelInfo.from_file(self._path)

    @property
    def n_ctx(self) -> int:
        """Tokens that prompt and reply of one stream may have together; 0 for a vocabulary alone."""
        return self._core.n_ctx

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._core.n_vocab

    @property
    def n_threads(self) -> int:
        """CPU threads that decode."""
        return self._core.n_threads

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: bool = False,
    ) -> Stream:
        """Continue ``prompt``, token by token.

        The prompt is processed by the first ``next()``. Defaults are llama.cpp's.

        Parameters
        ----------
        prompt
            Text (special tokens written out in it are recognised, and the model's own
            beginning-of-sequence token is added), or token ids, taken as they are.
        max_tokens
            Stop after so many tokens, at least 1. Default: when the model or the context ends.
        temperature
            Divides the logits after truncation; 0 always takes the most likely token.
        top_k
            Keep so many of the most likely tokens; 0 keeps all.
        top_p
            Keep the smallest set of tokens with this much probability, 0 to 1; 1 keeps all
            (Holtzman et al., 2020).
        min_p
            Drop tokens less likely than this share of the most likely one, 0 to 1; 0 keeps all.
        repeat_penalty, frequency_penalty, presence_penalty
            Make tokens of the last ``repeat_last_n`` ones less likely: logits over 0 are divided by
            the first, others multiplied; then the second is subtracted per occurrence, the third
            once. 1, 0 and 0 switch them off.
        repeat_last_n
            How far back the penalties look, in tokens; 0 is not at all, -1 the whole context.
        seed
            0 to 4294967294: the same seed gives the same draws. Default: another one each time.
        stop
            Text that ends the stream; it is not part of what comes out.
        logprobs
            Fill in :attr:`Token.logprob`, at the cost of one more pass over the vocabulary.

        Raises
        ------
        ContextFullError
            The prompt alone does not fit into ``n_ctx``.
        ClosedError
            The model is closed.
        Error
            The model cannot generate text, such as an encoder or a vocabulary alone.
        ValueError, TypeError
            An argument is out of the range given above.
        """
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) for text in stops):
            raise TypeError(f"stop must be a string or a sequence of strings, not {stop!r}")
        generation = self._core.open_stream(
            self.tokenize(prompt) if isinstance(prompt, str) else _tokens("prompt", prompt),
            max_tokens=-1 if max_tokens is None else _integer("max_tokens", max_tokens, 1, 2**63 - 1),
            temperature=_real("temperature", temperature),
            top_k=_integer("top_k", top_k, 0, 2**31 - 1),
            top_p=_real("top_p", top_p),
            min_p=_real("min_p", min_p),
            repeat_penalty=_real("repeat_penalty", repeat_penalty),
            frequency_penalty=_real("frequency_penalty", frequency_penalty),
            presence_penalty=_real("presence_penalty", presence_penalty),
            repeat_last_n=_integer("repeat_last_n", repeat_last_n, -1, 2**31 - 1),
            seed=None if seed is None else _integer("seed", seed, 0, 2**32 - 2),
            stop=stops,
            logprobs=bool(logprobs),
        )
        return Stream(generation)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """Return the whole reply; takes what :meth:`stream` takes, and raises what it raises."""
        with self.stream(prompt, **options) as stream:
            tokens = list(stream)
        return Completion("".join(token.text for token in tokens), tokens, stream.stats)

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of ``text``.

        Parameters
        ----------
        text
            Any text that can be encoded in UTF-8.
        add_special
            Add the tokens that the model wants around a text, such as the one for its beginning.
        parse_special
            Recognise special tokens that are written out in the text; switch it off for text
            that is not to be trusted.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {text!r}")
        return self._core.tokenize(text.encode(), add_special, parse_special)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of ``tokens``; bytes that are no UTF-8 come out as U+FFFD."""
        return self._core.detokenize(_tokens("tokens", tokens), skip_special).decode(errors="replace")

    def token_bytes(self, token: int, *, special: bool = True) -> bytes:
        """Return the bytes of one token, often less than a character; a special one's name if asked."""
        return self._core.token_bytes(_integer("token", token, 0, 2**31 - 1), special)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens that the model has, by role: bos, eos, eot, sep, nl, pad, mask."""
        return self._core.special_tokens()

    def is_end_of_generation(self, token: int) -> bool:
        """Tell whether ``token`` ends a reply."""
        return self._core.is_end_of_generation(_integer("token", token, 0, 2**31 - 1))

    def close(self) -> None:
        """End the open streams and free the memory. Idempotent; later use raises :class:`ClosedError`."""
        self._core.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._core.closed

    def __enter__(self) -> Model:
        """Return the model itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the model."""
        self.close()

    def __repr__(self) -> str:
        """Return the file's name and the context's size."""
        state = "closed" if self.closed else f"n_ctx={self.n_ctx}"
        return f"<overspill.Model {self._path.name!r} {state}>"
