"""Writes the rules of a grammar for one JSON schema."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any
from urllib.parse import unquote

from overspill.sampling.json_text import GrammarText, UnsupportedError, pattern_expression

__all__ = ["Arguments", "NothingFitsError", "schema_text", "write_arguments", "write_schema"]

Node = tuple[str, dict[str, Any]]  # a schema, and where it is


@dataclass(frozen=True, slots=True)
class Summary:
    """What is sure of the values that a grammar makes of a schema."""

    kinds: set[str]
    """Their types."""
    stated_kinds: set[str]
    """Types that the schema itself allows."""
    values: set[str] | None
    """All of them, in canonical JSON; None if they are not listed."""
    tags: dict[str, set[str]]
    """The values of required properties that have a list of them."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The rules for the arguments of a tool."""

    rule: str
    """The name of the rule for all of them, as an object."""
    parameters: dict[str, tuple[str, set[str]]]
    """The names of the rules for each one's values, and the types of these."""
    required: list[str]


_MOST_COUNT = 100_000
_MOST_RULES = 50_000
_MOST_COMBINED = 100_000
_MOST_DIGITS = 100
_OBJECT: dict[str, Any] = {"type": "object"}
_EMPTY_OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": False}
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# What a grammar holds, by the type that it speaks of.
_HELD = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "integer": _BOUNDS,
}
# What it does not. Whatever is in neither table is an annotation, as JSON Schema says of unknown keywords.
_REFUSED: dict[str, tuple[str, ...]] = {
    "object": (
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"),
        *("dependencies", "dependentRequired", "dependentSchemas"),
    ),
    "array": ("uniqueItems", "contains", "unevaluatedItems"),
    "integer": ("multipleOf", "divisibleBy"),
    "number": (*_BOUNDS, "multipleOf", "divisibleBy"),
}
_REFUSED_ALWAYS = ("not", "then", "else", "$dynamicRef", "$recursiveRef", "disallow", "extends", "nullable")
# Values with which they say nothing.
_SAYS_NOTHING: dict[str, tuple[object, ...]] = {
    "patternProperties": ({},),
    "propertyNames": (True, {}),
    "minProperties": (0,),
    "unevaluatedProperties": (True, {}),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "uniqueItems": (False,),
    "unevaluatedItems": (True, {}),
    "not": (False,),
    "nullable": (False,),
}
_FORMATS = {
    "date": "date",
    "time": "time",
    "date-time": "date [Tt] time",
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
    "ipv4": 'byte ("." byte){3}',
}
# Formats that JSON Schema defines; others are annotations.
_REFUSED_FORMATS = frozenset(
    (
        *("email", "idn-email", "hostname", "idn-hostname", "ipv6", "uri", "uri-reference", "iri", "iri-reference"),
        *("uri-template", "json-pointer", "relative-json-pointer", "regex", "duration"),
    )
)
_COMMON = {
    "space": r'| " " | "\n"{1,2} [ \t]{0,20}',
    "integer": '"-"? ("0" | [1-9] [0-9]*)',
    "number": 'integer ("." [0-9]+)? ([eE] [-+]? [0-9]+)?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "string": r'"\"" char* "\""',
    "array": '"[" space (value ("," space value)*)? space "]"',
    "object": '"{" space (member ("," space member)*)? space "}"',
    "member": 'string space ":" space value',
    "value": "object | array | string | number | boolean | null",
    "hex": "[0-9a-fA-F]",
    "byte": '[0-9] | [1-9] [0-9] | "1" [0-9] [0-9] | "2" [0-4] [0-9] | "25" [0-5]',
    "time": 'hour ":" minute ":" minute ("." [0-9]+)? ([Zz] | [-+] hour ":" minute)',
    "hour": '[01] [0-9] | "2" [0-3]',
    "minute": "[0-5] [0-9]",
    "date": (
        'year "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
        ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]))'
        ' | leap "-02-29"'
    ),
    "year": '"000" [1-9] | "00" [1-9] [0-9] | "0" [1-9] [0-9] [0-9] | [1-9] [0-9] [0-9] [0-9]',
    "leap": ('[0-9] [0-9] ("0" [48] | [2468] [048] | [13579] [26]) | ("0" [48] | [2468] [048] | [13579] [26]) "00"'),
    "nothing": "nothing",
}


# All keywords that say which values fit without referring to other schemas for the same value.
_ASSERTIONS = frozenset(
    ("type", "enum", "const", *(word for table in (_HELD, _REFUSED) for words in table.values() for word in words))
)
# Keywords with schemas in them: one, in a list, by name.
_WITH_SCHEMA = ("additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains")
_WITH_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_WITH_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def schema_text() -> GrammarText:
    """Return what collects the rules of schemas."""
    return GrammarText(_COMMON, _MOST_RULES)


def write_schema(schema: Any, text: GrammarText) -> str:
    """Write the rules of a parsed schema; return the name of the one that they start with."""
    return _Writer(schema, text).start()


def write_arguments(schema: Any, text: GrammarText) -> Arguments:
    """Write the rules for the arguments of a tool, which are an object."""
    return _Writer(schema, text).arguments()


def _refuse(where: str, what: str) -> ValueError:
    return UnsupportedError(f"json_schema: {where}: {what} is not supported; overspill.guidance may know it")


class NothingFitsError(ValueError):
    """No value fits a schema, or a combination of parts of it."""


def _nothing_fits(where: str, why: str) -> ValueError:
    return NothingFitsError(f"json_schema: {where}: {why}, so nothing fits")


def _wrong(where: str, keyword: str, wanted: str, value: object) -> ValueError:
    given = repr(value)
    return ValueError(f"json_schema: {where}: {keyword} must be {wanted}, not {given[:60]}")


class _Writer:
    """Writes one schema's rules; no call of its own for parts within parts, however deep."""

    def __init__(self, root: Any, text: GrammarText) -> None:
        self.root = root
        self.text = text
        self.names: dict[tuple[int, ...], str] = {}
        self.places: dict[str, str] = {}  # of rules: where their schema is
        self.n_combined = 0
        self.todo: list[tuple[str, list[Node]]] = []
        self.bare: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # without what refers to other schemas

    def start(self, also: dict[str, Any] | None = None) -> str:
        """Write all rules, and return the name of the one that they start with; what fits, fits ``also`` as well."""
        _check_forms(self.root)
        start = self.rule([("#", self.root), *([] if also is None else [("#", also)])])
        if start == "fits-nothing":
            raise _nothing_fits("#", "it is false")
        self.write()
        self.check_end(start)
        return start

    def arguments(self) -> Arguments:
        root = self.root
        says_more = any(keyword in root for keyword in ("additionalProperties", "$ref", "allOf", "anyOf", "oneOf"))
        start = self.start(_EMPTY_OBJECT if root.get("properties") == {} and not says_more else _OBJECT)
        flattened = self.flattened([("#", root)])
        nodes = flattened[0] if flattened is not None else []
        parameters = {
            name: (self.rule(parts), self.kinds(parts))
            for name, parts in self.properties(nodes)[0].items()
            if all(part is not False for _, part in parts)
        }
        self.write()
        endless = self.check_end(start)
        return Arguments(
            start,
            {name: found for name, found in parameters.items() if found[0] not in endless},
            [name for where, schema in nodes for name in _required(where, schema)],
        )

    def kinds(self, nodes: list[tuple[str, Any]], above: frozenset[int] = frozenset()) -> set[str]:
        """Return the types that values which fit may have."""
        flattened = self.flattened(nodes)
        if flattened is None:
            return set()
        flat, choices = flattened
        kinds = _kinds(flat, _common_values(flat))
        for where, keyword, parts in choices:
            named = [(f"{where}/{keyword}/{i}", part) for i, part in enumerate(parts) if id(part) not in above]
            kinds &= {kind for one in named for kind in self.kinds([one], above | {id(one[1])})}
        return kinds

    def write(self) -> None:
        """Define the rules that were asked for, and those that they ask for."""
        while self.todo:
            name, nodes = self.todo.pop()
            try:
                self.text.define(name, self.expression(nodes))
            except NothingFitsError:
                # Within one schema it is a mistake. A combination of several may be one of many.
                if sum(schema is not _OBJECT for _, schema in nodes) == 1:
                    raise
                self.text.define(name, self.text.use("nothing"))

    def check_end(self, start: str) -> set[str]:
        """Raise an error that names the schema if only values without an end fit; return all such rules."""
        endless = self.text.endless()
        if start in endless:
            where, at, seen = "#", start, {start}
            while left := [name for name in endless[at] if name not in seen]:
                at = left[0]
                seen.add(at)
                where = self.places.get(at, where)
            raise _nothing_fits(where, "it has no value that ends")
        return set(endless)

    def rule(self, parts: Iterable[tuple[str, Any]]) -> str:
        """Return the name of the rule for values that fit all of these schemas."""
        nodes: dict[int, Node] = {}
        for where, schema in parts:
            if schema is False:
                return self.text.use("nothing")
            if schema is not True and not isinstance(schema, dict):
                raise ValueError(f"json_schema: {where}: a schema must be an object or a boolean, not {schema!r:.60}")
            if schema is not True and schema != {}:
                nodes.setdefault(id(schema), (where, schema))
        if not nodes:
            return self.text.use("value")
        key = tuple(nodes)
        if key not in self.names:
            self.names[key] = self.text.new_name()
            self.places[self.names[key]] = next(iter(nodes.values()))[0]
            self.n_combined += len(nodes)
            if self.n_combined > _MOST_COMBINED:
                raise ValueError(f"json_schema: {next(iter(nodes.values()))[0]}: it combines too many schemas")
            self.todo.append((self.names[key], list(nodes.values())))
        return self.names[key]

    # What refers to other schemas

    def flattened(self, nodes: Iterable[tuple[str, Any]]) -> tuple[list[Node], list[tuple[str, str, list[Any]]]] | None:
        """Return schemas that refer to no others, and choices (where, keyword, parts); None if nothing fits."""
        flat: list[Node] = []
        choices: list[tuple[str, str, list[Any]]] = []
        seen: set[int] = set()

        def add(where: str, schema: Any, above: tuple[int, ...]) -> bool:
            if schema is False:
                return False
            if schema is True:
                return True
            if not isinstance(schema, dict):
                raise ValueError(f"json_schema: {where}: a schema must be an object or a boolean, not {schema!r:.60}")
            if id(schema) in above:
                raise ValueError(f"json_schema: {where}: it refers to itself and says nothing else")
            if id(schema) in seen:
                return True
            seen.add(id(schema))
            self.check_always(where, schema)
            flat.append((where, self.without_references(schema)))
            above = (*above, id(schema))
            if "$ref" in schema and not add(*self.target(where, schema["$ref"]), above):
                return False
            for i, part in enumerate(_parts(where, schema, "allOf")):
                if not add(f"{where}/allOf/{i}", part, above):
                    return False
            for keyword in ("anyOf", "oneOf"):
                if keyword in schema:
                    choices.append((where, keyword, _parts(where, schema, keyword)))
            return True

        for where, schema in nodes:
            if not add(where, schema, ()):
                return None
        return [node for node in flat if node[1]], choices

    def without_references(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return the schema itself, or always the same copy of it."""
        references = ("$ref", "allOf", "anyOf", "oneOf")
        if not any(keyword in schema for keyword in references):
            return schema
        if id(schema) not in self.bare:
            copy = {keyword: value for keyword, value in schema.items() if keyword in _ASSERTIONS}
            self.bare[id(schema)] = (schema, copy)
        return self.bare[id(schema)][1]

    def target(self, where: str, reference: object) -> tuple[str, Any]:
        if not isinstance(reference, str):
            raise _wrong(where, "$ref", "a string", reference)
        if reference != "#" and not reference.startswith("#/"):
            raise _refuse(where, f"$ref {reference[:60]!r}, which leads out of the schema or to an anchor,")
        schema = self.root
        for name in unquote(reference).split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, dict) and name in schema:
                schema = schema[name]
            elif isinstance(schema, list) and name.isdecimal() and int(name[:9]) < len(schema):
                schema = schema[int(name[:9])]
            else:
                raise ValueError(f"json_schema: {where}: $ref {reference[:60]!r} leads nowhere")
        return unquote(reference), schema

    def check_always(self, where: str, schema: dict[str, Any]) -> None:
        for keyword in _REFUSED_ALWAYS:
            needs_if = keyword in ("then", "else")
            if keyword in schema and _says_something(schema, keyword) and (not needs_if or "if" in schema):
                raise _refuse(where, "if" if needs_if else keyword)
        if where != "#" and isinstance(schema.get("$id"), str):
            raise _refuse(where, "$id within a schema")

    def expression(self, nodes: list[Node]) -> str:
        flattened = self.flattened(nodes)
        if flattened is None:
            return self.text.use("nothing")
        flat, choices = flattened
        if not choices:
            return self.plain(flat) if flat else self.text.use("value")
        n_combined = math.prod(len(parts) for _, _, parts in choices)
        if n_combined > _MOST_RULES:
            raise ValueError(f"json_schema: {nodes[0][0]}: more than {_MOST_RULES} combinations of parts")
        base: list[tuple[str, Any]] = [(where, schema) for where, schema in flat if _ASSERTIONS & schema.keys()]
        for where, keyword, parts in choices:
            if keyword == "oneOf":
                self.check_disjoint(where, base, parts)
        named = [
            [(f"{where}/{keyword}/{i}", part) for i, part in enumerate(parts)] for where, keyword, parts in choices
        ]
        return " | ".join(dict.fromkeys(self.rule([*base, *chosen]) for chosen in product(*named)))

    # oneOf

    def check_disjoint(self, where: str, base: list[tuple[str, Any]], parts: list[Any]) -> None:
        if len(parts) > 500:
            raise ValueError(f"json_schema: {where}: oneOf must have at most 500 parts, not {len(parts)}")
        said = [self.summary([*base, (f"{where}/oneOf/{i}", part)]) for i, part in enumerate(parts)]
        for j, b in enumerate(said):
            for i, a in enumerate(said[:j]):
                if a is not None and b is not None and not _are_disjoint(a, b):
                    raise _refuse(where, f"oneOf whose parts {i} and {j} may both fit (anyOf may)")

    def summary(self, nodes: list[tuple[str, Any]]) -> Summary | None:
        """Return what is sure of all values that fit, as far as a grammar makes them."""
        flattened = self.flattened(nodes)
        if flattened is None:
            return None
        flat = flattened[0]
        values = _common_values(flat)
        required = {name for where, schema in flat for name in _required(where, schema)}
        tags: dict[str, set[str]] = {}
        for name in required:
            parts = [
                (f"{where}/properties/{name}", schema["properties"][name])
                for where, schema in flat
                if isinstance(schema.get("properties"), dict) and name in schema["properties"]
            ]
            inner = self.flattened(parts)
            of_property = None if inner is None else _common_values(inner[0])
            if of_property is not None:
                tags[name] = set(of_property)
        stated = {"type", "enum", "const"} & {keyword for _, schema in flat for keyword in schema}
        kinds = _kinds(flat, values)
        return Summary(kinds, kinds if stated else set(_TYPES), None if values is None else set(values), tags)

    # Types

    def plain(self, nodes: list[Node]) -> str:
        """Return the expression for schemas that refer to no others."""
        values = _common_values(nodes)
        kinds = _kinds(nodes, values)
        if "number" in kinds:
            kinds -= {"integer"}
        for kind in sorted(kinds):
            of_kind = _HELD.get(kind, ()) if values is not None else ()
            for where, schema in nodes:
                for keyword in (*_REFUSED.get(kind, ()), *of_kind):
                    if keyword in schema and _says_something(schema, keyword):
                        beside = f"for {kind}" if values is None else "beside enum or const"
                        raise _refuse(where, f"{keyword} {beside}")
        if not kinds:
            raise _nothing_fits(nodes[0][0], "no type or value is left")
        if values is not None:
            return self.text.one_of([value for value in values.values() if _kind_of(value) & kinds])
        writers: dict[str, Callable[[list[Node]], str]] = {
            "object": self.object,
            "array": self.array,
            "string": self.string,
            "integer": self.integer,
        }
        return " | ".join(
            writers[kind](nodes) if kind in writers else self.text.use(kind) for kind in _TYPES if kind in kinds
        )

    def integer(self, nodes: list[Node]) -> str:
        low: int | None = None
        high: int | None = None
        for where, schema in nodes:
            for keyword in _BOUNDS:
                if keyword not in schema:
                    continue
                bound = _bound(where, keyword, schema[keyword])
                if keyword.endswith("inimum"):
                    least = math.ceil(bound) if keyword == "minimum" else math.floor(bound) + 1
                    low = least if low is None else max(low, least)
                else:
                    most = math.floor(bound) if keyword == "maximum" else math.ceil(bound) - 1
                    high = most if high is None else min(high, most)
        if low is None and high is None:
            return self.text.use("integer")
        if low is not None and high is not None and low > high:
            raise _nothing_fits(nodes[0][0], "no integer is within the bounds")
        parts = []
        if high is None or high >= 0:
            parts += _naturals(max(low or 0, 0), high)
        if low is None or low < 0:
            least = 1 if high is None or high >= 0 else -high
            parts.append(f'"-" ({" | ".join(_naturals(least, None if low is None else -low))})')
        return " | ".join(parts)

    def string(self, nodes: list[Node]) -> str:
        low, high = _counts(nodes, "minLength", "maxLength")
        said: list[tuple[str, str]] = []
        for where, schema in nodes:
            for keyword in ("pattern", "format"):
                text = schema.get(keyword)
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise _wrong(where, keyword, "a string", text)
                if keyword == "format" and text in _REFUSED_FORMATS:
                    raise _refuse(where, f"the format {text!r}")
                if (keyword == "pattern" or text in _FORMATS) and (keyword, text) not in said:
                    said.append((keyword, text))
                    if len(said) > 1:
                        raise _refuse(where, f"{keyword} beside {said[0][0]}")
                    if low > 0 or high is not None:
                        raise _refuse(where, f"a length beside {keyword}")
        if not said:
            if low == 0 and high is None:
                return self.text.use("string")
            return rf'"\"" {self.text.use("char")}{_repetition(low, high)} "\""'
        (keyword, text) = said[0]
        if keyword == "format":
            return rf'"\"" ({self.text.use_all(_FORMATS[text])}) "\""'
        where = next(where for where, schema in nodes if schema.get("pattern") == text)
        try:
            return rf'"\"" ({pattern_expression(self.text, text)}) "\""'
        except ValueError as error:
            raise type(error)(f"json_schema: {where}: pattern: {error}") from None

    def array(self, nodes: list[Node]) -> str:
        low, high = _counts(nodes, "minItems", "maxItems")
        said = [_items(where, schema) for where, schema in nodes]
        first = [
            [part for prefix, rest in said for part in (prefix[i : i + 1] or rest)]
            for i in range(max(len(prefix) for prefix, _ in said))
        ]
        others = [part for _, rest in said for part in rest]
        if (first and not others) or any(part is False for _, part in others):
            high = len(first) if high is None else min(high, len(first))
            if low > high:
                raise _nothing_fits(nodes[0][0], "minItems is more than the items that there may be")
        if not first and not others and low == 0 and high is None:
            return self.text.use("array")
        return self.items([self.rule(item) for item in first], self.rule(others), low, high)

    def items(self, first: list[str], other: str, low: int, high: int | None) -> str:
        """Return the expression for an array whose first items have rules of their own."""
        n_first = len(first) if high is None else min(len(first), high)
        # From the end: what may follow so many items.
        left = None if high is None else high - n_first
        least = max(low - n_first, 0)
        space = self.text.use("space")
        tail = "" if left == 0 else f'("," {space} {other}){_repetition(least, left)}'
        if n_first == 0:
            if left == 0:
                return f'"[" {space} "]"'
            tail = f'{other} ("," {space} {other}){_repetition(max(low - 1, 0), None if left is None else left - 1)}'
            return f'"[" {space} {tail if low > 0 else f"({tail})?"} {space} "]"'
        for i in reversed(range(n_first)):
            comma = f'"," {space} ' if i > 0 else ""
            item = f"{comma}{first[i]} {tail}".strip()
            tail = self.text.add(item if i < low else f"({item})?")
        return f'"[" {space} {tail} {space} "]"'

    def properties(
        self, nodes: list[Node]
    ) -> tuple[dict[str, list[tuple[str, Any]]], list[tuple[str, Any]], list[str], bool]:
        """Return the schemas of each property and of all others, what is required, and whether others may be there."""
        properties: dict[str, list[tuple[str, Any]]] = {}
        named: list[set[str]] = []
        others: list[tuple[str, Any]] = []
        required: list[str] = []
        for where, schema in nodes:
            own = schema.get("properties", {})
            if not isinstance(own, dict):
                raise _wrong(where, "properties", "an object", own)
            for name, part in own.items():
                properties.setdefault(name, []).append((f"{where}/properties/{name}", part))
            named.append(set(own))
            required += _required(where, schema)
        is_open = not properties
        for (where, schema), own_names in zip(nodes, named, strict=True):
            if "additionalProperties" in schema:
                is_open = True
                part = (f"{where}/additionalProperties", schema["additionalProperties"])
                others.append(part)
                for name, parts in properties.items():
                    if name not in own_names:
                        parts.append(part)
        for name in required:
            if name not in properties and not is_open:
                raise _nothing_fits(nodes[0][0], f"required {name[:60]!r} is none of the properties")
            if any(part is False for _, part in properties.setdefault(name, list(others))):
                raise _nothing_fits(nodes[0][0], f"required {name[:60]!r} must not be there")
        return properties, others, required, is_open

    def object(self, nodes: list[Node]) -> str:
        properties, others, required, is_open = self.properties(nodes)
        if not properties and not others:
            return self.text.use("object")
        members = [
            (self.member(name, parts), name in required)
            for name, parts in properties.items()
            if name in required or all(part is not False for _, part in parts)
        ]
        more = None
        if is_open and all(part is not False for _, part in others):
            key = self.text.other_strings(set(properties))
            more = f'{key} {self.text.use("space")} ":" {self.text.use("space")} {self.rule(others)}'
            more = self.text.add(more)
        return self.members(members, more)

    def member(self, name: str, parts: list[tuple[str, Any]]) -> str:
        space = self.text.use("space")
        return self.text.add(f'{self.text.one_of([name])} {space} ":" {space} {self.rule(parts)}')

    def members(self, members: list[tuple[str, bool]], more: str | None) -> str:
        """Return the expression for an object with these members in this order, and others after them."""
        space = self.text.use("space")
        # From the end: what may follow when some have come, and when none have.
        after = f'("," {space} {more})*' if more else '""'
        at_first = f'({more} ("," {space} {more})*)?' if more else '""'
        for member, is_required in reversed(members):
            name = self.text.add(after)
            if is_required:
                at_first = f"{member} {name}"
                after = f'"," {space} {member} {name}'
            else:
                at_first = f"{member} {name} | {self.text.add(at_first)}"
                after = f'("," {space} {member})? {name}'
        return f'"{{" {space} {self.text.add(at_first)} {space} "}}"'


def _check_forms(root: object) -> None:
    """Check what any schema's keywords have to be, also where nothing refers to the schema."""
    todo: list[tuple[str, object]] = [("#", root)]
    is_old = isinstance(root, dict) and re.search("draft-0|2019-09", str(root.get("$schema"))) is not None
    while todo:
        where, schema = todo.pop()
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema: {where}: a schema must be an object or a boolean, not {schema!r:.60}")
        _kinds([(where, schema)], None)
        _required(where, schema)
        _counts([(where, schema)], "minLength", "maxLength")
        _counts([(where, schema)], "minItems", "maxItems")
        for keyword in _BOUNDS:
            if keyword in schema:
                _bound(where, keyword, schema[keyword])
        for keyword in ("multipleOf", "divisibleBy"):
            if keyword in schema:
                _bound(where, keyword, schema[keyword])
        for keyword in ("pattern", "format", "$ref", "$schema"):
            if not isinstance(schema.get(keyword, ""), str):
                raise _wrong(where, keyword, "a string", schema[keyword])
        if not isinstance(schema.get("enum", []), list):
            raise _wrong(where, "enum", "a list of values", schema["enum"])
        for keyword in _WITH_SCHEMA:
            if keyword == "items" and isinstance(schema.get("items"), list):
                if not is_old:
                    raise _wrong(where, "items", "a schema (a list is prefixItems since 2020)", schema["items"])
                todo += [(f"{where}/items/{i}", part) for i, part in enumerate(schema["items"])]
            elif keyword in schema:
                todo.append((f"{where}/{keyword}", schema[keyword]))
        for keyword in _WITH_SCHEMAS:
            todo += [(f"{where}/{keyword}/{i}", part) for i, part in enumerate(_parts(where, schema, keyword))]
        for keyword in _WITH_NAMED_SCHEMAS:
            named = schema.get(keyword, {})
            if not isinstance(named, dict):
                raise _wrong(where, keyword, "an object", named)
            todo += [(f"{where}/{keyword}/{name}", part) for name, part in named.items()]


def _parts(where: str, schema: dict[str, Any], keyword: str) -> list[Any]:
    parts = schema.get(keyword, [])
    if keyword in schema and (not isinstance(parts, list) or not parts):
        raise _wrong(where, keyword, "a list of schemas", parts)
    return list(parts)


def _says_something(schema: dict[str, Any], keyword: str) -> bool:
    value = schema[keyword]
    return not any(value == nothing and type(value) is type(nothing) for nothing in _SAYS_NOTHING.get(keyword, ()))


def _required(where: str, schema: dict[str, Any]) -> list[str]:
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _wrong(where, "required", "a list of strings", required)
    if len(set(required)) < len(required):
        raise _wrong(where, "required", "a list of different strings", required)
    return required


def _bound(where: str, keyword: str, bound: object) -> int | float:
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not abs(bound) < 10**_MOST_DIGITS:
        raise _wrong(where, keyword, f"a number of at most {_MOST_DIGITS} digits", bound)
    return bound


def _counts(nodes: list[Node], least: str, most: str) -> tuple[int, int | None]:
    low, high = 0, None
    for where, schema in nodes:
        for keyword in (least, most):
            count = schema.get(keyword, 0)
            if isinstance(count, float) and count.is_integer():
                count = int(count)
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MOST_COUNT:
                raise _wrong(where, keyword, f"an integer from 0 to {_MOST_COUNT}", count)
            if keyword == least:
                low = max(low, count)
            elif keyword in schema:
                high = count if high is None else min(high, count)
    if high is not None and low > high:
        raise _nothing_fits(nodes[0][0], f"{least} is more than {most}")
    return low, high


def _repetition(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"


def _items(where: str, schema: dict[str, Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Return the schemas of the first items, and of all others: one or none."""
    keyword, rest = "prefixItems", "items"
    if isinstance(schema.get("items"), list):  # as before 2020
        keyword, rest = "items", "additionalItems"
    prefix = schema.get(keyword, [])
    if not isinstance(prefix, list):
        raise _wrong(where, keyword, "a list of schemas", prefix)
    first = [(f"{where}/{keyword}/{i}", part) for i, part in enumerate(prefix)]
    return first, [(f"{where}/{rest}", schema[rest])] if rest in schema else []


def _common_values(nodes: list[Node]) -> dict[str, object] | None:
    """Return the values that enum and const leave, by their canonical JSON; None if there is neither."""
    left: dict[str, object] | None = None
    for where, schema in nodes:
        for keyword in ("enum", "const"):
            if keyword not in schema:
                continue
            values = schema[keyword] if keyword == "enum" else [schema[keyword]]
            if not isinstance(values, list):
                raise _wrong(where, keyword, "a list of values", values)
            by_text = {_canonical(value): value for value in values}
            left = by_text if left is None else {text: value for text, value in left.items() if text in by_text}
    return left


def _canonical(value: object) -> str:
    """Return JSON that is the same for values that JSON Schema holds for equal."""
    return json.dumps(_with_integers(value), sort_keys=True)


def _with_integers(value: object) -> object:
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_integers(item) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _kinds(nodes: list[Node], values: dict[str, object] | None) -> set[str]:
    """Return the types that values which fit may have."""
    kinds = set(_TYPES)
    if values is not None:
        kinds = {kind for value in values.values() for kind in _kind_of(value)}
    is_named = values is not None
    for where, schema in nodes:
        if "type" in schema:
            of_schema = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            for kind in of_schema:
                if not isinstance(kind, str) or kind not in _TYPES:
                    known = ", ".join(_TYPES)
                    raise ValueError(f"json_schema: {where}: unrecognized type {kind!r:.60}; it is one of {known}")
            if not of_schema or len(set(of_schema)) < len(of_schema):
                raise _wrong(where, "type", "a type, or a list of different types", of_schema)
            kinds &= {*of_schema, *(("integer",) if "number" in of_schema else ())}
            is_named = True
    if not is_named:
        keywords = {keyword for _, schema in nodes for keyword in schema}
        kinds = {
            kind for kind in _TYPES if keywords & {*_HELD.get(kind, ()), *_REFUSED.get(kind, ())} - {"format"}
        } or kinds
    return kinds


def _are_disjoint(a: Summary, b: Summary) -> bool:
    # A schema that names no type lets all values of other types than it speaks of through.
    if not a.kinds & b.stated_kinds and not a.stated_kinds & b.kinds:
        return True
    if a.values is not None and b.values is not None and not a.values & b.values:
        return True
    names = a.tags.keys() & b.tags.keys()
    return a.kinds & b.kinds == {"object"} and any(not a.tags[name] & b.tags[name] for name in names)


def _naturals(low: int, high: int | None) -> list[str]:
    """Return expressions for the digits of the integers from low to high."""
    parts: list[str] = []
    n_low, n_high = len(str(low)), None if high is None else len(str(high))
    if high is not None and n_low == n_high:
        return [_digits(str(low), str(high))]
    parts.append(_digits(str(low), "9" * n_low))
    if high is None:
        return [*parts, f"[1-9] [0-9]{{{n_low},}}"]
    if n_low + 1 < len(str(high)):
        parts.append(f"[1-9] [0-9]{{{n_low},{len(str(high)) - 2}}}")
    return [*parts, _digits("1" + "0" * (len(str(high)) - 1), str(high))]


def _digits(low: str, high: str) -> str:
    """Return an expression for the numbers from low to high, which have as many digits as both."""
    n_more = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return f"[{low[0]}-{high[0]}]" + (f" [0-9]{{{n_more}}}" if n_more else "")
    if low[0] == high[0]:
        return f'"{low[0]}" {_digits(low[1:], high[1:])}'
    parts = [f'"{low[0]}" {_digits(low[1:], "9" * n_more)}', f'"{high[0]}" {_digits("0" * n_more, high[1:])}']
    if int(low[0]) + 1 < int(high[0]):
        parts.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}] [0-9]{{{n_more}}}")
    return f"({' | '.join(parts)})"


def _kind_of(value: object) -> set[str]:
    if isinstance(value, bool) or value is None:
        return {"null"} if value is None else {"boolean"}
    if isinstance(value, int | float):
        return {"integer", "number"} if isinstance(value, int) or value.is_integer() else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}
