"""Tokens, logits and the loop by hand of the class Llama."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from overspill._core import Error
from overspill.base.cached import cached_property
from overspill.base.checks import as_flag, as_integer, as_text, shown
from overspill.compat.call_arguments import Criteria, Criterion, LlamaGrammar, Processor, Seeds, stream_options
from overspill.compat.load_arguments import check_only_defaults
from overspill.engine.arguments import token_ids
from overspill.engine.model import Model
from overspill.sampling.sampler import Sampler

__all__ = ["ByHand", "until_met"]

T = TypeVar("T")


def as_numbers(name: str, values: object) -> NDArray[np.float32]:
    """Return values as an array of float32 with at least one axis and one number; a TypeError if they are none."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # lists of several lengths, or nested too deeply
        array = np.empty(0)
    if array.dtype.kind not in "fiu" or not array.ndim or not array.size:
        raise TypeError(f"{name} must be an array of numbers, not {shown(values)}")
    return array.astype(np.float32)


def until_met(stream: Iterable[T], criteria: Criteria) -> Iterator[T]:
    """Yield tokens until a criterion is met before one of them."""
    for token in stream:
        if criteria.are_met:
            return
        yield token


class ByHand:
    """A loaded model with llama-cpp-python's methods for tokens and logits."""

    def __init__(self, model: Model, seeds: Seeds, last_n: int, logits_all: bool) -> None:
        """Begin without tokens; ``last_n`` is how many of them penalties look at."""
        self.model = model
        """The model itself, with all that is not llama-cpp-python's."""
        self.input_ids: NDArray[np.int32] = np.zeros(model.n_ctx, np.int32)
        """The tokens of :meth:`eval`: the first :attr:`n_tokens` of int32 values of shape (n_ctx,)."""
        self._seeds, self._last_n, self._logits_all = seeds, last_n, logits_all
        self._n_tokens = 0
        self._rows: NDArray[np.float32] | None = None

    # --- tokens

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Return the token ids of a text in UTF-8.

        Parameters
        ----------
        text
            The text, as ``"...".encode()`` makes it.
        add_bos
            Whether to add the special tokens that the model expects around a text.
        special
            Whether special tokens that are written out in the text are recognised.
        """
        if not isinstance(text, bytes):
            raise TypeError(f"text must be bytes, as text.encode() makes them, not {shown(text)}")
        add_bos, special = as_flag("add_bos", add_bos), as_flag("special", special)
        try:
            return self.model.tokenize(text.decode(), add_special=add_bos, parse_special=special)
        except UnicodeDecodeError as error:
            raise ValueError(f"text must be UTF-8: {error}") from None

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of tokens, which may be a part of a character at both ends.

        Parameters
        ----------
        tokens
            The token ids.
        prev_tokens
            No effect.
        special
            Whether special tokens stand in it by their names.
        """
        ids, special = token_ids("tokens", tokens), as_flag("special", special)
        if prev_tokens is not None:
            token_ids("prev_tokens", prev_tokens)
        text = b"".join(self.model.token_bytes(token, special=special) for token in ids)
        return text.removeprefix(b" ") if ids and ids[0] == self.token_bos() else text

    def token_bos(self) -> int:
        """Return the id of the token at the beginning of a sequence; -1 if the model has none."""
        return self.model.special_tokens.get("bos", -1)

    def token_eos(self) -> int:
        """Return the id of the token at the end of a sequence; -1 if the model has none."""
        return self.model.special_tokens.get("eos", -1)

    def token_nl(self) -> int:
        """Return the id of the line break; -1 if the model has none."""
        return self.model.special_tokens.get("nl", -1)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._fitting("prompt", self.model.tokenize(as_text("prompt", prompt)))
        if isinstance(prompt, bytes | bytearray):
            raise TypeError("prompt must be a string or token ids, not bytes")
        return self._fitting("prompt", token_ids("prompt", prompt))

    def _fitting(self, name: str, tokens: list[int]) -> list[int]:
        if not tokens:
            raise ValueError(f"{name} must have at least one token")
        if len(tokens) >= self.model.n_ctx > 0:
            n, n_ctx = len(tokens), self.model.n_ctx
            raise ValueError(
                f"{name}: requested tokens ({n}) exceed context window of {n_ctx}, which Llama(n_ctx=...) makes larger"
            )
        return tokens

    # --- the loop by hand

    def eval(self, tokens: Sequence[int]) -> None:
        """Read tokens behind those of earlier calls; :meth:`reset` forgets them all."""
        ids = token_ids("tokens", tokens)
        if not ids:
            return
        rows = self.model.eval(ids, logits="all" if self._logits_all else "last")
        end = self._n_tokens + len(ids)
        if self._logits_all:
            if self._rows is None:
                self._rows = np.zeros((self.model.n_ctx, self.model.n_vocab), np.float32)
            self._rows[self._n_tokens : end] = rows
        self.input_ids[self._n_tokens : end] = ids
        self._n_tokens = end

    @property
    def n_tokens(self) -> int:
        """The number of tokens of :meth:`eval`."""
        return self._n_tokens

    @property
    def scores(self) -> NDArray[np.float32]:
        """The logits of :meth:`eval`, float32 of shape (n_ctx, n_vocab): row i is for the token after the i-th.

        Without ``logits_all`` there is one row, a view on llama.cpp's memory that the next :meth:`eval` overwrites: the
        logits for the token after the last.
        """
        if self._rows is not None:
            return self._rows
        return self.model.logits[np.newaxis] if self._n_tokens else np.zeros((0, self.model.n_vocab), np.float32)

    @property
    def _scores(self) -> NDArray[np.float32]:
        return self.scores[: self._n_tokens]

    @property
    def _input_ids(self) -> NDArray[np.int32]:
        return self.input_ids[: self._n_tokens]

    @property
    def eval_tokens(self) -> deque[int]:
        """The tokens of :meth:`eval`."""
        return deque(self._input_ids.tolist(), maxlen=self.n_ctx())

    @property
    def eval_logits(self) -> deque[list[float]]:
        """The logits of :meth:`eval` as lists, of the last token alone without ``logits_all``."""
        return deque(self._scores.tolist(), maxlen=self.n_ctx() if self._logits_all else 1)

    @staticmethod
    def logits_to_logprobs(logits: NDArray[np.float32] | Sequence[float], axis: int = -1) -> NDArray[np.float32]:
        """Return the natural logarithms of the probabilities that logits stand for.

        Parameters
        ----------
        logits
            Numbers, as an array of any shape or as a list.
        axis
            The axis along which probabilities have the sum 1.

        Returns
        -------
        numpy.ndarray
            float32, of the same shape.
        """
        rows = as_numbers("logits", logits)
        along = as_integer("axis", axis, -rows.ndim, rows.ndim - 1)
        shifted = rows - rows.max(axis=along, keepdims=True)
        logprobs: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=along, keepdims=True))
        return logprobs

    def reset(self) -> None:
        """Forget the tokens of :meth:`eval`."""
        self.model.reset()
        self._n_tokens = 0

    def sample(
        self,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_eta: float = 0.1,
        mirostat_tau: float = 5.0,
        penalize_nl: bool = True,
        logits_processor: Sequence[Processor] | None = None,
        grammar: None = None,
        idx: int | None = None,
    ) -> int:
        """Return a token that is chosen from the logits of :meth:`eval`.

        Parameters
        ----------
        idx
            The row of :attr:`scores`, which needs ``logits_all``. Default: the last.
        grammar, penalize_nl
            The default alone: a grammar is for whole replies.
        top_k, top_p, min_p, typical_p, temp, repeat_penalty, frequency_penalty, presence_penalty, tfs_z, \
mirostat_mode, mirostat_eta, mirostat_tau, logits_processor
            As for :meth:`create_completion`; ``temp`` is the temperature.

        Raises
        ------
        ValueError, TypeError
            An argument has another value than those above.
        Error
            There are no logits yet.
        """
        given = locals()
        check_only_defaults(given)
        if grammar is not None:
            raise ValueError("grammar must be None here: create_completion(grammar=...) takes one for a whole reply")
        options = stream_options(given, Criteria(None), self._last_n, self._seeds.next(None))
        if not self._n_tokens:
            raise Error("there are no logits yet: eval(tokens) makes them")
        row = -1 if idx is None else as_integer("idx", idx, 0, len(self._scores) - 1)
        logits = self._scores[row].copy()
        for process in options["logits_processors"]:
            process(logits, self._input_ids)
        sampler = Sampler(options["sampling"])
        for token in self._input_ids.tolist():
            sampler.accept(token)
        return sampler.sample(logits)

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        grammar: LlamaGrammar | None = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Return a generator of the tokens that follow; ``send(tokens)`` puts others behind the last one.

        The token that ends a reply is the last. :attr:`scores` and :attr:`n_tokens` stay those of :meth:`eval`.

        Parameters
        ----------
        tokens
            The token ids of the prompt.
        reset
            False puts them behind the tokens of :meth:`eval`.
        penalize_nl
            The default alone.
        top_k, top_p, min_p, typical_p, temp, repeat_penalty, frequency_penalty, presence_penalty, tfs_z, \
mirostat_mode, mirostat_tau, mirostat_eta, logits_processor, stopping_criteria, grammar
            As for :meth:`create_completion`; ``temp`` is the temperature.
        """
        given = locals()
        check_only_defaults(given)
        criteria = Criteria(stopping_criteria)
        options = stream_options(given, criteria, self._last_n, self._seeds.next(None))
        before = [] if as_flag("reset", reset) else self._input_ids.tolist()
        ids = self._fitting("tokens", [*before, *token_ids("tokens", tokens)])
        return self._generated(ids, criteria, options)

    def _generated(
        self, ids: list[int], criteria: Criteria, options: dict[str, Any]
    ) -> Generator[int, Sequence[int] | None, None]:
        while True:
            with self.model.stream(ids, reuse=True, **options) as stream:
                for token in until_met(stream, criteria):
                    ids.append(token.id)
                    if more := (yield token.id):
                        break
                else:
                    return
            if "grammar" in options:
                raise ValueError("tokens cannot be sent where a grammar says which may come")
            ids += token_ids("tokens", more)
            if (seed := options["sampling"].seed) is not None:  # other draws than those before
                options["sampling"] = replace(options["sampling"], seed=(seed + 1) % (2**32 - 1))

    # --- settings

    def n_ctx(self) -> int:
        """Return the most tokens of prompt and reply together."""
        return self.model.n_ctx

    def n_embd(self) -> int:
        """Return the width of the embedding."""
        return self.model.info.n_embd

    def n_vocab(self) -> int:
        """Return the number of tokens in the vocabulary."""
        return self.model.n_vocab

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The values of the file's header as texts, without arrays."""
        keys = (key for key, value in self.model.info.metadata.items() if not isinstance(value, dict))
        return {key: self.model._core.metadata(key) for key in keys}

    def set_seed(self, seed: int) -> None:
        """Set where calls without a seed take theirs from; as ``seed`` of the constructor."""
        self._seeds = Seeds(seed)
