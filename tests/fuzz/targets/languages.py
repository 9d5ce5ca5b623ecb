"""Grammars and JSON schemas, changed: a text that fits comes out, or an error that says what is wrong."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import numpy as np
from numpy.typing import NDArray

import overspill
from fuzz.gguf_models import gpt_oss
from fuzz.mutators import mutated_json_text, mutated_text
from fuzz.targets.gguf_files import check_message
from model_files import llama_cpp_folder
from overspill import Error, StopReason

__all__ = ["Grammars", "JsonSchemas", "grammar_seeds", "small_model"]

_GBNF = (
    *(
        "root",
        "::=",
        "|",
        "(",
        ")",
        "*",
        "+",
        "?",
        "{2,5}",
        "{3}",
        "{1,}",
        "{0,100000}",
        "{5,2}",
        "[a-z]",
        "[^\\n]",
        ".",
        "\n",
    ),
    *(
        '"a"',
        '""',
        '"\\n"',
        '"\\x41"',
        '"\\U0010FFFF"',
        '"\\U00110000"',
        "[\\u0000-\\uffff]",
        "[]",
        "[^]",
        "<[1]>",
        "<|x|>",
    ),
    *("!<[1]>", "item", "ws", "# note\n", "\\", "[z-a]", "root ::= root", " root"),
)
_OWN = (
    'root ::= "yes" | "no"',
    'root ::= item ("," item)* \nitem ::= [a-z]{1,3} | "(" root ")"',
    'root ::= [0-9]+ ("." [0-9]{1,4})? ws\nws ::= [ \\t\\n]*',
)
KEYWORDS = (
    *("type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "enum"),
    *(
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "const",
    ),
    *("anyOf", "oneOf", "allOf", "not", "$ref", "$defs", "definitions", "if", "then", "else", "title", "nullable"),
    *("uniqueItems", "multipleOf", "patternProperties", "propertyNames", "contains", "dependentRequired", "$schema"),
    *(
        "object",
        "array",
        "string",
        "integer",
        "number",
        "boolean",
        "null",
        "date",
        "uuid",
        "#",
        "#/$defs/node",
        "a",
        "b",
    ),
)
_SCHEMAS: tuple[Any, ...] = (
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 5}},
        "required": ["a"],
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "integer", "minimum": -5, "maximum": 1200},
    {"type": "string", "pattern": "^[a-c]{1,3}(x|yz)?$"},
    {"enum": ["a", 1, None, {"b": [True]}]},
    {"anyOf": [{"type": "null"}, {"const": "one"}, {"type": "number"}]},
    {"type": "string", "format": "date"},
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "n": {"type": "integer"},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["n", "next"],
                "additionalProperties": False,
            }
        },
    },
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]},
        ]
    },
    {
        "type": "object",
        "additionalProperties": {"type": "integer"},
        "properties": {"a": {"type": "string", "minLength": 2}},
    },
    {"type": ["string", "null"], "minLength": 1, "maxLength": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "integer"}], "minItems": 2, "maxItems": 2},
    True,
)


def small_model(folder: Path, **options: Any) -> overspill.Model:
    """Return a model of two layers that says anything, byte by byte."""
    file = folder / "small.gguf"
    file.write_bytes(gpt_oss().to_bytes())
    return overspill.Model(file, **{"offload": "cpu", "n_ctx": 256, "n_threads": 1, **options})


def grammar_seeds() -> list[str]:
    """Return llama.cpp's examples, and small grammars as often."""
    files = sorted((llama_cpp_folder() / "grammars").glob("*.gbnf"))
    return [*(file.read_text(encoding="utf-8") for file in files), *_OWN * 3]


class Grammars:
    """Changed grammars, of llama.cpp's examples and small ones."""

    def __init__(self, folder: Path) -> None:
        """Load the model."""
        self._model = small_model(folder)
        self._seeds = grammar_seeds()

    def make(self, random: Random) -> str:
        """Return a changed grammar."""
        return mutated_text(random, random.choice(self._seeds), _GBNF)

    def check(self, case: str) -> None:
        """Ask for some tokens that follow it."""
        try:
            self._model.generate([1, 2], grammar=case, max_tokens=12, seed=1)
        except Error as error:
            check_message(error)
        except ValueError as error:
            check_message(error, "grammar")


@cache
def _checker() -> jsonschema.FormatChecker:
    return jsonschema.FormatChecker(["date"])


class JsonSchemas:
    """Changed schemas: what comes out to its end fits, as another library sees it."""

    def __init__(self, folder: Path) -> None:
        """Load the model."""
        self._model = small_model(folder)
        pieces = [self._model.token_bytes(token) for token in range(self._model.n_vocab)]
        # What ends a value is pushed, so that a model that says anything comes to an end.
        self._ends = np.flatnonzero([piece in (b'"', b"}", b"]", b"0", b":") for piece in pieces])
        self._end = [i for i in range(self._model.n_vocab) if self._model.is_end_of_generation(i)]

    def make(self, random: Random) -> str:
        """Return a changed schema, as JSON."""
        return mutated_json_text(random, random.choice(_SCHEMAS), KEYWORDS)

    def check(self, case: str) -> None:
        """Ask for a value."""

        def push(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
            logits[self._ends] += 0.1 * len(tokens)
            logits[self._end] += 0.1 * len(tokens)

        try:
            said = self._model.generate([1, 2], json_schema=case, max_tokens=150, seed=1, logits_processors=[push])
        except Error as error:
            check_message(error)
            return
        except ValueError as error:
            check_message(error, "json_schema")
            return
        if said.stats.stop_reason == StopReason.EOS:
            # It raises for a type that is none, too: such a schema should have been refused.
            judge = jsonschema.Draft202012Validator(json.loads(case), format_checker=_checker())
            judge.validate(json.loads(said.text))
