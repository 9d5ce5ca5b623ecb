"""Which texts the grammar of a JSON schema lets through, judged by jsonschema and by Python's regular expressions."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from overspill import Model, StopReason
from overspill.sampling.json_schema import grammar_of_json_schema
from sweeps import sweep

UNUSUAL = 'a\\"/\n\x01\x7fé日😀 '


@cache
def token_of_bytes(model: Model) -> dict[bytes, int]:
    """Return the vocabulary the other way round."""
    return {model.token_bytes(token): token for token in range(model.n_vocab)}


@cache
def end_of(model: Model) -> int:
    """Return a token that ends a reply."""
    return next(token for token in range(model.n_vocab) if model.is_end_of_generation(token))


def lets_through(model: Model, text: str, **options: Any) -> bool:
    """Return whether a grammar or schema lets the model say just this."""
    of_bytes = token_of_bytes(model)
    tokens = [of_bytes[bytes([byte])] for byte in text.encode()] + [end_of(model)]
    at = iter(tokens)

    def say(logits: NDArray[np.float32], before: NDArray[np.int32]) -> int:
        return next(at)

    try:
        list(model.stream([1, 2], sampler=say, max_tokens=len(tokens), **options))
    except ValueError as error:
        if "is not a token that the grammar allows here" in str(error):
            return False
        raise
    return True


CASES: list[tuple[Any, list[str], list[str]]] = [
    (
        {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        ['{"a": 1, "b": "x"}', '{"\\u0062":"x"}', "{}", '{"": "x", "ab": "", "b": ""}', '{"\\ud83d\\ude00": ""}'],
        ['{"\\u0061": "x"}', '{"b": "", "\\u0061": "x"}', '{"a": "x"}', '{"b": 1}', '{"\\ud83d": ""}'],
    ),
    (
        {"properties": {"/😀": {"type": "null"}}, "additionalProperties": {"type": "boolean"}},
        ['{"/😀": null}', '{"/\\ud83d\\ude01": true}', '{"/": true}', '{"/😀a": true}'],
        ['{"\\/😀": true}', '{"/\\uD83D\\uDe00": true}', '{"\\u002f\\ud83d\\ude00": true}', '{"/😀": true}'],
    ),
    (
        {"type": "string", "minLength": 2, "maxLength": 2},
        ['"😀😀"', '"\\ud83d\\ude00a"', '"ab"', '"\\u00e9\\n"', '"\\"\\\\"'],
        [
            '"😀"',
            '"\\ud83d\\ude00"',
            '"\\ud83da"',
            '"a\\ude00"',
            '"\\ude00\\ud83d"',
            '"a"',
            '"abc"',
            '"a\n"',
            '"\\x41a"',
        ],
    ),
    (
        {"properties": {"": {"type": "integer"}}, "required": [""]},
        ['{"": 1}', '{ "":1}'],
        ["{}", "1", '{"a": 1}', '{"": ""}'],
    ),
    (
        {"properties": {"a": {}, "b": {}, "c": {}}, "required": ["b"], "additionalProperties": False},
        ['{"b": 1}', '{"a": 1, "b": 1}', '{"b": 1, "c": 1}', '{"a": [], "b": {}, "c": null}'],
        ["{}", '{"a": 1}', '{"b": 1, "d": 1}', '{"b": 1,}', '{,"b": 1}', '{"a": 1 "b": 1}'],
    ),
    (
        {"type": "object", "required": ["x"], "additionalProperties": {"type": "integer"}},
        ['{"x": 1}', '{"x": 1, "y": 2}'],
        ["{}", '{"x": ""}', '{"x": 1, "y": ""}'],
    ),
    ({"$ref": "#/$defs/a~1b%20~0c", "$defs": {"a/b ~c": {"const": 1}}}, ["1"], ["2"]),
    (True, ["1", "[null]"], ["", "nul"]),
    (
        {"type": "string", "nullable": False, "discriminator": 1, "example": 2, "x-a": {}, "format": "int32"},
        ['"a"'],
        ["1"],
    ),
    ({"title": "T", "description": "D", "whatever": []}, ["1", "{}", '["a", {}]'], ["a", ""]),
    ({}, ["null", "-1.5e3", '{"a": [1, true]}', "[]"], ["01", "nul", "[1,]", "+1", ".5", "1.", "'a'"]),
    ({"type": "integer"}, ["0", "-12", "123456789012345678901234567890"], ["1.5", "01", "-", "1e3"]),
    (
        {"type": "integer", "minimum": -105, "maximum": 1017},
        ["-105", "-99", "0", "999", "1017"],
        ["-106", "1018", "00", "9999"],
    ),
    ({"type": "integer", "exclusiveMinimum": 9, "minimum": 3}, ["10", "99999"], ["9", "3", "-10"]),
    ({"type": "integer", "maximum": -2}, ["-2", "-3000"], ["-1", "0", "2"]),
    ({"type": "integer", "minimum": 0.5, "maximum": 2.5}, ["1", "2"], ["0", "3"]),
    (
        {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 1},
        ["[1]", "[1, 2, 2]"],
        ["[]", "[2]"],
    ),
    ({"type": "array", "prefixItems": [{"const": 1}, {"const": 2}]}, ["[]", "[1]", "[1,2]"], ["[2]", "[1, 2, 3]"]),
    ({"type": "array", "items": False}, ["[]"], ["[1]"]),
    ({"properties": {"a": False, "b": {}}}, ['{"b": 1}', "{}"], ['{"a": 1}']),
    (
        {"oneOf": [{"type": "integer"}, {"type": "null"}, {"type": "string", "maxLength": 1}]},
        ["1", "null", '"a"'],
        ['"ab"', "true"],
    ),
    (
        {
            "oneOf": [
                {"properties": {"k": {"const": "a"}, "v": {"type": "integer"}}, "required": ["k", "v"]},
                {"properties": {"k": {"enum": ["b", "c"]}}, "required": ["k"]},
            ]
        },
        ['{"k": "a", "v": 1}', '{"k": "c"}'],
        ['{"k": "a"}', '{"k": "d"}', '{"k": "b", "v": 1}'],
    ),
    ({"allOf": [{"type": "integer"}, {"minimum": 5}], "maximum": 7}, ["5", "7"], ["4", "8", "null"]),
    ({"anyOf": [{"minLength": 2}, {"maxLength": 0}], "type": "string"}, ['""', '"ab"'], ['"a"', "1"]),
    ({"allOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"enum": [2, 3]}]}, ["2"], ["1", "3"]),
    ({"type": ["string", "null"], "enum": ["a", 1, None]}, ['"a"', "null"], ["1", '"b"']),
    ({"enum": ["é", "e", "é2", 1.0]}, ['"é"', '"\\u00e9"', '"e"', '"\\u00e92"', "1", "1.0"], ['"\\u00e"', '"é', "2"]),
    (
        {"format": "date"},
        ['"2024-02-29"', '"1999-12-31"', "1"],
        ['"2023-02-29"', '"1900-02-29"', '"2000-13-01"', '"0000-01-01"'],
    ),
    ({"type": "string", "format": "ipv4"}, ['"0.0.0.0"', '"255.249.19.9"'], ['"256.0.0.0"', '"1.2.3"', '"01.2.3.4"']),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_texts(tiny_gpt_oss: Model, number: int) -> None:
    """Of texts next to each other, those that fit are let through, and no others."""
    schema, fitting, others = CASES[number]
    for text in fitting:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker(["date", "ipv4"]))
        assert lets_through(tiny_gpt_oss, text, json_schema=schema), text
    for text in others:
        assert not lets_through(tiny_gpt_oss, text, json_schema=schema), text


PATTERNS = [
    *(
        "^a",
        "a$",
        "a",
        "^a$|b",
        "^(a|b1)*$",
        "^a+?1??$",
        "^a{2}$",
        "^[ab]{1,2}?$",
        "^(?:a|)b",
        "",
        "^",
        "$",
        "^$",
        "a|",
    ),
    *(
        "^\\d$",
        "^\\w+$",
        "^[\\s-]+$",
        "[^\\d]",
        "\\D\\d",
        "^\\S*$",
        "^\\W$",
        "^.$",
        "^[^a]$",
        "\\\\",
        '"',
        "^[a-]$",
        "[\\]]",
    ),
    *("\\x61", "^\\u0061\\n$", "^[\\u0061-\\u0062]$", "a.b", "^\\.$", "[.]", '^[\\n"]$', "(a)(1)", "^{$", "}", "^a]$"),
]


@pytest.mark.parametrize("pattern", sweep(PATTERNS, always=[4, 16]))
def test_patterns(tiny_gpt_oss: Model, pattern: str) -> None:
    """The strings of a regular expression are those that Python finds it in, however they are escaped."""
    strings = [
        "",
        "a",
        "b",
        "1",
        "ab",
        "aa",
        "a1",
        "b1",
        "1a",
        "-",
        " ",
        "\n",
        "a\n",
        '"',
        "\\",
        ".",
        "a.b",
        "😀",
        "é",
        "aab",
    ]
    strings += ["ba", "{", "a]", "]", "}", "\t-", "a1b1", "_"]
    for string in strings:
        expected = re.search(pattern.replace("$", "\\Z"), string, re.ASCII) is not None
        for text in {json.dumps(string), json.dumps(string, ensure_ascii=False)}:
            assert lets_through(tiny_gpt_oss, text, json_schema={"type": "string", "pattern": pattern}) == expected, (
                text
            )


LITERALS = st.none() | st.booleans() | st.integers(-200, 200) | st.text(UNUSUAL, max_size=3)


@st.composite
def fitting(draw: st.DrawFn, depth: int = 2) -> tuple[Any, Any]:
    """Draw a schema, and a value that fits it."""
    kinds = [
        "integer",
        "string",
        "enum",
        "null",
        "type",
        *(("array", "object", "anyOf", "prefix", "allOf") if depth else ()),
    ]
    kind = draw(st.sampled_from(kinds))
    if kind == "integer":
        low, value, high = sorted(draw(st.lists(st.integers(-2000, 2000), min_size=3, max_size=3)))
        bounds = {"minimum": low, "exclusiveMaximum": high + 1}
        return {"type": kind, **{k: v for k, v in bounds.items() if draw(st.booleans())}}, value
    if kind == "string":
        text = draw(st.text(UNUSUAL, max_size=4))
        limits = {"minLength": draw(st.integers(0, len(text))), "maxLength": draw(st.integers(len(text), 5))}
        return {"type": kind, **limits}, text
    if kind == "enum":
        values = draw(st.lists(LITERALS | st.lists(LITERALS, max_size=2), min_size=1, max_size=4))
        return {"enum": values}, draw(st.sampled_from(values))
    if kind == "type":
        several = draw(st.lists(st.booleans() | st.floats(-1e9, 1e9) | st.text(UNUSUAL, max_size=3), min_size=1))
        return {"type": ["string", "boolean", "number"]}, several[0]
    if kind == "array":
        schema, value = draw(fitting(depth - 1))
        n = draw(st.integers(0, 3))
        return {"type": kind, "items": schema, "minItems": draw(st.integers(0, n)), "maxItems": n}, [value] * n
    if kind == "prefix":
        parts = draw(st.lists(fitting(depth - 1), min_size=1, max_size=3))
        schema = {"type": "array", "prefixItems": [schema for schema, _ in parts], "items": False}
        return schema, [part for _, part in parts[: draw(st.integers(0, len(parts)))]]
    if kind == "object":
        named = draw(st.dictionaries(st.text(UNUSUAL, max_size=2), fitting(depth - 1), max_size=4))
        required = draw(st.lists(st.sampled_from(sorted(named)), unique=True)) if named else []
        others, other = draw(fitting(0))
        more = draw(st.lists(st.text("ab\\😀", max_size=3), max_size=2)) if draw(st.booleans()) else None
        members = {name: part for name, (_, part) in named.items() if name in required or draw(st.booleans())}
        members |= {name: other for name in more or () if name not in named}
        properties = {name: schema for name, (schema, _) in named.items()}
        schema = {"type": kind, "properties": properties, "required": required}
        return {**schema, "additionalProperties": False if more is None else others}, members
    if kind == "anyOf":
        parts = draw(st.lists(fitting(depth - 1), min_size=1, max_size=3))
        return {"anyOf": [schema for schema, _ in parts]}, draw(st.sampled_from([value for _, value in parts]))
    if kind == "allOf":
        schema, value = draw(fitting(depth - 1))
        return {"allOf": [{"$ref": "#/$defs/a~1"}, {}], "$defs": {"a/": schema}}, value
    return {"type": kind}, None


def inlined(schema: Any) -> Any:
    """Return the schema with the only kind of reference that these have replaced, wherever it was nested."""
    if isinstance(schema, dict):
        if "allOf" in schema and "$defs" in schema:
            return {"allOf": [inlined(schema["$defs"]["a/"]), {}]}
        return {name: inlined(part) for name, part in schema.items()}
    return [inlined(part) for part in schema] if isinstance(schema, list) else schema


def check_schema(model: Model, case: tuple[Any, Any], other: tuple[Any, Any], seed: int) -> None:
    """Check a value that fits, one that may, and what a model says."""
    schema = case[0] if "$defs" in case[0] and "$defs" not in json.dumps(case[0]["$defs"]) else inlined(case[0])
    judge = jsonschema.Draft202012Validator(schema)
    for ascii_only, indent in ((True, None), (False, 1)):
        text = json.dumps(case[1], ensure_ascii=ascii_only, indent=indent)
        assert judge.is_valid(case[1])
        assert lets_through(model, text, json_schema=schema), (schema, text)
    text = json.dumps(other[1])
    if lets_through(model, text, json_schema=schema):
        assert judge.is_valid(other[1]), (schema, text)
    ends = [
        i
        for i in range(model.n_vocab)
        if re.fullmatch(rb'["}\]:0]', model.token_bytes(i)) or model.is_end_of_generation(i)
    ]

    def close(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        logits[ends] += 0.1 * len(tokens)

    said = model.generate([1, 2], json_schema=schema, max_tokens=150, seed=seed, logits_processors=[close])
    if said.stats.stop_reason == StopReason.EOS:
        assert judge.is_valid(json.loads(said.text)), (schema, said.text)


@given(fitting(), fitting(), st.integers(0, 1000))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_schemas(tiny_gpt_oss: Model, case: tuple[Any, Any], other: tuple[Any, Any], seed: int) -> None:
    """What fits is let through, and what is let through fits."""
    check_schema(tiny_gpt_oss, case, other, seed)


@pytest.mark.slow
@given(fitting(3), fitting(3), st.integers(0, 1000))
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_many_schemas(tiny_gpt_oss: Model, case: tuple[Any, Any], other: tuple[Any, Any], seed: int) -> None:
    """The same, deeper."""
    check_schema(tiny_gpt_oss, case, other, seed)


@st.composite
def schemas_within_themselves(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    """Draw a schema that may require itself, or a name that must not be there."""
    kinds = ["null", "#", "#/$defs/d", *(("object", "array", "anyOf") if depth else ())]
    kind = draw(st.sampled_from(kinds))
    inner = schemas_within_themselves(depth - 1)
    if kind.startswith("#"):
        return {"$ref": kind}
    if kind == "object":
        properties = draw(st.dictionaries(st.sampled_from("ab"), inner, max_size=2))
        required = draw(st.lists(st.sampled_from("abc"), unique=True, max_size=2))
        others = draw(st.just(False) | inner)
        return {"type": kind, "properties": properties, "required": required, "additionalProperties": others}
    if kind == "array":
        return {"type": kind, "items": draw(inner), "minItems": draw(st.integers(0, 2))}
    if kind == "anyOf":  # not of references: jsonschema would follow one that comes back without end
        return {kind: draw(st.lists(inner.filter(lambda part: "$ref" not in part), min_size=1, max_size=2))}
    return {"type": kind}


def small_values(depth: int = 2) -> list[Any]:
    """Return all values of these names that are nested so deep."""
    inner = small_values(depth - 1) if depth else []
    objects = [{name: value} for name in "abc" for value in inner]
    pairs = [{p: v, q: w} for p, q in ("ab", "ac", "bc") for v in inner[:6] for w in inner[:6]]
    return [None, {}, [], *([value] * n for value in inner for n in (1, 2)), *objects, *pairs]


@given(schemas_within_themselves(), schemas_within_themselves(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_schemas_within_themselves(tiny_gpt_oss: Model, schema: Any, other: Any, seed: int) -> None:
    """What can end is written to its end; of what cannot, the error names a place that no small value fits."""
    schema = {**schema, "$defs": {"d": other}}
    judge = jsonschema.Draft202012Validator(schema)
    refusal = ""
    try:
        grammar_of_json_schema(schema)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        place = re.fullmatch("json_schema: (#[^:]*): (.*), so nothing fits", refusal)
        assert place or "refers to itself and says nothing else" in refusal
        where = {"$ref": place[1] if place else "#"}
        for value in small_values() if place else ():
            assert any(judge.descend(value, where)), (refusal, value)
        return
    ends = [i for i in range(tiny_gpt_oss.n_vocab) if re.fullmatch(rb"[}\]nul]|null", tiny_gpt_oss.token_bytes(i))]

    def close(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        logits[[*ends, end_of(tiny_gpt_oss)]] += 0.3 * len(tokens)

    said = tiny_gpt_oss.generate([1, 2], json_schema=schema, max_tokens=60, seed=seed, logits_processors=[close])
    if said.stats.stop_reason == StopReason.EOS:
        judge.validate(json.loads(said.text))


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "required": ["x"], "additionalProperties": False}, "#: required 'x' must not be there"),
        ({"properties": {"a": False}, "required": ["a"]}, "#: required 'a' must not be there"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "#/items: it has no value that ends"),
        (
            {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}},
            "#/$defs/n/properties/n: it has no value that ends",
        ),
        (
            {"properties": {"a": {"type": "string", "pattern": "[^\\s\\S]"}}, "required": ["a"]},
            "#/properties/a: it has no value that ends",
        ),
    ],
)
def test_schemas_that_nothing_fits(tiny_gpt_oss: Model, schema: Any, place: str) -> None:
    """The error names the place, wherever the schema is given."""
    for use in (grammar_of_json_schema, lambda schema: tiny_gpt_oss.stream([1], json_schema=schema)):
        with pytest.raises(ValueError, match=re.escape(f"json_schema: {place}, so nothing fits")):
            use(schema)


@pytest.mark.parametrize(
    ("grammar", "fitting", "others"),
    [
        ('root ::= root "a" | "b"', ["b", "baa"], ["", "ab", "a"]),
        (
            'root ::= "a" root "b" | "a" root "c" | ""',
            ["", "aabc", "a" * 60 + "bc" * 30],
            ["aba", "aab"],
        ),
        ('root ::= root root | "a" | ""', ["", "a" * 40], ["b"]),
        ('root ::= ([a-z] | [a-z0-9] | "a" | .)* "!"', ["!", "a1" * 60 + "!"], ["a"]),
        ('root ::= (("a"*)*)* "b"', ["b", "a" * 80 + "b"], ["c"]),
        ('root ::= "a"{5000}', [], ["a" * 500]),
        ('root ::= "a"{0,100000} "b"', ["a" * 100 + "b", "b"], ["a"]),
        ('root ::= x{2}{2}\nx ::= "a"?', ["", "aaaa"], ["aaaaa"]),
        ("root ::= [^a]", ["b", "é", "\U0010ffff"], ["a", "", "bb"]),
        ('root ::= "é" [à-ë] . | "\\x41\\u00e9\\U0001F600"', ["ééé", "éà😀", "Aé😀"], ["éa", "é"]),
        ("root ::= " + "(" * 400 + '"a"' + ")" * 400, ["a"], ["b"]),
        ('root ::= "a" | b "c"\nb ::= b', ["a"], ["c", ""]),
    ],
)
def test_grammars(tiny_gpt_oss: Model, grammar: str, fitting: list[str], others: list[str]) -> None:
    """Whatever a grammar's form, exactly its texts come through: ambiguous, left recursive, with many repetitions."""
    for text in fitting:
        assert lets_through(tiny_gpt_oss, text, grammar=grammar), text
    for text in others:
        assert not lets_through(tiny_gpt_oss, text, grammar=grammar), text


@pytest.mark.parametrize(
    "bad", [b"\xf4\x90\x80\x80", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe0\x80\x80", b"\xff", b"\x80", b"\xf0\x8f"]
)
def test_bytes_that_are_no_characters(tiny_gpt_oss: Model, bad: bytes) -> None:
    """They are refused at the first byte that no character has there."""
    at = iter([token_of_bytes(tiny_gpt_oss)[bytes([byte])] for byte in bad])

    def say(logits: NDArray[np.float32], before: NDArray[np.int32]) -> int:
        return next(at)

    with pytest.raises(ValueError, match="not a token that the grammar allows here"):
        list(tiny_gpt_oss.stream([1, 2], sampler=say, grammar="root ::= .*", max_tokens=len(bad)))
