"""The arguments of a stream, checked, as the core takes them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from overspill.base.checks import as_function, as_integer, as_list, as_text, shown
from overspill.base.values import LogitsProcessor, TokenChooser, TokenMask
from overspill.sampling.json_schema import grammar_of_json_schema
from overspill.sampling.sampler import Sampler

__all__ = [
    "check_for_any_model",
    "chooser",
    "constraint",
    "n_logprobs",
    "n_tokens_at_most",
    "stop_strings",
    "token_ids",
]


def token_ids(name: str, values: Iterable[SupportsIndex]) -> list[int]:
    """Return token ids as integers; whether they are in the vocabulary, the core checks."""
    try:
        tokens = [operator.index(value) for value in as_list(name, values, "token ids")]
    except TypeError:
        text = "a string or " if name.startswith("prompt") else ""
        raise TypeError(f"{name} must be {text}a sequence of token ids, not {shown(values)}") from None
    for extreme in (min(tokens, default=0), max(tokens, default=0)):
        if abs(extreme) >= 2**31:
            raise ValueError(f"{name}: {shown(extreme)} is not in the vocabulary")
    return tokens


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """Return one or more stop strings as a list."""
    try:
        stops = [stop] if isinstance(stop, str) else as_list("stop", stop, "strings")
        return [as_text("stop", text) for text in stops]
    except TypeError:
        raise TypeError(f"stop must be a string or a sequence of strings, not {shown(stop)}") from None


def n_tokens_at_most(max_tokens: int | None) -> int:
    """Return the limit of a reply; -1 for none."""
    return -1 if max_tokens is None else as_integer("max_tokens", max_tokens, 1, 2**63 - 1)


def n_logprobs(logprobs: bool | int) -> int:
    """Return how many top_logprobs to fill in; -1 for no logprob at all."""
    return int(logprobs) - 1 if isinstance(logprobs, bool) else as_integer("logprobs", logprobs, 1, 1000)


def chooser(sampler: TokenChooser | None, processors: Sequence[LogitsProcessor]) -> TokenChooser | None:
    """Return one function for processors and sampler, or None if there is neither."""
    processors = as_list("logits_processors", processors, "functions")
    for i, function in enumerate(processors):
        as_function(f"logits_processors[{i}]", function)
    if sampler is not None:
        as_function("sampler", sampler)
    if not processors:
        return sampler

    def choose(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> int | None:
        for process in processors:
            answer: object = process(logits, tokens)
            if answer is not None and answer is not logits:
                raise TypeError(f"{process!r} must edit the logits in place and return None")
        return None if sampler is None else sampler(logits, tokens)

    return choose


def constraint(
    grammar: str | TokenMask | None, json_schema: str | Mapping[str, Any] | bool | None
) -> tuple[str | None, TokenMask | None]:
    """Return a grammar in GBNF, or a mask, or neither."""
    if json_schema is not None:
        if grammar is not None:
            raise ValueError("give either grammar or json_schema")
        return grammar_of_json_schema(json_schema), None
    if grammar is None or isinstance(grammar, str):
        return grammar if grammar is None else as_text("grammar", grammar), None
    if isinstance(grammar, type) or not isinstance(grammar, TokenMask):
        raise TypeError(f"grammar must be GBNF or have the methods of TokenMask, not {shown(grammar)}")
    return None, grammar


def check_for_any_model(options: Mapping[str, Any]) -> None:
    """Raise a TypeError for an option of a stream whose state belongs to one model."""
    if isinstance(options.get("sampler"), Sampler):
        raise TypeError("sampler must be a function here, or sampling options: a Sampler's state is one model's")
    if not isinstance(options.get("grammar"), str | None):
        raise TypeError("grammar must be GBNF here: a mask is one model's, and used up by it")
    if options.get("session") is not None:
        raise TypeError("session cannot be given here: a file of a session is one model's")
