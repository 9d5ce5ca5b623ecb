"""Grammars from JSON schemas: every keyword holds exactly, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from overspill.base.checks import shown
from overspill.base.files import finite
from overspill.sampling.json_text import UnsupportedError
from overspill.sampling.schema_writer import Arguments, NothingFitsError, schema_text, write_arguments, write_schema

__all__ = ["argument_rules", "grammar_of_json_schema", "parsed_schema", "schema_rules"]

_MOST_LEVELS = 500
_MOST_VALUES = 500_000


def parsed_schema(schema: str | Mapping[str, Any] | bool) -> Any:
    """Return a schema as :mod:`json` reads it.

    Raises
    ------
    TypeError
        ``schema`` is no mapping, string or bool, or something in it has no form in JSON.
    ValueError
        It is no JSON, nested deeper than 500 levels, or has more than 500,000 values.
    """
    if not isinstance(schema, str | Mapping | bool):
        raise TypeError(f"json_schema must be a mapping, JSON or a bool, not {shown(schema)}")
    try:
        if not isinstance(schema, str):
            _check_size(schema)
            schema = _as_text(schema)
        root = json.loads(schema, parse_constant=_refuse_constant, parse_float=finite)
        json.dumps(root, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"json_schema: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeEncodeError:
        raise ValueError("json_schema: it has half of a surrogate pair, which no text has") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # a number of too many digits
        raise ValueError(f"json_schema: {str(error).removeprefix('json_schema: ')}") from None
    _check_size(root)
    return root


def _check_size(schema: object) -> None:
    level = [schema]
    n_values = 0
    for _ in range(_MOST_LEVELS):
        level, values = [], level
        for value in values:
            parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
            n_values += len(parts)
            if n_values > _MOST_VALUES:
                raise ValueError(f"json_schema: it has more than {_MOST_VALUES} values")
            level += [part for part in parts if isinstance(part, Mapping | list | tuple)]
        if not level:
            return
    raise _too_deep()


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"json_schema: {value!r} has no form in JSON")


def _as_text(schema: Any) -> str:
    try:
        return json.dumps(schema, default=_as_dict)
    except TypeError as error:  # a key that is no text
        raise TypeError(f"json_schema: {str(error).removeprefix('json_schema: ')}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"json_schema: {name} is no JSON")


def _too_deep() -> ValueError:
    return ValueError(f"json_schema: it is nested deeper than {_MOST_LEVELS} levels")


def grammar_of_json_schema(schema: str | Mapping[str, Any] | bool) -> str:
    """Return a grammar in GBNF whose texts are JSON that fits ``schema``.

    Properties come in the schema's order. Where ``properties`` or ``prefixItems`` are named and nothing says what else
    there may be, there is nothing else. Without ``type``, keywords of a type mean that type.

    Raises
    ------
    TypeError
        ``schema`` is no mapping, string or bool.
    ValueError
        ``schema`` is no JSON schema, has a keyword that a grammar cannot hold, or exceeds a limit: 500 levels, 500,000
        values, counts of 100,000, bounds of 100 digits, 500 parts of a oneOf, 50,000 rules. The message names the
        keyword and its place.
    """
    return f"root ::= fits\n{schema_rules(parsed_schema(schema))}"


def schema_rules(schema: object) -> str:
    """Return the same rules for a parsed schema, for a grammar with another start; ``fits`` is what fits."""
    text = schema_text()
    with _said_plainly():
        return text.written(write_schema(schema, text))


def argument_rules(schemas: Mapping[str, Any]) -> tuple[dict[str, Arguments], str]:
    """Return the rules' names for the arguments of tools, by the tools' names, and all rules.

    A parameter whose schema has a keyword that a grammar cannot hold may have any value of its type.

    Raises
    ------
    ValueError
        A schema is none, no arguments fit it, or it exceeds a limit; the message names the tool.
    """
    text = schema_text()
    found = {}
    for name, schema in schemas.items():
        try:
            with _said_plainly():
                found[name] = write_arguments(_that_can_be_held(parsed_schema(schema)), text)
        except ValueError as error:
            raise ValueError(f"tools: {name}: {str(error).removeprefix('json_schema: ')}") from None
    return found, text.written()


def _that_can_be_held(schema: Any) -> Any:
    """Return the schema of an object, or of what else fits where it has keywords that a grammar cannot hold."""
    if _can_be_held(schema):
        return schema
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties = {
        name: part
        if _can_be_held({**definitions, "properties": {name: part}})
        else {"type": part["type"]}
        if isinstance(part, dict) and "type" in part
        else {}
        for name, part in schema.get("properties", {}).items()
    }
    closer = {**schema, "properties": properties}
    if _can_be_held(closer):
        return closer
    return {"type": "object", "properties": properties, "required": schema.get("required", []), **definitions}


def _can_be_held(schema: Any) -> bool:
    try:
        write_arguments(schema, schema_text())
    except UnsupportedError:
        return False
    except ValueError:
        pass  # which is said of the whole
    return True


@contextmanager
def _said_plainly() -> Iterator[None]:
    try:
        yield
    except NothingFitsError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise _too_deep() from None
