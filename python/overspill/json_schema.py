"""JSON schemas as llama.cpp's grammars can hold them: what its converter would leave out in silence is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from overspill import _core

__all__ = ["grammar_of_json_schema"]

# They say nothing about what fits.
_ANNOTATIONS = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$schema", "$id", "$anchor", "$comment", "$defs", "definitions"),
    )
)
_BY_TYPE = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "string": frozenset(("pattern", "format", "minLength", "maxLength")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
# Of these, one stands alone; a type beside it has to be right, but need not be looked at.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
_FORMATS = ("date", "time", "date-time", "uuid")


def grammar_of_json_schema(schema: str | Mapping[str, Any] | bool) -> str:
    """Return a grammar in GBNF, whose texts are JSON that fits ``schema``, though it may have fewer than do fit.

    Raises
    ------
    ValueError
        It is no JSON schema, or has something that llama.cpp's grammars cannot hold; the message says where.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        _check(json.loads(text), "#")
    except json.JSONDecodeError as error:
        raise ValueError(f"json_schema: line {error.lineno}, column {error.colno}: {error.msg}") from None
    return _core.grammar_of_json_schema(text)


def _refuse(where: str, why: str) -> ValueError:
    return ValueError(f"json_schema: {where}: {why} by llama.cpp's grammars; overspill.guidance may know it")


def _check(schema: object, where: str) -> None:
    if not isinstance(schema, dict):
        return
    for keyword in ("$defs", "definitions"):
        _check_all(schema.get(keyword), f"{where}/{keyword}")
    keywords = {keyword for keyword in schema if keyword not in _ANNOTATIONS}
    alone = next((keyword for keyword in _ALONE if keyword in keywords), None)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if alone is not None:
        allowed, beside = frozenset((alone, "type")), f" beside {alone}"
    elif kinds:
        known = [_BY_TYPE[kind] for kind in kinds if isinstance(kind, str) and kind in _BY_TYPE]
        if len(known) < len(kinds):
            return  # the converter says that it does not know the type, and where
        allowed, beside = frozenset(("type",)).union(*known), f" for {' or '.join(kinds)}"
        if "number" in kinds:
            allowed -= _BY_TYPE["integer"]
    else:
        # What objects and arrays alone have is taken for one of them.
        kinds = [kind for kind in ("object", "array") if keywords & _BY_TYPE[kind]][:1]
        allowed, beside = frozenset().union(*(_BY_TYPE[kind] for kind in kinds)), " without a type"
    for keyword in sorted(keywords - allowed):
        raise _refuse(where, f"{keyword}{beside} is not supported")
    for keyword in ("anyOf", "oneOf", "allOf"):
        _check_all(schema.get(keyword), f"{where}/{keyword}")
    if alone is None:
        _check_object(schema, where)
        _check_array(schema, where)
        _check_string(schema, where)


def _check_all(parts: object, where: str) -> None:
    named = parts.items() if isinstance(parts, dict) else enumerate(parts) if isinstance(parts, list) else ()
    for name, part in named:
        _check(part, f"{where}/{name}")


def _check_object(schema: dict[str, Any], where: str) -> None:
    properties = schema.get("properties", {})
    _check_all(properties, f"{where}/properties")
    _check(schema.get("additionalProperties"), f"{where}/additionalProperties")
    for name in schema.get("required", []):
        if isinstance(properties, dict) and name not in properties:
            raise _refuse(where, f"required {name!r} that is none of the properties is not supported")


def _check_array(schema: dict[str, Any], where: str) -> None:
    items = schema.get("prefixItems", schema.get("items"))
    if not isinstance(items, list):
        _check(items, f"{where}/items")
        return
    # The grammar has exactly these.
    _check_all(items, f"{where}/{'prefixItems' if 'prefixItems' in schema else 'items'}")
    if not schema.get("minItems", 0) <= len(items) <= schema.get("maxItems", len(items)):
        raise _refuse(where, f"more or fewer items than the {len(items)} that are named are not supported")


def _check_string(schema: dict[str, Any], where: str) -> None:
    given: list[str] = [keyword for keyword in ("pattern", "format") if keyword in schema]
    given += ["a length"] if {"minLength", "maxLength"} & set(schema) else []
    if len(given) > 1:
        raise _refuse(where, f"{given[1]} beside {given[0]} is not supported")
    if "format" in schema and schema["format"] not in _FORMATS:
        raise _refuse(where, f"the format {schema['format']!r} is not supported")
    if isinstance(schema.get("pattern"), str):
        try:
            _core.grammar_of_json_schema(json.dumps({"type": "string", "pattern": schema["pattern"]}))
        except ValueError as error:
            raise ValueError(str(error).replace("json_schema: ", f"json_schema: {where}: ", 1)) from None
