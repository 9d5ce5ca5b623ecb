"""The public API as text: names, signatures, fields, values and command-line options, one to a line.

``PYTHONPATH=tests/support python -m public_api > tests/public_api.txt`` writes the listing anew. Where a type is
defined is left out, so that it may move.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ForwardRef, get_args, is_typeddict

import typer.main

from overspill.cli.app import app

# Classes that are never called: other calls return them.
HANDED_OUT = {"AsyncChatStream", "AsyncStream", "CascadeStream", "ChatStream", "Plan", "Stream", "Token"}
# What the package's own modules use of each other, and no documentation names.
INTERNAL = {
    *("ChatStream.on_end", "ChatTemplate.prepare", "Model.stream.form"),
    *("Plan.estimate", "Plan.pins"),
}
PUBLIC_MODULES = ("overspill", "overspill.compat", "overspill.guidance", "overspill.hub")
# Of special methods those that say what an object can be used for.
PROTOCOLS = {
    *("__aenter__", "__aexit__", "__aiter__", "__anext__", "__call__", "__contains__", "__enter__", "__eq__"),
    *("__exit__", "__getitem__", "__hash__", "__iter__", "__len__", "__next__", "__or__", "__str__"),
}
MARKS = {"KEYWORD_ONLY": " (keyword)", "POSITIONAL_ONLY": " (positional)"}
STARS = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}


def listing() -> list[str]:
    """Return the lines."""
    lines = [line for module in PUBLIC_MODULES for line in _module(importlib.import_module(module))]
    lines += ["", "# Named above, and not exported", "", *_named()]
    lines += ["", "# Commands", ""]
    lines += _command("overspill", typer.main.get_command(app))
    return lines


def _module(module: ModuleType) -> Iterator[str]:
    for name in sorted(module.__all__):
        value, path = getattr(module, name), f"{module.__name__}.{name}"
        if isinstance(value, type):
            yield from _class(path, value)
        elif callable(value) and not hasattr(value, "__origin__"):
            yield from _call(path, value)
        else:
            yield path  # an alias, listed with the others
            _type(name, module.__name__)
    yield from (f"{module.__name__}.{name}" for name in ["__version__"] if hasattr(module, name))


def _class(path: str, cls: type) -> Iterator[str]:
    yield f"{path}: {_kind(cls)}"
    if issubclass(cls, enum.Enum):
        yield from (f"    {member.name} = {member.value!r}" for member in cls)
    elif dataclasses.is_dataclass(cls):
        public = [field for field in dataclasses.fields(cls) if not field.name.startswith("_")]
        yield from (f"    {_field(field, cls.__module__)}" for field in public)
    elif is_typeddict(cls):
        yield from (f"    {name}: {_type(kind, cls.__module__)}" for name, kind in cls.__annotations__.items())
        return
    elif cls.__name__ in _public() - HANDED_OUT and not issubclass(cls, BaseException) and not _is_protocol(cls):
        yield from _indented(_call("", cls))
    own = [base for base in cls.__mro__ if base.__module__.startswith("overspill")]
    names = {name for base in own for name in vars(base)} | set(_assigned(cls))
    if dataclasses.is_dataclass(cls):
        names -= {field.name for field in dataclasses.fields(cls)} | {"__eq__", "__hash__"}
    if issubclass(cls, enum.Enum):
        names -= {*cls.__members__, "__str__"}
    names -= set(getattr(cls, "_fields", ()))  # of a named tuple: the parameters
    for name in sorted(names):
        if (not name.startswith("_") or name in PROTOCOLS) and f"{cls.__name__}.{name}" not in INTERNAL:
            yield from _indented(_member(cls, name))


def _kind(cls: type) -> str:
    if is_typeddict(cls):
        return "TypedDict"
    if dataclasses.is_dataclass(cls):
        parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
        options = [name for name in ("frozen", "eq", "order") if getattr(parameters, name)]
        return f"dataclass({', '.join(options)})"
    bases = [base for base in cls.__mro__[1:-1] if base.__name__ in _public() or hasattr(builtins, base.__name__)]
    if issubclass(cls, BaseException):
        return f"exception({', '.join(base.__name__ for base in bases)})"
    if issubclass(cls, enum.Enum):
        return next(base.__name__ for base in cls.__mro__[1:] if base.__module__ == "enum")
    kind = "protocol" if _is_protocol(cls) else "class"
    return f"{kind}({', '.join(base.__name__ for base in bases)})" if bases else kind


def _is_protocol(cls: type) -> bool:
    return getattr(cls, "_is_protocol", False)


def _member(cls: type, name: str) -> Iterator[str]:
    value = inspect.getattr_static(cls, name, None)
    if isinstance(value, (property, cached_property)):
        getter = value.fget if isinstance(value, property) else value.func
        writable = isinstance(value, property) and value.fset is not None
        yield f"{name}: {_returned(getter)}{' (writable)' if writable else ''}"
    elif isinstance(value, (classmethod, staticmethod)):
        yield from _call(f"{type(value).__name__} {name}", getattr(cls, name))
    elif inspect.isroutine(value):
        yield from _call(name, value)
    elif value is None and name in _assigned(cls):
        yield f"{name}: {_type(_assigned(cls)[name], cls.__module__)} (writable)"
    else:
        yield name if repr(value).startswith("<") else f"{name} = {_value(value)}"


def _call(name: str, function: Any) -> Iterator[str]:
    """Yield one line for the name and what is returned, and one for each parameter."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # of native code
        yield f"{name}(...) -> {_documented(function)}"
        return
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name == "self":
        parameters.pop(0)
    returned = "" if isinstance(function, type) else f" -> {_type(signature.return_annotation, function.__module__)}"
    prefix = "async " if inspect.iscoroutinefunction(function) else ""
    yield f"{prefix}{name}(){returned}" if not parameters else f"{prefix}{name}(...){returned}"
    for parameter in parameters:
        if f"{function.__qualname__}.{parameter.name}" in INTERNAL:
            continue
        mark = MARKS.get(parameter.kind.name, "")
        stars = STARS.get(parameter.kind.name, "")
        default = "" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
        yield f"    {stars}{parameter.name}: {_type(parameter.annotation, function.__module__)}{default}{mark}"


def _field(field: dataclasses.Field[Any], module: str) -> str:
    default = ""
    if field.default is not dataclasses.MISSING:
        default = f" = {_value(field.default)}"
    elif field.default_factory is not dataclasses.MISSING:
        one, other = field.default_factory(), field.default_factory()
        default = f" = {_value(one) if one == other else 'made anew'}"
    mark = " (keyword)" if field.kw_only else ""
    return f"{field.name}: {_type(field.type, module)}{default}{mark if field.init else ' (no parameter)'}"


def _returned(getter: Any) -> str:
    try:
        return _type(inspect.signature(getter).return_annotation, getter.__module__)
    except ValueError:
        return _documented(getter)


def _documented(function: Any) -> str:
    """Return what native code returns, which is in the first line of its docstring."""
    return _type((function.__doc__ or "").partition("\n")[0].partition("-> ")[2], "overspill._core")


def _assigned(cls: type) -> dict[str, str]:
    """Return the public attributes that are annotated in a class or assigned in its ``__init__``, with their types."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if not base.__module__.startswith("overspill"):
            continue
        try:
            (tree,) = ast.parse(inspect.getsource(base)).body
        except OSError:  # of native code
            continue
        assert isinstance(tree, ast.ClassDef)
        inits = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        for statement in (*tree.body, *(node for init in inits for node in ast.walk(init))):
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            annotation = ast.unparse(statement.annotation) if isinstance(statement, ast.AnnAssign) else "..."
            for target in targets:
                if isinstance(target, ast.Name) and statement in tree.body:
                    found.setdefault(target.id, annotation)
                elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    found.setdefault(target.attr, annotation)
    return {name: annotation for name, annotation in found.items() if not name.startswith("_")}


def _type(annotation: object, module: str) -> str:
    """Return a type as it is written in a module, without the modules that it is in, and take note of its names."""
    if annotation is inspect.Parameter.empty:
        return "..."
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"(?<!')\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)
    for name in re.findall(r"\b[A-Z]\w+", text):
        home = _home(name, module)
        if home is not None and name not in _named_so_far:
            _named_so_far[name] = home
    return text


# Names that are to be listed, and the modules that define them.
_named_so_far: dict[str, str] = {}


def _value(value: object) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}(...)"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)


def _indented(lines: Iterator[str]) -> Iterator[str]:
    return (f"    {line}" for line in lines)


@cache
def _public() -> set[str]:
    return {name for module in PUBLIC_MODULES for name in importlib.import_module(module).__all__}


@cache
def _tree(module: str) -> list[ast.stmt]:
    """Return the statements of a module, those for type checkers alone as well."""
    spec = find_spec(module) if module else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return []
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    return [statement for node in body for statement in (node.body if isinstance(node, ast.If) else [node])]


def _definition(name: str, module: str) -> ast.ClassDef | ast.AnnAssign | None:
    """Return the class or type alias of that name in a module."""
    for node in _tree(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return node if "TypeAlias" in ast.unparse(node.annotation) else None
    return None


def _home(name: str, module: str) -> str | None:
    """Return the module of the package that defines what has this name in another one; None for what is exported."""
    if _definition(name, module) is not None:
        exported = name in _public() and isinstance(_definition(name, module), ast.ClassDef)
        return None if exported else module
    for node in _tree(module):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            source = node.module or ""
            return _home(name, source) if source.startswith("overspill") and source != module else None
    return None


def _named() -> Iterator[str]:
    """Yield the definitions of the names that lines have, and of those in them."""
    found: dict[str, list[str]] = {}
    while names := _named_so_far.keys() - found.keys():
        for name in names:
            module = _named_so_far[name]
            node = _definition(name, module)
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                found[name] = [f"{name} = {_type(ast.unparse(node.value), module)}"]
            else:
                found[name] = list(_class(name, getattr(importlib.import_module(module), name)))
    for name in sorted(found):
        yield from found[name]


def _command(path: str, command: Any) -> Iterator[str]:
    yield path
    signature = inspect.signature(command.callback, eval_str=True).parameters if command.callback else {}
    for parameter in command.params:
        names = [*parameter.opts, *(f"not: {name}" for name in parameter.secondary_opts)]
        notes = [name for name in ("required", "hidden") if getattr(parameter, name, False)]
        if parameter.name in signature:
            kind, info = get_args(signature[parameter.name].annotation)
            limits = [(name, getattr(info, name)) for name in ("min", "max")]
            notes = [_type(kind, ""), *(f"{name} {limit}" for name, limit in limits if limit is not None), *notes]
            default = signature[parameter.name].default
            notes += [f"default {_value(default)}"] if default is not inspect.Parameter.empty else []
        yield f"    {parameter.param_type_name} {', '.join(names)}: {', '.join(notes)}"
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from _command(f"{path} {name}", child)


if __name__ == "__main__":
    sys.stdout.write("\n".join([*listing(), ""]))
