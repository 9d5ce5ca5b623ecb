"""Grammars from JSON schemas, by llama.cpp's converter; anything that it would ignore in silence is an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from overspill._core import grammar_of_json_schema as native_grammar_of_json_schema
from overspill.base.checks import as_json, as_text, shown

__all__ = ["checked_schema", "grammar_of_json_schema"]

# Keywords that do not change which values fit.
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
# Keywords that stand alone, apart from a type that agrees with them.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
_FORMATS = ("date", "time", "date-time", "uuid")


def grammar_of_json_schema(schema: str | Mapping[str, Any] | bool) -> str:
    """Return a grammar in GBNF whose texts are JSON that fits ``schema``; not every such text need be in it.

    ``oneOf`` counts as ``anyOf``, as llama.cpp's converter takes it.

    Raises
    ------
    ValueError
        ``schema`` is no JSON schema, or llama.cpp's grammars cannot hold a part of it; the message says where.
    """
    return native_grammar_of_json_schema(checked_schema(schema))


def checked_schema(schema: str | Mapping[str, Any] | bool) -> str:
    """Return the schema in JSON for llama.cpp's converter; errors as for :func:`grammar_of_json_schema`."""
    if not isinstance(schema, str | Mapping | bool):
        raise TypeError(f"json_schema must be a JSON schema, as a mapping or as JSON, not {shown(schema)}")
    text = as_text("json_schema", schema) if isinstance(schema, str) else as_json("json_schema", _plain(schema))
    try:
        root = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"json_schema: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("json_schema is nested too deeply") from None
    except ValueError as error:  # a number of too many digits
        raise ValueError(f"json_schema: {error}") from None
    try:
        _check(root, "#", root)
        return as_json("json_schema", root)
    except RecursionError:
        raise ValueError("json_schema is nested too deeply") from None


def _plain(schema: Mapping[str, Any] | bool) -> dict[str, Any] | bool:
    return dict(schema) if isinstance(schema, Mapping) else schema


def _refuse(where: str, why: str) -> ValueError:
    return ValueError(f"json_schema: {where}: {why} by llama.cpp's grammars; overspill.guidance may know it")


def _check(schema: object, where: str, root: object) -> None:
    if not isinstance(schema, dict):
        return
    for keyword in ("$defs", "definitions"):
        _check_all(schema.get(keyword), f"{where}/{keyword}", root)
    keywords = {keyword for keyword in schema if keyword not in _ANNOTATIONS}
    alone = next((keyword for keyword in _ALONE if keyword in keywords), None)
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if alone is not None:
        allowed, beside = frozenset((alone, "type")), f" beside {alone}"
    elif kinds:
        known = [_BY_TYPE[kind] for kind in kinds if isinstance(kind, str) and kind in _BY_TYPE]
        if len(known) < len(kinds):
            return  # the converter's error names the type and the place
        allowed, beside = frozenset(("type",)).union(*known), f" for {' or '.join(kinds)}"
        if "number" in kinds:
            allowed -= _BY_TYPE["integer"]
    else:
        # Without a type, the converter takes keywords of objects or arrays for one of them.
        kinds = [kind for kind in ("object", "array") if keywords & _BY_TYPE[kind] - {"minItems", "maxItems"}][:1]
        allowed, beside = frozenset().union(*(_BY_TYPE[kind] for kind in kinds)), " without a type"
    for keyword in sorted(keywords - allowed):
        raise _refuse(where, f"{keyword}{beside} is not supported")
    if alone is None:
        _check_object(schema, where, root)
        _check_array(schema, where, root)
        _check_string(schema, where)
        _check_bounds(schema, where)
        return
    parts = schema[alone]
    if alone in ("anyOf", "oneOf", "allOf"):
        _check_all(parts, f"{where}/{alone}", root)
    if alone == "allOf" and isinstance(parts, list):
        _check_all_of([_resolved(part, root) for part in parts], where, may_be_enum="type" not in schema)
    if "type" in schema and not _agrees(alone, parts, kinds):
        raise _refuse(where, f"a type beside {alone} that does not follow from it is not supported")


def _check_all(parts: object, where: str, root: object) -> None:
    named = parts.items() if isinstance(parts, dict) else enumerate(parts) if isinstance(parts, list) else ()
    for name, part in named:
        _check(part, f"{where}/{name}", root)


def _resolved(schema: object, root: object) -> dict[str, Any]:
    """Return the schema that a part refers to; {} if the reference leads nowhere."""
    for _ in range(100):  # a reference may lead to itself
        if not isinstance(schema, dict):
            break
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = root
        for name in reference.split("/")[1:]:
            schema = schema.get(name) if isinstance(schema, dict) else None
    return {}


def _check_all_of(parts: list[dict[str, Any]], where: str, may_be_enum: bool) -> None:
    """Check the parts of ``allOf``: the converter puts the properties of all into one object."""
    if len(parts) == 1 and "enum" in parts[0] and may_be_enum:
        return
    properties: set[str] = set()
    for part in parts:
        of_part = part.get("properties", {})
        if part.get("type", "object") != "object" or "properties" not in part or not isinstance(of_part, dict):
            raise _refuse(where, "allOf anything but objects with properties is not supported")
        if len(parts) > 1 and part.get("additionalProperties", True) is not True:
            raise _refuse(where, "additionalProperties in allOf is not supported")
        if properties & set(of_part):
            raise _refuse(where, f"the property {min(properties & set(of_part))!r} twice in allOf is not supported")
        properties |= set(of_part)


def _agrees(alone: str, parts: object, kinds: list[Any]) -> bool:
    """Return whether the type says nothing new: beside these keywords, the converter ignores it."""
    if alone == "allOf":
        return kinds == ["object"]
    if alone in ("anyOf", "oneOf"):
        return isinstance(parts, list) and all(isinstance(part, dict) and part.get("type") in kinds for part in parts)
    values = [parts] if alone == "const" else parts
    return alone != "$ref" and isinstance(values, list) and all(_kinds_of(value) & set(kinds) for value in values)


def _kinds_of(value: object) -> set[str]:
    if isinstance(value, bool) or value is None:
        return {"null"} if value is None else {"boolean"}
    if isinstance(value, int | float):
        return {"integer", "number"} if float(value).is_integer() else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}


def _check_object(schema: dict[str, Any], where: str, root: object) -> None:
    properties = schema.get("properties", {})
    _check_all(properties, f"{where}/properties", root)
    _check(schema.get("additionalProperties"), f"{where}/additionalProperties", root)
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"json_schema: {where}: required must be a list of strings")
    for name in required:
        if isinstance(properties, dict) and name not in properties:
            raise _refuse(where, f"required {name!r} that is none of the properties is not supported")


def _check_array(schema: dict[str, Any], where: str, root: object) -> None:
    if {"items", "prefixItems"} <= set(schema):
        raise _refuse(where, "items beside prefixItems is not supported")
    low, high = _range(schema, "minItems", "maxItems", where)
    items = schema.get("prefixItems", schema.get("items"))
    if not isinstance(items, list):
        _check(items, f"{where}/items", root)
        return
    # The grammar has exactly these items.
    _check_all(items, f"{where}/{'prefixItems' if 'prefixItems' in schema else 'items'}", root)
    if not low <= len(items) <= high:
        raise _refuse(where, f"more or fewer items than the {len(items)} that are named are not supported")


def _range(schema: dict[str, Any], least: str, most: str, where: str) -> tuple[int, int]:
    """Return two counts; the converter reads 32 bits."""
    for keyword in (least, most):
        count = schema.get(keyword, 0)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**31:
            raise ValueError(f"json_schema: {where}: {keyword} must be an integer from 0 to 2147483647, not {count!r}")
    low, high = schema.get(least, 0), schema.get(most, 2**31 - 1)
    if low > high:
        raise ValueError(f"json_schema: {where}: {least} is more than {most}, so nothing fits")
    return low, high


def _check_bounds(schema: dict[str, Any], where: str) -> None:
    if sum(keyword in schema for keyword in ("minimum", "exclusiveMinimum")) > 1:
        raise _refuse(where, "exclusiveMinimum beside minimum is not supported")
    if sum(keyword in schema for keyword in ("maximum", "exclusiveMaximum")) > 1:
        raise _refuse(where, "exclusiveMaximum beside maximum is not supported")
    for keyword in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        bound = schema.get(keyword, 0)
        # The converter reads 64 bits, and takes the largest and the smallest for no bound.
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not abs(bound) < 2**62:
            raise ValueError(f"json_schema: {where}: {keyword} must be a number under 2**62, not {bound!r}")
    low = max(math.ceil(schema.get("minimum", -(2**63))), math.floor(schema.get("exclusiveMinimum", -(2**63))) + 1)
    high = min(math.floor(schema.get("maximum", 2**63)), math.ceil(schema.get("exclusiveMaximum", 2**63)) - 1)
    if low > high:
        raise ValueError(f"json_schema: {where}: no integer is within the bounds")


def _check_string(schema: dict[str, Any], where: str) -> None:
    _range(schema, "minLength", "maxLength", where)
    given: list[str] = [keyword for keyword in ("pattern", "format") if keyword in schema]
    given += ["a length"] if {"minLength", "maxLength"} & set(schema) else []
    if len(given) > 1:
        raise _refuse(where, f"{given[1]} beside {given[0]} is not supported")
    if "format" in schema and schema["format"] not in _FORMATS:
        raise _refuse(where, f"the format {schema['format']!r} is not supported")
    if isinstance(schema.get("pattern"), str):
        try:
            schema["pattern"] = _pattern_in_json(schema["pattern"])
            native_grammar_of_json_schema(json.dumps({"type": "string", "pattern": schema["pattern"]}))
        except ValueError as error:
            raise ValueError(str(error).replace("json_schema: ", f"json_schema: {where}: ", 1)) from None


# A character class, or one character, escaped or not.
_PATTERN_UNIT = re.compile(
    r"\[(?P<negated>\^?)(?P<items>(?:\\.|[^\]\\])*)\]"
    r"|\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<escaped>.))|.",
    re.DOTALL,
)
# Characters that JSON has only escaped, as items of a character class; and all others, as code points.
_ESCAPED_ITEMS = r'"\\\x00-\x1F'
_UNESCAPED = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x10FFFF))


def _pattern_in_json(pattern: str) -> str:
    """Return a pattern of the JSON text, with its escapes: the converter matches that, and not the string."""
    return _PATTERN_UNIT.sub(_unit_in_json, pattern)


def _unit_in_json(unit: re.Match[str]) -> str:
    text = unit[0]
    if text == ".":
        return f"[^{_ESCAPED_ITEMS}]"
    if unit["items"] is None:
        code = _code_of(unit)
        if code > 0x10FFFF:
            raise ValueError(f"json_schema: the pattern's {text} is no character")
        character = chr(code)
        in_json = json.dumps(character, ensure_ascii=False)[1:-1]
        return text if in_json == character else "(?:" + in_json.replace("\\", "\\\\") + ")"
    if unit["negated"]:
        return f"[^{_ESCAPED_ITEMS}{unit['items']}]"
    ranges = _ranges_of(unit["items"])
    # Characters that would have to be escaped are left out.
    kept = [(max(low, a), min(high, b)) for low, high in ranges for a, b in _UNESCAPED if low <= b and a <= high]
    if kept == ranges:
        return text
    if not kept:
        raise ValueError(
            f"json_schema: the pattern's {text}, all escaped in JSON, is not supported by llama.cpp's grammars"
        )
    return "[" + "".join(f"\\U{low:08X}-\\U{high:08X}" for low, high in kept) + "]"


def _ranges_of(items: str) -> list[tuple[int, int]]:
    units = list(_PATTERN_UNIT.finditer(items))
    ranges = []
    while units:
        low = high = _code_of(units.pop(0))
        if len(units) > 1 and units[0][0] == "-":
            high = _code_of(units[1])
            del units[:2]
        ranges.append((low, high))
    return ranges


def _code_of(unit: re.Match[str]) -> int:
    if code := unit["x"] or unit["u"] or unit["U"]:
        return int(code, 16)
    character: str = unit["escaped"] or unit[0]
    if unit["escaped"] and character in "nrt":
        return ord({"n": "\n", "r": "\r", "t": "\t"}[character])
    if unit["escaped"] and character.isalnum():
        raise ValueError(f"json_schema: the pattern's {unit[0]} is not supported by llama.cpp's grammars")
    return ord(character)
