"""Constrained decoding: what comes out parses, and what cannot be compiled says where."""

from __future__ import annotations

import datetime
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from chi_square import Z_OF_1_IN_10_000, deviation
from overspill import ClosedError, Error, Model, StopReason
from overspill.guidance import Guidance
from overspill.sampling.json_schema import schema_rules
from sweeps import sweep


def obj(required: bool = True, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object with these properties and no others."""
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(properties)} if required else schema


TEXT = {"type": "string", "maxLength": 12}
COUNT = {"type": "integer", "minimum": 0, "maximum": 99}
POINT = obj(x={"type": "number"}, y={"type": "number"})
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": obj(
            name={"enum": ["leaf", "branch"]},
            children={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        )
    },
}
LIST = {
    "$ref": "#/definitions/list",
    "definitions": {"list": {"anyOf": [{"type": "null"}, obj(head=COUNT, tail={"$ref": "#/definitions/list"})]}},
}
EXPRESSION = {
    "$ref": "#/$defs/e",
    "$defs": {
        "e": {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": 9},
                obj(op={"enum": ["+", "*"]}, left={"$ref": "#/$defs/e"}, right={"$ref": "#/$defs/e"}),
            ]
        }
    },
}

SCHEMAS: list[dict[str, Any]] = [
    # Values
    {"type": "null"},
    {"type": "boolean"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "string", "maxLength": 20},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"const": 42},
    {"const": {"a": [1, "two", None]}},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2.5, "three", None, True]},
    # Ranges
    COUNT,
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    {"type": "integer", "minimum": 1990, "maximum": 2026},
    # Patterns and formats
    {"type": "string", "pattern": "^[a-z]{3,8}$"},
    {"type": "string", "pattern": "^(Mr|Ms)\\. [A-Z][a-z]{2,9}$"},
    {"type": "string", "pattern": "^\\+[0-9]{2} [0-9]{3}-[0-9]{4}$"},
    {"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"},
    {"type": "string", "pattern": "^v[0-9]+\\.[0-9]+(\\.[0-9]+)?$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    # Arrays
    {"type": "array", "items": COUNT, "minItems": 3, "maxItems": 3},
    {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 5},
    {"type": "array", "items": {"type": "array", "items": COUNT, "maxItems": 2}, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "boolean"}, COUNT, TEXT], "minItems": 3, "maxItems": 3},
    {"type": "array", "items": POINT, "minItems": 2, "maxItems": 2},
    # Objects
    {"type": "object", "properties": {}, "additionalProperties": False},
    obj(name=TEXT),
    obj(name=TEXT, age=COUNT),
    obj(required=False, a=COUNT, b=COUNT, c=COUNT),
    {**obj(id=COUNT, note=TEXT), "required": ["id"]},
    obj(True, **{"a key": COUNT, 'with "quotes"': {"type": "boolean"}, "日本": {"type": "null"}}),
    obj(tags={"type": "array", "items": TEXT, "maxItems": 3}, ok={"type": "boolean"}),
    {"type": "object", "additionalProperties": {"type": "boolean"}, "properties": {"a": COUNT}, "required": ["a"]},
    POINT,
    # Nested
    obj(person=obj(name=TEXT, born=obj(year=COUNT, place=TEXT)), alive={"type": "boolean"}),
    obj(a=obj(b=obj(c=obj(d=obj(e={"const": "deep"}))))),
    obj(shape={"anyOf": [obj(radius=COUNT), obj(width=COUNT, height=COUNT)]}),
    {"oneOf": [{"type": "boolean"}, COUNT, {"type": "null"}]},
    {"anyOf": [obj(kind={"const": "cat"}, lives=COUNT), obj(kind={"const": "dog"}, good={"const": True})]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": COUNT}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    {"type": ["boolean", "null"]},
    obj(maybe={"type": ["integer", "null"], "minimum": 0}),
    # References and recursion
    {"$ref": "#/$defs/p", "$defs": {"p": POINT}},
    obj(start={"$ref": "#/$defs/p"}, end={"$ref": "#/$defs/p"}) | {"$defs": {"p": POINT}},
    TREE,
    LIST,
    EXPRESSION,
]


FORMATS = jsonschema.FormatChecker(["date", "uuid"])


@FORMATS.checks("time", raises=ValueError)
def _is_time(value: object) -> bool:
    return bool(datetime.time.fromisoformat(str(value).upper()))  # RFC 3339 allows a lower-case z


class Closing:
    """Makes what ends a value ever more likely, so that a base model comes to an end."""

    def __init__(self, model: Model, n_prompt: int) -> None:
        pieces = [model.token_bytes(token) for token in range(model.n_vocab)]
        closes = [
            re.fullmatch(rb'"?[}\]]*|null|leaf|Z| ?\[\]', piece) is not None or model.is_end_of_generation(i)
            for i, piece in enumerate(pieces)
        ]
        self.closers = np.flatnonzero(closes)
        self.digits = np.flatnonzero([re.search(rb"[0-9\\]$", piece) is not None for piece in pieces])
        self.blanks = np.flatnonzero([re.search(rb"\s$|[{]", piece) is not None for piece in pieces])
        self.n_prompt = n_prompt

    def __call__(self, logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        """Add half a logit for each token beyond thirty."""
        push = 0.5 * max(len(tokens) - self.n_prompt - 30, 0)
        logits[self.closers] += push
        logits[self.digits] -= push / 2
        logits[self.blanks] -= push


@pytest.fixture(scope="module")
def closing(gemma: Model) -> Closing:
    """Return the processor for a prompt."""
    return Closing(gemma, len(gemma.tokenize("JSON: ")))


@pytest.fixture(scope="module")
def closing_tiny(tiny_gpt_oss: Model) -> Closing:
    """Return the same for the tiny gpt-oss."""
    return Closing(tiny_gpt_oss, len(tiny_gpt_oss.tokenize("JSON: ")))


def test_there_are_fifty() -> None:
    """Each a valid schema."""
    assert len(SCHEMAS) == 50
    for schema in SCHEMAS:
        jsonschema.Draft202012Validator.check_schema(schema)


def check_replies(model: Model, closing: Closing, schema: dict[str, Any], engine: str) -> None:
    """Check replies, parsed by the json module and judged by jsonschema."""
    for seed in (1, 2) if engine == "llama.cpp" else (1,):
        options: dict[str, Any] = {"json_schema": schema}
        if engine == "llguidance":
            options = {"grammar": Guidance(model, json_schema=schema)}
        reply = model.generate("JSON: ", max_tokens=400, seed=seed, logits_processors=[closing], **options)
        assert reply.stats.stop_reason == StopReason.EOS, reply.text
        jsonschema.validate(json.loads(reply.text), schema, format_checker=FORMATS)


@pytest.mark.parametrize("number", sweep(range(50), always=[3, 35]))
@pytest.mark.parametrize("engine", ["llama.cpp", "llguidance"])
def test_the_reply_fits_the_schema(gemma: Model, closing: Closing, number: int, engine: str) -> None:
    """With a vocabulary of 262,144 tokens, of which many are several characters of JSON."""
    check_replies(gemma, closing, SCHEMAS[number], engine)


@pytest.mark.parametrize("number", range(50))
@pytest.mark.parametrize("engine", ["llama.cpp", "llguidance"])
def test_nonsense_fits_the_schema(tiny_gpt_oss: Model, closing_tiny: Closing, number: int, engine: str) -> None:
    """With random weights, which make anything that is allowed about as likely."""
    check_replies(tiny_gpt_oss, closing_tiny, SCHEMAS[number], engine)


@pytest.mark.parametrize(
    "pattern",
    [
        "^.{2,6}$",
        "^[^a]{2,6}$",
        "^[ -~]{2,6}$",
        '^["\\\\x]{2}$',
        '^"[a-z]\\\\?(\n|\\t)"{1,4}\\u0022$',
        "^\\x5C{2}[^-a-]$",
    ],
)
def test_patterns_speak_of_what_the_json_means(gemma: Model, pattern: str) -> None:
    """A quote, a backslash or a line break is escaped or left out, however likely it is."""
    spoilers = [i for i in range(gemma.n_vocab) if re.search(rb'["\\\\\n\t]', gemma.token_bytes(i))]

    def prefer(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        logits[spoilers] += 15

    for seed in range(3):
        options: dict[str, Any] = {"json_schema": {"type": "string", "pattern": pattern}, "temperature": 1.5}
        reply = gemma.generate("JSON: ", max_tokens=60, seed=seed, logits_processors=[prefer], **options)
        assert reply.stats.stop_reason == StopReason.EOS, reply.text
        assert re.search(pattern, json.loads(reply.text)), reply.text


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= "yes" | "no"', "yes|no"),
        ('root ::= [0-9]{3} "-" [a-c]+ "!"', "[0-9]{3}-[a-c]+!"),
        ('root ::= "日本" ("語" | "人"){2}', "日本[語人]{2}"),
        ('root ::= line{2}\nline ::= "- " [a-z]{1,5} "\\n"', "(- [a-z]{1,5}\n){2}"),
    ],
)
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.5, "top_k": 0}, {"mirostat": 2}, {"top_p": 0.1}]
)
def test_gbnf(gemma: Model, grammar: str, pattern: str, options: dict[str, Any]) -> None:
    """The reply matches, however tokens are drawn."""

    def close(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        logits[exclamation] += max(len(tokens) - 15, 0)

    exclamation = gemma.tokenize("!", add_special=False)[0]
    reply = gemma.generate(
        "Answer:", grammar=grammar, max_tokens=100, seed=3, logits_processors=[close], logprobs=True, **options
    )
    assert re.fullmatch(pattern, reply.text), reply.text
    assert reply.stats.stop_reason == StopReason.EOS
    assert all(token.logprob is not None and token.logprob <= 0 for token in reply.tokens)


@pytest.mark.parametrize("name", sweep(["tiny_gpt_oss", "gemma"], always=[0]))
def test_a_grammar_does_not_shift_what_it_allows(request: pytest.FixtureRequest, name: str) -> None:
    """Among allowed tokens the odds are the model's: chi-square over first tokens, at 1 in 10,000."""
    model: Model = request.getfixturevalue(name)
    texts = [b" a ", b" the ", b" one ", b" my "]
    prompt = model.tokenize("I saw")
    model.reset()
    logits = model.eval(prompt).astype(np.float64)
    pieces = [model.token_bytes(token) for token in range(model.n_vocab)]
    allowed = [i for i, piece in enumerate(pieces) if piece and any(text.startswith(piece) for text in texts)]
    weights = np.exp(logits[allowed] - logits[allowed].max())
    grammar = "root ::= " + " | ".join(f'"{text.decode()}"' for text in texts)
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    counts = np.zeros(len(allowed))
    for seed in range(600):
        (token,) = model.stream(prompt, grammar=grammar, max_tokens=1, seed=seed, **plain)  # type: ignore[arg-type]
        counts[allowed.index(token.id)] += 1
    assert deviation(counts, weights / weights.sum() * 600) < Z_OF_1_IN_10_000


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ('root ::= "a', "line 1, column 10: unexpected end of input"),
        ('root := "a"', "line 1, column 6: expecting ::="),
        ('root ::= "a"\nx ::= [a-z', "line 2, column 7: unexpected end of input"),
        ('root ::= "a" |\n  x\nx ::= "b"\n\n# a comment\ny ::= "\\q"', "line 6, column 8: unknown escape"),
        ("root ::= word", "line 1, column 10: the rule word is not defined"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1: the rule root is defined twice"),
        ('root ::= "\\U00110000"', "line 1, column 11: beyond U+10FFFF"),
        ('root ::= "\\ud800"', "line 1, column 11: a surrogate"),
        ("root ::= [z-a]", "line 1, column 11: a range that ends before it begins"),
        ("root ::= [] | [^]", "line 1, column 10: a class without characters"),
        ('root ::= "a"{5,2}', "line 1, column 13: {5,2}: the most, 2, is below the least, 5"),
        ("root ::= <[99999999]>", "line 1, column 10: the model has no such token"),
        ("root ::= <no such token>", "line 1, column 10: the model has no such token"),
        ('root ::= "a" root | x\nx ::= x "a"', "no text fits it"),
        ("root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000, "within more than 500 others"),
        ('root ::= "a"{1000000000}', "more than 1000000 repetitions"),
        ('root ::= "a"{1000}{1000}{1000}', "more than 1000000 steps"),
        ("root ::= (" + "|".join(f'"{i}" "a"{{999}}' for i in range(2000)) + ")", "more than 1000000 steps"),
        ('word ::= "a"', "no rule named root"),
        ("", "no rule named root"),
        ('root ::= root "a"', "no text fits it"),
        ("root ::= [a-z]{10000000}", "repetitions"),
        ('root ::= "a\0"', "line 1, column 12: a NUL character"),
    ],
)
def test_grammars_that_cannot_be_compiled(
    gemma: Model, capfd: pytest.CaptureFixture[str], grammar: str, text: str
) -> None:
    """A ValueError says where and what, and nothing is printed."""
    with pytest.raises(ValueError, match="grammar") as caught:
        gemma.stream("x", grammar=grammar)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "colour"}, "#: unrecognized type 'colour'"),
        ({"type": 5}, "#: unrecognized type 5"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "colour"}}}},
            "/properties/a/items",
        ),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/nothing"}}}, "'#/$defs/nothing' leads nowhere"),
        ({"$ref": "other.json"}, "#: $ref 'other.json', which leads out of the schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "refers to itself"),
        ({"items": {"$id": "x"}}, "#/items: $id"),
        ({"type": "string", "pattern": "^(ab$"}, "#: pattern: $ within the pattern"),
        ({"type": "string", "pattern": "^(ab"}, "unbalanced parentheses"),
        ({"type": "string", "pattern": "^ab)$"}, "unbalanced parentheses"),
        ({"type": "string", "pattern": "[a"}, "unterminated character class"),
        ({"type": "string", "pattern": "[]"}, "an empty class"),
        ({"type": "string", "pattern": "[z-a]"}, "a range in a class"),
        ({"type": "string", "pattern": "+a"}, "nothing to repeat"),
        ({"type": "string", "pattern": "a++"}, "nothing to repeat"),
        ({"type": "string", "pattern": "a{3,2}"}, "{3,2}: the most, 2, is below the least, 3"),
        ({"type": "string", "pattern": "a{0,1000000}"}, "counts of more than 100000"),
        ({"type": "string", "pattern": "\\bword"}, "\\b is not supported"),
        ({"type": "string", "pattern": "(a)\\1"}, "\\1 is not supported"),
        ({"type": "string", "pattern": "\\p{L}"}, "\\p is not supported"),
        ({"type": "string", "pattern": "(?=a)"}, "(?=a is not supported"),
        ({"type": "string", "pattern": "(?!a)"}, "(?!a is not supported"),
        ({"type": "string", "pattern": "a^b"}, "^ within the pattern"),
        ({"type": "string", "pattern": "^\\UFFFFFFFF$"}, "\\UFFFFFFFF is no character"),
        ({"type": "string", "pattern": "\\uD800"}, "\\uD800 is no character"),
        ({"properties": {"a": {"type": "string", "pattern": "^(ab"}}}, "#/properties/a: pattern"),
        ({"type": "string", "pattern": 5}, "pattern must be a string"),
        ({"type": ["number", "null"], "minimum": 5}, "#: minimum for number is not supported"),
        ({"minimum": 5}, "#: minimum for number"),
        ({"type": "number", "multipleOf": 0.5}, "#: multipleOf for number"),
        ({"type": "string", "pattern": "^a+$", "minLength": 3}, "a length beside pattern"),
        ({"type": "string", "format": "email"}, "the format 'email'"),
        ({"enum": [1, 2, 30], "maximum": 5}, "maximum beside enum"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "required 'b'"),
        ({"prefixItems": [{"type": "null"}], "minItems": 2}, "#: minItems is more than the items"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "#: minItems is more than maxItems"),
        ({"type": "array", "minItems": "3"}, "#: minItems must be an integer"),
        ({"type": "array", "maxItems": 10**9}, "#: maxItems must be an integer from 0 to 100000"),
        ({"type": "string", "minLength": 2**32}, "#: minLength must be an integer from 0"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "#: no integer is within the bounds"),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "#: no integer is within the bounds"),
        ({"type": "integer", "minimum": 10**200}, "#: minimum must be a number of at most 100 digits"),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, "#: exclusiveMinimum must be a number"),
        ({"type": ["integer", "null"], "const": 1.5}, "#: no type or value is left"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "#/allOf/0: no type or value is left"),
        ({"type": "integer", "enum": [math.inf]}, "Infinity is no JSON"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#: oneOf whose parts 0 and 1 may both fit"),
        ({"oneOf": [{}, {}, {"type": "null"}]}, "#: oneOf whose parts 0 and 1 may both fit"),
        ({"anyOf": []}, "#: anyOf must be a list of schemas"),
        ({"anyOf": {}}, "#: anyOf must be a list of schemas"),
        ({"type": "object", "properties": {}, "required": 5}, "#: required must be a list of strings"),
        ({"type": []}, "#: type must be a type, or a list of different types"),
        ({"type": ["null", "null"]}, "#: type must be a type, or a list of different types"),
        ({"required": ["a", "a"]}, "#: required must be a list of different strings"),
        ({"items": [{}]}, "#: items must be a schema (a list"),
        ({"$defs": {"a": {"items": {"type": "x"}}}}, "#/$defs/a/items: unrecognized type 'x'"),
        ({"properties": 5}, "#: properties must be an object"),
        ({"properties": {"a": 5}}, "#/properties/a: a schema must be an object or a boolean"),
        ({"type": "array", "items": {"type": "number", "multipleOf": 0.5}}, "#/items: multipleOf"),
        ({"properties": {"not": {"type": "number", "minimum": 1}}}, "#/properties/not: minimum"),
        ({"anyOf": [{}, {"type": "object", "maxProperties": 1}]}, "#/anyOf/1: maxProperties"),
        ({"not": {"type": "null"}}, "#: not is not supported"),
        ({"if": {}, "then": {}}, "#: if is not supported"),
        ({"nullable": True, "type": "string"}, "#: nullable"),
        ({"type": "array", "uniqueItems": True}, "#: uniqueItems"),
        ({"type": "array", "contains": {}}, "#: contains"),
        ({"patternProperties": {"a": {}}}, "#: patternProperties"),
        (False, "#: it is false"),
        ("null", "#: a schema must be an object or a boolean"),
        ({"const": "\ud800"}, "half of a surrogate pair"),
        ("[" * 100_000, "nested deeper than 500 levels"),
        ('{"minimum": ' + "9" * 5000 + "}", "4300"),
        ('{"type": "object", ', "line 1, column"),
    ],
)
def test_schemas_that_cannot_be_compiled(
    gemma: Model, capfd: pytest.CaptureFixture[str], schema: dict[str, Any] | str | bool, text: str
) -> None:
    """A ValueError says where and what; nothing is left out in silence, nor printed."""
    with pytest.raises(ValueError, match="json_schema") as caught:
        gemma.stream("x", json_schema=schema)
    assert text in str(caught.value)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match="either grammar or json_schema"):
        gemma.stream("x", json_schema={}, grammar="root ::= .")


@pytest.mark.parametrize("beginning", ["", "é", "ab", '{"', "日"])
@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= [a-z]* | "é" . "日" | "日本" root',
        'root ::= (("a" | "ab" | "b")* | [^a] | "{\\"" root)*',
        'root ::= .{0,3} "<" | <[77]> "a" | [\\u0080-\\uffff] root',
        f"root ::= fits\n{schema_rules({'properties': {'ab': {'type': 'integer'}, 'é': {}}})}",
    ],
)
def test_the_whole_vocabulary_is_asked_as_each_token_is(tiny_gpt_oss: Model, grammar: str, beginning: str) -> None:
    """Mirostat gets the answers for all tokens at once, and a sampler of one's own for the one that it returns."""
    begun = tiny_gpt_oss.tokenize(beginning, add_special=False)
    tokens = [
        *random.Random(1).sample(range(tiny_gpt_oss.n_vocab), 60),
        *tiny_gpt_oss.tokenize("a<日1}{", add_special=False),
    ]

    def says(token: int, **options: Any) -> bool:
        wanted = iter([*begun, token])

        def force(logits: NDArray[np.float32], before: NDArray[np.int32]) -> None:
            logits[:] = -np.inf
            logits[next(wanted)] = 0

        how = {"logits_processors": [force]} if options else {"sampler": lambda logits, before: next(wanted)}
        try:
            list(tiny_gpt_oss.stream([1, 2], grammar=grammar, max_tokens=len(begun) + 1, **how, **options))
        except (ValueError, Error):
            return False
        return True

    allowed = [says(token) for token in tokens]
    assert any(allowed) or beginning
    assert allowed == [says(token, mirostat=2) for token in tokens]


LONG_GRAMMAR = """
import signal, sys, threading
from overspill import Model
signal.signal(signal.SIGINT, signal.default_int_handler)
words = " | ".join(f'[ -~]* "{i}"' for i in range(5000))
with Model(sys.argv[1], n_ctx=64, n_threads=1) as model:
    threading.Timer(1, signal.raise_signal, [signal.SIGINT]).start()
    try:
        model.generate("x", grammar=f"root ::= {words}", mirostat=2, max_tokens=1)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_grammar_that_takes_long(gemma_path: Path) -> None:
    """Mirostat asks about each of 262,144 tokens, and each is the beginning of thousands of readings: many minutes."""
    command = [sys.executable, "-c", LONG_GRAMMAR, str(gemma_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "interrupted\n", done.stderr[-1500:]


def test_what_llama_cpp_cannot_llguidance_can(gemma: Model) -> None:
    """Patterns without anchors, regular expressions, and Lark; mistakes are one line."""
    schema = {"type": "string", "pattern": "[xyz][0-9]{2}", "maxLength": 8}
    reply = gemma.generate("JSON: ", grammar=Guidance(gemma, json_schema=schema), max_tokens=60, seed=1)
    jsonschema.validate(json.loads(reply.text), schema)
    reply = gemma.generate("Date: ", grammar=Guidance(gemma, regex=r"[0-9]{4}-[0-9]{2}"), max_tokens=60, seed=1)
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", reply.text)
    reply = gemma.generate("Say: ", grammar=Guidance(gemma, lark='start: "hello" | "bye"'), max_tokens=60, seed=1)
    assert reply.text in ("hello", "bye")
    with pytest.raises(ValueError, match=r"llguidance: .*regex") as caught:
        Guidance(gemma, regex="[")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="give one of"):
        Guidance(gemma)


def test_guidance_for_a_closed_model(tiny_gpt_oss_path: Path) -> None:
    """It is a model for all that, and the error says what it lacks."""
    model = Model(tiny_gpt_oss_path, n_ctx=64)
    model.close()
    with pytest.raises(ClosedError, match="is closed"):
        Guidance(model, regex="a")
