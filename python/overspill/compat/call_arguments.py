"""The arguments of llama-cpp-python's calls as the options of :meth:`overspill.Model.stream`."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from overspill.base.checks import (
    as_flag,
    as_function,
    as_integer,
    as_list,
    as_path,
    as_real,
    as_real_within,
    as_text,
    naming,
    shown,
)
from overspill.base.values import LogitsProcessor
from overspill.engine.tools import describe_tools
from overspill.sampling.json_schema import grammar_of_json_schema
from overspill.sampling.options import SamplingOptions

__all__ = [
    "Criteria",
    "LlamaGrammar",
    "LogitsProcessorList",
    "Seeds",
    "StoppingCriteriaList",
    "schema_of",
    "stream_options",
    "tools_and_choice",
]

_RANDOM = (-1, 2**32 - 1)  # as theirs and llama.cpp write it
_SAME = ("top_p", "min_p", "typical_p", "mirostat_tau", "mirostat_eta")
_PENALTIES = ("repeat_penalty", "frequency_penalty", "presence_penalty")

Processor: TypeAlias = Callable[[NDArray[np.int32], NDArray[np.float32]], NDArray[np.float32]]
"""A function of all token ids so far, int32, and the logits, float32 of shape (n_vocab,). It returns the new logits."""
Criterion: TypeAlias = Callable[[NDArray[np.int32], NDArray[np.float32]], bool]
"""A function of the same arguments that returns whether the reply ends before its next token."""


class LogitsProcessorList(list[Processor]):
    """Functions of token ids and logits that return other logits, called in order."""

    def __call__(self, input_ids: NDArray[np.int32], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what the functions make of the logits, one after the other."""
        for process in self:
            scores = process(input_ids, scores)
        return scores


class StoppingCriteriaList(list[Criterion]):
    """Functions of token ids and logits; the reply ends if one of them returns True."""

    def __call__(self, input_ids: NDArray[np.int32], logits: NDArray[np.float32]) -> bool:
        """Return whether one of the functions returns True; those behind it are not called."""
        return any(criterion(input_ids, logits) for criterion in self)


class LlamaGrammar:
    """A grammar that a reply cannot leave."""

    def __init__(self, grammar: str) -> None:
        """Keep a grammar in GBNF, with the start symbol ``root``; it is compiled as a reply begins."""
        self.grammar = as_text("grammar", grammar)
        """The grammar in GBNF."""

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """Return a grammar in GBNF; ``verbose`` has no effect."""
        as_flag("verbose", verbose)
        return cls(grammar)

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> LlamaGrammar:
        """Return the grammar in GBNF that is in a file; a ValueError if it cannot be read."""
        as_flag("verbose", verbose)
        path = as_path("file", file)
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"file: {shown(str(path))} cannot be read: {error}") from None

    @classmethod
    def from_json_schema(cls, json_schema: str | Mapping[str, Any] | bool, verbose: bool = True) -> LlamaGrammar:
        """Return the grammar of JSON that fits a schema, given in JSON or as a mapping; ``verbose`` has no effect."""
        as_flag("verbose", verbose)
        return cls(grammar_of_json_schema(json_schema))


class Seeds:
    """Where calls without a seed of their own take it from."""

    def __init__(self, seed: Any) -> None:
        """Begin with the seed of a model; -1 and 4294967295 stand for a new one each time."""
        number = as_integer("seed", seed, -1, 2**32 - 1)
        self._draws = None if number in _RANDOM else random.Random(number)

    def next(self, seed: Any) -> int | None:
        """Return the seed of a call, which may have none; None for one by chance."""
        if seed is not None:
            number = as_integer("seed", seed, -1, 2**32 - 1)
            return None if number in _RANDOM else number
        return None if self._draws is None else self._draws.randrange(2**32 - 1)


class Criteria:
    """The criteria that end a reply, as a function that looks at logits before each token."""

    def __init__(self, criteria: Any) -> None:
        """Check the functions; None is no criterion."""
        self._criteria = _functions("stopping_criteria", criteria)
        self.are_met = False
        """Whether the token that comes next is no part of the reply."""

    @property
    def processors(self) -> list[LogitsProcessor]:
        """What a stream has to call."""
        return [self._look] if self._criteria else []

    def _look(self, logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        self.are_met = self.are_met or any(criterion(tokens, logits) for criterion in self._criteria)


def stream_options(given: Mapping[str, Any], criteria: Criteria, last_n: int, seed: int | None) -> dict[str, Any]:
    """Return the options of :meth:`overspill.Model.stream` that do what a call's arguments ask for.

    Parameters
    ----------
    given
        The arguments by name; those that a call does not have are left out.
    criteria
        What may end the reply.
    last_n
        Tokens that penalties look at.
    seed
        The seed; None for one by chance.
    """
    processors = [_in_place(f) for f in _functions("logits_processor", given["logits_processor"])]
    options: dict[str, Any] = {
        "sampling": _sampling(given, last_n, seed),
        "logits_processors": [*criteria.processors, *processors],
        "stop": () if given.get("stop") is None else given["stop"],
    }
    if (grammar := given["grammar"]) is not None:
        if not isinstance(grammar, LlamaGrammar):
            raise TypeError(f"grammar must be a LlamaGrammar, as from_string(text) makes it, not {shown(grammar)}")
        options["grammar"] = grammar.grammar
    if given.get("max_tokens") is not None:
        limit = as_integer("max_tokens", given["max_tokens"], -(2**63), 2**63 - 1)
        options["max_tokens"] = limit if limit > 0 else None
    return options


def _sampling(given: Mapping[str, Any], last_n: int, seed: int | None) -> SamplingOptions:
    name = "temp" if "temp" in given else "temperature"
    mirostat = as_integer("mirostat_mode", given["mirostat_mode"], 0, 2)
    if mirostat == 1:
        raise ValueError("mirostat_mode must be 0 or 2 here, not 1: llama.cpp's version 2 is the simpler of the two")
    return SamplingOptions(
        temperature=as_real_within(name, given[name], 0, 1e30),
        top_k=max(0, as_integer("top_k", given["top_k"], -(2**31), 2**31 - 1)),
        mirostat=mirostat,
        logit_bias=_biases(given.get("logit_bias")),
        repeat_last_n=last_n,
        seed=seed,
        **{option: given[option] for option in (*_SAME, *_PENALTIES)},
    )


def _biases(given: Any) -> dict[int, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"logit_bias must be a mapping from token ids to numbers, not {shown(given)}")
    try:
        return {int(token): as_real("logit_bias", bias) for token, bias in given.items()}
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"logit_bias must have token ids as keys and numbers as values, not {shown(given)}") from None


def _functions(name: str, given: Any) -> list[Any]:
    if given is None:
        return []
    functions = as_list(name, given, "functions")
    return [as_function(f"{name}[{i}]", function) for i, function in enumerate(functions)]


def _in_place(process: Processor) -> LogitsProcessor:
    def edit(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        edited = process(tokens, logits)
        if edited is not logits:
            logits[:] = edited

    return edit


def schema_of(response_format: Any) -> Any:
    """Return the JSON schema of the answer; None for any text."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return response_format.get("schema") or {"type": "object"}
    if kind == "json_schema":
        described = response_format.get("json_schema")
        if isinstance(described, Mapping) and "schema" in described:
            return described["schema"]
    raise ValueError(
        'response_format must be {"type": "text"}, {"type": "json_object", "schema": {...}} or '
        f'{{"type": "json_schema", "json_schema": {{"schema": {{...}}}}}}, not {shown(response_format)}'
    )


def tools_and_choice(given: Mapping[str, Any]) -> tuple[list[dict[str, Any]] | None, str]:
    """Return the tools of a chat, and which of them the model may call; ``functions`` are an older name of tools."""
    name = "tools" if given["functions"] is None else "functions"
    tools = None
    if given[name] is not None:
        with naming(name):
            tools = describe_tools(given[name])
    choice_name = "tool_choice" if given["function_call"] is None else "function_call"
    choice = given[choice_name]
    if choice is None:
        return tools, "auto"
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return tools, choice
    wanted = choice.get("function", choice).get("name") if _names_a_function(choice) else None
    if wanted is None:
        raise ValueError(
            f'{choice_name} must be "auto", "none", "required" or {{"type": "function", "function": {{"name": ...}}}}, '
            f"not {shown(choice)}"
        )
    named = [tool for tool in tools or () if tool["function"]["name"] == wanted]
    if not named:
        raise ValueError(f"{choice_name}: there is no tool {shown(wanted)}")
    return named, "required"


def _names_a_function(choice: Any) -> bool:
    return isinstance(choice, Mapping) and isinstance(choice.get("function", choice), Mapping)
