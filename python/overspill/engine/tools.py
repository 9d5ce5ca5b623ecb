"""A user's functions as a model's tools: signatures and docstrings become JSON schemas."""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

__all__ = ["Tool", "describe_tools"]

Tool: TypeAlias = Mapping[str, Any] | Callable[..., Any]
"""A function, or the description of one with the keys of OpenAI's API."""

_SIMPLE: dict[object, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
    object: {},
}


def describe_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the descriptions of tools, with the keys of OpenAI's API.

    Raises
    ------
    ValueError, TypeError
        A tool is neither a function nor a description, two have the same name, or a parameter's type has no JSON
        schema here.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise TypeError(f"tools must be a sequence of functions or descriptions, not {tools!r:.80}")
    described = [_described(f"tools[{i}]", tool) for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in described]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tools: two have the name {name}")
    return described


def _described(where: str, tool: Tool) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f'{where} must have a "name", as in {{"name": "search", "parameters": {{...}}}}')
        parameters = function.get("parameters", {"type": "object", "properties": {}})
        if not isinstance(parameters, Mapping):
            raise ValueError(f"{where}: parameters must be a JSON schema, not {parameters!r:.80}")
        # In the caller's order: templates write it down as it is.
        whole = {**function, "description": function.get("description", ""), "parameters": dict(parameters)}
        return {**tool, "function": whole} if "function" in tool else {"type": "function", "function": whole}
    if not callable(tool):
        raise TypeError(f"{where} must be a function or a description, not {tool!r:.80}")
    name = getattr(tool, "__name__", None) or type(tool).__name__
    if not name.isidentifier():
        raise ValueError(f"{where}: {name} has no name that a model could call it by")
    hints = get_type_hints(tool)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in inspect.signature(tool).parameters.values():
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


def _schema_of(kind: object, where: str) -> dict[str, Any]:
    if kind in _SIMPLE:
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
