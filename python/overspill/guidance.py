"""Constrained decoding by llguidance: ``pip install 'overspill[guidance]'``.

llguidance knows more of JSON schema than ``json_schema`` (formats, ranges of numbers, patterns beside lengths), and
regular expressions and Lark grammars. It tells which tokens of the whole vocabulary may come next in one step:

>>> from overspill.guidance import Guidance
>>> model.generate("A date: ", grammar=Guidance(model, regex=r"[0-9]{4}-[0-9]{2}-[0-9]{2}"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

try:
    import llguidance
    import llguidance.numpy
except ImportError as error:
    raise ImportError("overspill.guidance needs llguidance: pip install 'overspill[guidance]'") from error

from overspill.base.checks import as_integer, as_json, as_text, shown

if TYPE_CHECKING:
    from overspill.engine.model import Model

__all__ = ["Guidance"]

_tokenizers: WeakKeyDictionary[Model, llguidance.LLTokenizer] = WeakKeyDictionary()


class Guidance:
    """A grammar for one reply, for ``stream(grammar=...)``; each stream needs a new one.

    Parameters
    ----------
    model
        The model that is to reply. Its vocabulary is read once, which takes about a second.
    json_schema
        A JSON schema, as a mapping or as JSON.
    regex
        A regular expression, in the syntax of Rust's regex crate; the whole reply matches it.
    lark
        A grammar in llguidance's dialect of Lark.

    Raises
    ------
    ValueError
        Not exactly one of the three is given, or the one given cannot be compiled; the message says where.
    """

    def __init__(
        self,
        model: Model,
        *,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        lark: str | None = None,
    ) -> None:
        """Compile the grammar."""
        for name in ("special_tokens", "token_bytes", "is_end_of_generation"):
            if not hasattr(type(model), name):  # of a closed model, some are absent
                raise TypeError(f"model must be an overspill.Model, not {shown(model)}")
        if sum(given is not None for given in (json_schema, regex, lark)) != 1:
            raise ValueError("give one of json_schema, regex and lark")
        if json_schema is not None:
            if not isinstance(json_schema, str | Mapping):
                raise TypeError(f"json_schema must be a mapping or JSON, not {shown(json_schema)}")
            as_json("json_schema", dict(json_schema) if isinstance(json_schema, Mapping) else json_schema)
            schema = json_schema if isinstance(json_schema, str) else json.dumps(dict(json_schema))
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        elif regex is not None:
            grammar = llguidance.LLMatcher.grammar_from_regex(as_text("regex", regex))
        else:
            grammar = llguidance.LLMatcher.grammar_from_lark(as_text("lark", lark))
        self._matcher = llguidance.LLMatcher(_tokenizer(model), grammar, log_level=0)
        self._check()
        self._bits = llguidance.numpy.allocate_token_bitmask(1, model.n_vocab)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"llguidance: {' '.join(self._matcher.get_error().split())}")

    def allowed(self) -> NDArray[np.int32]:
        """Return the tokens that may come next: int32 of shape (ceil(n_vocab / 32),), one bit per token."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits: NDArray[np.int32] = self._bits[0]
        return bits

    def accept(self, token: int) -> None:
        """Advance the grammar by ``token``."""
        self._matcher.consume_token(as_integer("token", token, 0, 2**31 - 1))
        self._check()


class _Vocabulary:
    """The model's tokenizer, with the attributes that llguidance reads."""

    def __init__(self, model: Model) -> None:
        special = model.special_tokens
        self.bos_token_id = special.get("bos")
        self.tokens = []
        for token in range(model.n_vocab):
            text = model.token_bytes(token, special=False)
            # llguidance takes tokens with this first byte for special ones, which no text has.
            self.tokens.append(text or b"\xff" + model.token_bytes(token))
        ends = [token for token in range(model.n_vocab) if model.is_end_of_generation(token)]
        self.eos_token_id = special.get("eos", ends[0] if ends else model.n_vocab - 1)
        self.ends = ends or [self.eos_token_id]
        self.special_token_ids: list[int] = []
        self._model = model

    def __call__(self, text: bytes) -> list[int]:
        return self._model._core.tokenize(text, False, False)


def _tokenizer(model: Model) -> llguidance.LLTokenizer:
    if model not in _tokenizers:
        vocabulary = _Vocabulary(model)
        _tokenizers[model] = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), eos_token=vocabulary.ends)
    return _tokenizers[model]
