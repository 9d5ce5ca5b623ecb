"""A user's functions as a model's tools: signatures and docstrings become JSON schemas."""

from __future__ import annotations

import enum
import inspect
import json
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from overspill.base.checks import as_json, as_list, shown
from overspill.sampling.json_schema import argument_rules

__all__ = ["MarkedTools", "Tool", "describe_tools", "marked_tools"]

Tool: TypeAlias = Mapping[str, Any] | Callable[..., Any]
"""A function, or the description of one with the keys of OpenAI's API."""

# Keys of a function's parameters: OpenAI's, MCP's and Anthropic's; and others that may hold a schema, but not theirs.
_PARAMETERS = ("parameters", "inputSchema", "input_schema")
_KNOWN = (*_PARAMETERS, "name", "description", "strict", "title", "annotations", "outputSchema", "response", "_meta")

_SIMPLE: dict[object, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
    object: {},
}


@dataclass(frozen=True, slots=True)
class MarkedTools:
    """Tools for llama.cpp, which makes a grammar of them: marks stand for our own rules, whose names they have."""

    by_call: str
    """Tools in JSON, with a mark in place of each one's arguments."""
    by_parameter: str
    """The same, with a mark in place of each value that is no text, for formats in which values stand on their own."""
    rules: str


@lru_cache(maxsize=8)
def marked_tools(described: str) -> MarkedTools:
    """Return the tools, which are given as JSON, with marks and the rules that these name.

    Raises
    ------
    ValueError
        A schema is none, or no arguments fit it; the message names the tool.
    """
    tools = json.loads(described)
    functions = [tool["function"] for tool in tools]
    arguments, rules = argument_rules({function["name"]: function["parameters"] for function in functions})

    def with_schema(tool: dict[str, Any], properties: dict[str, Any], **mark: object) -> dict[str, Any]:
        required = [name for name in arguments[tool["function"]["name"]].required if name in properties]
        schema = {"type": "object", "properties": properties, "required": required, **mark}
        return {**tool, "function": {**tool["function"], "parameters": schema}}

    def by_parameter(tool: dict[str, Any]) -> dict[str, Any]:
        given = tool["function"]["parameters"].get("properties", {})
        found = arguments[tool["function"]["name"]].parameters
        return with_schema(tool, {name: _marked(*of_one, given.get(name)) for name, of_one in found.items()})

    def by_call(tool: dict[str, Any]) -> dict[str, Any]:
        # The mark says it all; llama.cpp's Jinja fails in some templates at other properties.
        found = arguments[tool["function"]["name"]]
        properties = {name: {"type": "string"} for name in found.parameters}
        return with_schema(tool, properties, const=f"overspill:{found.rule}")

    return MarkedTools(json.dumps(list(map(by_call, tools))), json.dumps(list(map(by_parameter, tools))), rules)


def _marked(rule: str, kinds: set[str], schema: object) -> dict[str, Any]:
    described = schema.get("description") if isinstance(schema, dict) else None
    start = {"description": described} if isinstance(described, str) else {}
    if kinds == {"string"}:
        return {**start, "type": "string"}
    if "string" in kinds:  # which formats let through as any text
        return {**start, "type": sorted(kinds - ({"integer"} if "number" in kinds else set()))}
    return {**start, "type": "object", "const": {"overspill": rule}}


def describe_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the descriptions of tools, with the keys of OpenAI's API.

    Raises
    ------
    ValueError, TypeError
        A tool is neither a function nor a description, two have the same name, or a parameter's type has no JSON
        schema here.
    """
    listed = as_list("tools", tools, "functions or descriptions")
    described = [_described(f"tools[{i}]", tool) for i, tool in enumerate(listed)]
    names = [tool["function"]["name"] for tool in described]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tools: two have the name {name}")
    return described


def _described(where: str, tool: Tool) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        whole = _from_mapping(where, tool)
        return {**(tool if "function" in tool else {}), "type": "function", "function": whole}
    if not callable(tool):
        raise TypeError(f"{where} must be a function or a description, not {shown(tool)}")
    name = getattr(tool, "__name__", None) or type(tool).__name__
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{where}: {name} has no name that a model could call it by")
    try:
        hints, parameters = get_type_hints(tool), inspect.signature(tool).parameters.values()
    except Exception as error:  # a name in a type that is not there, or a function without a signature
        raise TypeError(f"{where}: {name} cannot be described: {error}; give a description instead") from None
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"{where}: {name}'s parameter {parameter.name} cannot be given by its name")
        if parameter.name not in hints:
            raise TypeError(f"{where}: {name}'s parameter {parameter.name} needs a type, as in {parameter.name}: str")
        properties[parameter.name] = _schema_of(hints[parameter.name], f"{where}: {name}'s parameter {parameter.name}")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, "required": required}
    description = inspect.getdoc(tool) or ""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _from_mapping(where: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a function, with OpenAI's keys; its parameters may have MCP's or Anthropic's key."""
    function = tool.get("function", tool)
    if tool.get("type") not in (None, "function", "custom"):
        raise ValueError(f'{where}: type must be "function", not {shown(tool["type"])}')
    outside = [key for key in tool if function is not tool and key in _PARAMETERS]
    if outside:
        raise ValueError(f"{where}: {outside[0]} must be in its function, as parameters")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f'{where} must have a "name", as in {{"name": "search", "parameters": {{...}}}}')
    as_json(where, dict(function))
    found = {key: function[key] for key in _PARAMETERS if function.get(key) is not None}
    if len(found) > 1:
        raise ValueError(f"{where}: {' and '.join(found)} say the same, give one of them")
    others = [key for key, value in function.items() if key not in _KNOWN and _looks_like_schema(value)]
    if not found and others:
        raise ValueError(f"{where}: {others[0]} is not known: give the JSON schema of the arguments as parameters")
    key, schema = next(iter(found.items()), ("parameters", {"type": "object", "properties": {}}))
    if not isinstance(schema, Mapping) or not isinstance(schema.get("properties", {}), Mapping):
        raise ValueError(f"{where}: {key} must be a JSON schema, not {shown(schema)}")
    if schema.get("type", "object") != "object":
        raise ValueError(f"{where}: {key} must be the JSON schema of an object, not of {shown(schema['type'])}")
    # In the caller's order: templates write it down as it is.
    said = {"parameters" if key in _PARAMETERS else key: value for key, value in function.items() if value is not None}
    if function is tool:
        said.pop("type", None)
    if not isinstance(said.get("description", ""), str):
        raise TypeError(f"{where}: description must be a string, not {shown(said['description'])}")
    return {**said, "description": said.get("description", ""), "parameters": _without_nulls(schema)}


def _looks_like_schema(value: object) -> bool:
    return isinstance(value, Mapping) and ("properties" in value or value.get("type") == "object")


def _without_nulls(schema: Any) -> Any:
    """Return a schema without annotations that are null, which templates would take for texts."""
    if isinstance(schema, Mapping):
        kept = {key: one for key, one in schema.items() if not (one is None and key in ("description", "title"))}
        return {key: _without_nulls(one) for key, one in kept.items()}
    return [_without_nulls(one) for one in schema] if isinstance(schema, list | tuple) else schema


def _schema_of(kind: object, where: str) -> dict[str, Any]:
    if isinstance(kind, Hashable) and kind in _SIMPLE:
        return dict(_SIMPLE[kind])
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(argument, where) for argument in arguments]}
    if kind is list or origin in (list, Sequence):
        return {"type": "array", "items": _schema_of(arguments[0], where) if arguments else {}}
    if (kind is dict or origin in (dict, Mapping)) and (not arguments or arguments[0] is str):
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], where) if arguments else {}}
    raise TypeError(
        f"{where} has a type that JSON does not know: use str, int, float, bool, None, list, dict, Literal, an Enum or "
        "a union of these, or describe the tool with a JSON schema"
    )
