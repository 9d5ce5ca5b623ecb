"""The language of chat templates: Jinja as transformers has it, with bounds on what a template may use up."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from types import GeneratorType
from typing import Any, NoReturn, TypeVar

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from overspill._core import Error

__all__ = ["Program", "TemplateRefusalError"]

_F = TypeVar("_F", bound=Callable[..., Any])

# What a template may use up. Those of real models take milliseconds, and are 30 levels deep at most.
_MOST_SOURCE = 1_000_000  # characters
_DEEPEST = 200  # levels of its parts, and of its calls
_SECONDS = 1.0  # of one rendering, on the thread's own clock, and so many more for each million characters given
_MOST_MADE = 1 << 26  # characters made in one rendering, and 64 more for each that is given
_MOST_TEXT = 1 << 24  # characters of one value, and 8 more for each that is given
_MOST_DIGITS = 3_000  # of a number
_MOST_SLOW = 1 << 16  # characters given to a filter that goes through them in Python
_WIDEST = 1_000  # of a column, an indent or a precision


class TemplateRefusalError(Exception):
    """A template refused what it was given, or could not cope with it."""


class _LimitError(Exception):
    """A template would use up too much."""


class _Meter:
    """What one rendering has used up, of what it may."""

    def __init__(self, n_given: int = 0) -> None:
        self._end = time.thread_time() + _SECONDS * (1 + n_given / 1e6)
        self._most_made = _MOST_MADE + 64 * n_given
        self._most_text = _MOST_TEXT + 8 * n_given
        self._n_made = self._n_steps = 0
        self._sizes: dict[int, tuple[object, int]] = {}  # with the values, so that an id stays one value's
        self.depth = 0

    def step(self) -> None:
        """Count a step of a loop, a call or a filter."""
        self._n_steps += 1
        if not self._n_steps % 32 and time.thread_time() > self._end:
            raise _LimitError(f"it computes for more than {_SECONDS:g} s")

    def check(self, n: int) -> None:
        """Refuse a value of ``n`` characters that is about to be made, if that is too many."""
        if n > self._most_text:
            raise _LimitError(f"it makes a text of more than {self._most_text:,} characters")

    def made(self, value: Any) -> Any:
        """Return a new value, and count its size."""
        n = self.size(value)
        self.check(n)
        self._n_made += n
        if self._n_made > self._most_made:
            raise _LimitError(f"it makes texts of more than {self._most_made:,} characters in all")
        return value

    def size(self, value: Any) -> int:
        """Return about how many characters the value has when it is printed."""
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, int):
            if value.bit_length() > _MOST_DIGITS * 3:
                raise _LimitError(f"it makes a number of more than {_MOST_DIGITS:,} digits")
            return 8
        if isinstance(value, Namespace):  # it can change, so that no size is kept
            self.step()
            return sum(self.size(part) for part in value._Namespace__attrs.values())
        if isinstance(value, range):
            return 8 * len(value)
        if isinstance(value, KeysView | ValuesView | ItemsView):
            self.step()
            return sum(2 + self.size(part) for part in value)
        if not isinstance(value, list | tuple | set | frozenset | Mapping):
            return 8
        known = self._sizes.get(id(value))
        if known is None:
            self.step()
            parts = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value
            known = value, 2 + sum(2 + self.size(part) for part in parts)
            self._sizes[id(value)] = known
        return known[1]


_meter: ContextVar[_Meter] = ContextVar("_meter")


def _whole(values: Any) -> int:
    """Return the greatest whole number among the arguments of a function."""
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _numbers_in(text: str) -> int:
    """Return the sum of the numbers in the text of a format."""
    return sum(int(digits[:12]) for digits in re.findall(r"\d+", text))


def _formatted(text: str, values: Any) -> int:
    """Return a bound of the characters that a format makes of values."""
    meter = _meter.get()
    n_fields = text.count("%") + text.count("{") + 1
    return len(text) + n_fields * (sum(map(meter.size, values)) + _widest(values)) + _numbers_in(text)


def _widest(values: Any) -> int:
    """Return the greatest number in values, and in what they hold: a format may take it for a width."""
    widest, waiting, seen = 0, [values], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, int | float):
            widest = max(widest, int(min(abs(value), 1e12)) if value == value else 0)
        elif isinstance(value, str):
            widest = max(widest, _numbers_in(value))
        elif isinstance(value, list | tuple | Mapping) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value
    return widest


def _depth(value: Any, known: dict[int, int]) -> int:
    """Return how deep lists and mappings are nested."""
    if not isinstance(value, list | tuple | Mapping):
        return 0
    if id(value) not in known:
        parts = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + max((_depth(part, known) for part in parts), default=0)
    return known[id(value)]


def _replaced(text: str, old: str, new: str) -> int:
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _of_method(name: str, text: Any, values: list[Any]) -> int:
    """Return a bound of the characters that a method of a text makes."""
    meter = _meter.get()
    if name == "replace" and len(values) >= 2 and all(isinstance(v, type(text) | str) for v in values[:2]):
        return _replaced(text, values[0], values[1])
    if name == "join" and values:
        return meter.size(values[0]) + len(text) * len(values[0]) if hasattr(values[0], "__len__") else 0
    if name == "expandtabs":
        return len(text) * (1 + (_whole(values) or 8))
    if name == "translate":
        return len(text) * (1 + meter.size(values))
    return _whole(values)  # the width of ljust, rjust, center and zfill, or the length of to_bytes


# Filters whose text can be longer than what they are given, and those that take long for each character.
_GROWING = frozenset(
    {"batch", "center", "indent", "round", "slice", "tojson", "truncate", "urlize", "wordwrap", "xmlattr"}
)
_SLOW = frozenset({"pprint", "striptags", "title", "urlize", "wordcount", "wordwrap", "xmlattr"})


def _of_filter(name: str, value: Any, values: list[Any]) -> int:
    """Return a bound of the characters that a filter makes; an error if it would take long."""
    meter = _meter.get()
    n = meter.size(value)
    if name in _SLOW and n > _MOST_SLOW:
        raise _LimitError(f"it gives more than {_MOST_SLOW:,} characters to the filter {name}")
    if name in _GROWING:
        if (widest := _whole(values)) > _WIDEST and name not in ("truncate", "wordwrap"):
            raise _LimitError(f"it gives {widest} to the filter {name}; {_WIDEST} is the most")
        lines = str(value).count("\n") + 1 if name == "indent" and isinstance(value, str) else n
        if name == "tojson" and widest:
            lines *= _depth(value, {})
        return n + (1 + lines) * sum(len(v) for v in values if isinstance(v, str)) + lines * min(widest, _WIDEST)
    if name == "replace" and len(values) >= 2:
        return _replaced(str(value), str(values[0]), str(values[1]))
    if name == "join":
        return n + n * sum(len(v) for v in values if isinstance(v, str))
    if name == "format":
        return _formatted(str(value), values)
    if name == "sum" and isinstance(value, list | tuple) and not all(isinstance(v, int | float) for v in value):
        return n * len(value)
    return 0


def _limited(name: str, function: _F) -> _F:
    """Return a filter that counts what it makes."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def limited(*args: Any, **keywords: Any) -> Any:
        meter = _meter.get()
        meter.step()
        given = [list(v) if isinstance(v, GeneratorType) else v for v in args]
        if len(given) > at:
            meter.check(_of_filter(name, given[at], [*given[at + 1 :], *keywords.values()]))
        made = function(*given, **keywords)
        return meter.made(list(made) if isinstance(made, GeneratorType) else made)

    return limited  # type: ignore[return-value]


class _Generation(Extension):
    """Mark what an assistant said, for training: only the text is wanted here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _refuse(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Not Jinja's own, which writes <, > and & in another way; and Japanese stays Japanese.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _joined(parts: Any) -> str:
    texts = list(parts)
    meter = _meter.get()
    meter.check(sum(map(len, texts)))
    made: str = meter.made("".join(texts))
    return made


def _printed(value: Any) -> Any:
    return value if isinstance(value, str) else _meter.get().made(value)


def _step(value: Any) -> Any:
    _meter.get().step()
    return value


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which everything that makes values counts them."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or constants would be computed, however large
            finalize=_printed,
            extensions=[_Generation, loopcontrols],
        )
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            self.filters[name] = _limited(name, function)
        # The tree of a template calls these; no template can, since their names have a space.
        self.filters[" step"] = _step
        self.filters[" made"] = lambda value: _meter.get().made(value)
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the value of ``left operator right``, if it is not too large."""
        meter = _meter.get()
        if operator == "%" and isinstance(left, str | bytes):
            form = left if isinstance(left, str) else left.decode("latin-1")
            meter.check(_formatted(form, right if isinstance(right, tuple) else [right]))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _MOST_DIGITS * 3:
                raise _LimitError(f"it makes a number of more than {_MOST_DIGITS:,} digits")
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            meter.check(max(meter.size(left), 1) * _whole([right]) + max(meter.size(right), 1) * _whole([left]))
        elif operator == "+":
            meter.check(meter.size(left) + meter.size(right))
        return meter.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return ``str.format`` of a text, for texts that are not too long."""
        formatting = super().wrap_str_format(value)
        if formatting is None:
            return None

        def limited(*args: Any, **keywords: Any) -> str:
            _meter.get().check(_formatted(str(value.__self__), [*args, *keywords.values()]))
            return formatting(*args, **keywords)

        return limited

    def call(self, context: Context, function: Any, /, *args: Any, **keywords: Any) -> Any:
        """Call a function, a macro or a method."""
        meter = _meter.get()
        meter.step()
        given = [list(v) if isinstance(v, GeneratorType) else v for v in args]
        if isinstance(owner := getattr(function, "__self__", None), str | bytes | int):
            meter.check(_of_method(getattr(function, "__name__", ""), owner, [*given, *keywords.values()]))
        if meter.depth >= _DEEPEST:
            raise _LimitError(f"its calls are nested more than {_DEEPEST} deep")
        meter.depth += 1
        try:
            return meter.made(super().call(context, function, *given, **keywords))
        finally:
            meter.depth -= 1


def _filtered(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _step_at(line: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filtered(" step", nodes.Const(None, lineno=line)), lineno=line)


def _counted(node: nodes.Node) -> nodes.Node:
    """Return a part of a template so that it counts its steps, and the values that it makes."""
    line = node.lineno
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        node.body.insert(0, _step_at(line))
    if isinstance(node, nodes.For) and node.test is not None:
        node.test = nodes.And(_filtered(" step", nodes.Const(True, lineno=line)), node.test, lineno=line)
    if isinstance(node, nodes.Concat):
        node.nodes = [_filtered(" made", part) for part in node.nodes]
    if isinstance(node, nodes.Compare | nodes.Test):
        return _filtered(" step", node)
    is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    if is_slice or (isinstance(node, nodes.List | nodes.Tuple | nodes.Dict) and getattr(node, "ctx", "load") == "load"):
        assert isinstance(node, nodes.Expr)
        return _filtered(" made", node)
    return node


def _count(tree: nodes.Template) -> None:
    """Make all parts of a template count; an error if they are nested too deep."""
    waiting: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > _DEEPEST:
            raise _LimitError(f"its parts are nested more than {_DEEPEST} deep")
        for name, value in list(node.iter_fields()):
            if isinstance(value, nodes.Node):
                waiting.append((value, depth + 1))
                setattr(node, name, _counted(value))
            elif isinstance(value, list):
                # llama.cpp nests each elif in the one before.
                step = 1 if name == "elif_" else 0
                waiting += [(v, depth + 1 + i * step) for i, v in enumerate(value) if isinstance(v, nodes.Node)]
                setattr(node, name, [_counted(v) if isinstance(v, nodes.Node) else v for v in value])


def _check_brackets(environment: Environment, source: str) -> None:
    # The tree has no brackets, but llama.cpp's parser calls itself for each.
    depth = 0
    for _, kind, text in environment.lex(source):
        if kind == "operator":
            depth += (text in "([{") - (text in ")]}")
        if depth > _DEEPEST:
            raise _LimitError(f"its brackets are nested more than {_DEEPEST} deep")


class Program:
    """A template that is compiled; it can be used from any thread."""

    def __init__(self, source: str) -> None:
        """Compile the source of a template.

        Raises
        ------
        Error
            It has mistakes, or is too large or nested too deep.
        """
        if len(source) > _MOST_SOURCE:
            raise Error(f"the chat template is larger than {_MOST_SOURCE:,} characters")
        self.source = source
        environment = _environment()
        try:
            with _metered(len(source)):
                _check_brackets(environment, source)
                tree = environment.parse(source)
                _count(tree)
                code = environment.compile(tree)
                self._template = Template.from_code(environment, code, environment.make_globals(None), None)
        except (_LimitError, RecursionError, MemoryError) as error:
            raise Error(f"the chat template is not used: {_why(error)}") from error
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise Error(
                f"the chat template has a mistake{f' in line {line}' if line else ''}: {one_line(error)}"
            ) from None
        except (SyntaxError, ValueError, TypeError, OverflowError, AssertionError) as error:
            raise Error(f"the chat template has a mistake: {one_line(error)}") from None

    def render(self, variables: Mapping[str, Any], n_given: int) -> str:
        """Return the text for variables that have ``n_given`` characters in all.

        Raises
        ------
        TemplateRefusalError
            The template raises an exception of its own, or cannot deal with the values.
        Error
            It would use up too much.
        """
        with _metered(n_given):
            try:
                return self._template.render(variables)
            except (_LimitError, RecursionError, MemoryError) as error:
                raise Error(f"the chat template is stopped: {_why(error)}") from error
            except OverflowError as error:
                raise Error(f"the chat template is stopped: {one_line(error)}") from None
            except Exception as error:  # whatever a template can raise
                raise TemplateRefusalError(one_line(error)) from None


_environments = threading.local()


def _environment() -> Environment:
    if not hasattr(_environments, "one"):
        _environments.one = _Environment()
    environment: Environment = _environments.one
    return environment


@contextmanager
def _metered(n_given: int) -> Iterator[None]:
    token = _meter.set(_Meter(n_given))
    try:
        yield
    finally:
        _meter.reset(token)


def _why(error: BaseException) -> str:
    return one_line(error) if isinstance(error, _LimitError) else "its parts or calls are nested too deep"


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line, of 300 characters at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
