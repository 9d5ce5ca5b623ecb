"""JSON texts in GBNF: values, strings in all their spellings, and what regular expressions say of strings."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping

__all__ = ["GrammarText", "UnsupportedError", "pattern_expression"]

# Characters as ranges of code points, in order and apart from one another.
Ranges = tuple[tuple[int, int], ...]

_ANY: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
_UNESCAPED: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))
_SHORT_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[a-z][\w-]*|\{\d*,?\d*\}|[()|?*+]')
_MOST_GROUPS = 100
_MOST_COUNT = 100_000


def _ranges(parts: Iterable[tuple[int, int]]) -> Ranges:
    joined: list[tuple[int, int]] = []
    for low, high in sorted(parts):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return tuple(joined)


def _both(a: Ranges, b: Ranges) -> Ranges:
    return _ranges((max(p, r), min(q, s)) for p, q in a for r, s in b if p <= s and r <= q)


def _without(ranges: Ranges, dropped: Iterable[tuple[int, int]]) -> Ranges:
    gaps, start = [], 0
    for low, high in (*_ranges(dropped), (0x110000, 0x110000)):
        if start < low:
            gaps.append((start, low - 1))
        start = high + 1
    return _both(ranges, tuple(gaps))


def _class(ranges: Ranges) -> str:
    return "[" + "".join(f"\\U{low:08X}-\\U{high:08X}" for low, high in ranges) + "]"


def _literal(text: str) -> str:
    def escaped(character: str) -> str:
        if character in '"\\':
            return "\\" + character
        return character if character >= " " and character != "\x7f" else f"\\x{ord(character):02X}"

    return '"' + "".join(map(escaped, text)) + '"'


def _ends(tokens: Iterable[str], ending: Container[str]) -> bool:
    """Return whether a text fits a rule's tokens, of which the rules ``ending`` have one."""
    outer: list[tuple[bool, bool]] = []
    some, all_before, last = False, True, True  # an alternative does, this one does so far, its last item does
    for token in tokens:
        if token in ("?", "*") or token[:2] == "{0":
            last = True
        elif token == ")":
            last = some or (all_before and last)
            some, all_before = outer.pop()
        elif token != "+" and token[0] != "{":
            all_before, last = all_before and last, True
            if token == "(":
                outer.append((some, all_before))
                some, all_before = False, True
            elif token == "|":
                some, all_before = some or all_before, True
            elif token[0] not in '"[':
                last = token in ending
    return some or (all_before and last)


def _hex_digits(low: int, high: int, n: int) -> Iterator[str]:
    """Yield expressions which n hexadecimal digits of a number from low to high fit one of."""
    unit = 16 ** (n - 1)
    first, last = low // unit, high // unit
    if n == 1 or (low % unit == 0 and high % unit == unit - 1):
        upper = "".join(f"{digit:X}" for digit in range(first, last + 1))
        yield f"[{''.join(dict.fromkeys(upper + upper.lower()))}]" + (f" [0-9a-fA-F]{{{n - 1}}}" if n > 1 else "")
    elif first == last:
        for rest in _hex_digits(low % unit, high % unit, n - 1):
            yield f"[{''.join(dict.fromkeys(f'{first:X}{first:x}'))}] {rest}"
    else:
        yield from _hex_digits(low, first * unit + unit - 1, n)
        if last > first + 1:
            yield from _hex_digits((first + 1) * unit, last * unit - 1, n)
        yield from _hex_digits(last * unit, high, n)


def _pairs(low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ranges of both surrogates which those of the characters from low to high are in."""
    first, last = (low - 0x10000) >> 10, (high - 0x10000) >> 10
    start, stop = low & 0x3FF, high & 0x3FF
    if first == last or (start == 0 and stop == 0x3FF):
        yield 0xD800 + first, 0xD800 + last, 0xDC00 + start, 0xDC00 + stop
        return
    yield 0xD800 + first, 0xD800 + first, 0xDC00 + start, 0xDFFF
    if last > first + 1:
        yield 0xD800 + first + 1, 0xD800 + last - 1, 0xDC00, 0xDFFF
    yield 0xD800 + last, 0xD800 + last, 0xDC00, 0xDC00 + stop


class UnsupportedError(ValueError):
    """A schema has what a grammar cannot hold."""


class GrammarText:
    """Collects rules, whose names begin with ``fits``.

    Parameters
    ----------
    common
        Expressions by the names that they and :meth:`use` know them by; ``char`` is any character of a string.
    most_rules
        The limit of rules; more are a ValueError.
    """

    def __init__(self, common: Mapping[str, str], most_rules: int) -> None:
        self._common = common
        self._most_rules = most_rules
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # of expressions
        self._characters: dict[Ranges, str] = {}
        self._n_names = 0

    def written(self, start: str | None = None) -> str:
        """Return all rules; ``fits`` is the one that they start with."""
        rules = self._rules if start is None else {"fits": start, **self._rules}
        return "".join(f"{name} ::= {rule}\n" for name, rule in rules.items())

    def endless(self) -> dict[str, list[str]]:
        """Return the rules that no text of finite length fits, each with those among them that it names."""
        tokens = {name: _TOKEN.findall(rule) for name, rule in self._rules.items()}
        users: dict[str, list[str]] = {name: [] for name in tokens}
        for name, of_rule in tokens.items():
            for token in of_rule:
                if token in users:
                    users[token].append(name)
        ending: set[str] = set()
        todo = list(tokens)
        while todo:
            name = todo.pop()
            if name not in ending and _ends(tokens[name], ending):
                ending.add(name)
                todo += users[name]
        left = tokens.keys() - ending
        return {name: [token for token in tokens[name] if token in left] for name in left}

    def new_name(self) -> str:
        """Return the name of a rule that is to be defined."""
        self._n_names += 1
        if self._n_names > self._most_rules:
            raise ValueError(f"json_schema: it needs more than {self._most_rules} rules")
        return f"fits-{self._n_names}"

    def define(self, name: str, expression: str) -> None:
        """Define a rule."""
        self._rules[name] = expression

    def add(self, expression: str) -> str:
        """Return the name of a rule with this expression."""
        if expression not in self._names:
            self._names[expression] = self.new_name()
            self.define(self._names[expression], expression)
        return self._names[expression]

    def use(self, name: str) -> str:
        """Return the name of a common rule's rule."""
        if name == "char":
            return self.character(_ANY)
        full = f"fits-{name}"
        if full not in self._rules:
            self._rules[full] = ""  # it may use itself
            self._rules[full] = self.use_all(self._common[name])
        return full

    def use_all(self, expression: str) -> str:
        """Return an expression in which common rules stand under their short names."""
        token = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[a-z]+')
        return token.sub(lambda match: self.use(match[0]) if match[0].isalpha() else match[0], expression)

    def character(self, ranges: Ranges) -> str:
        """Return the name of the rule for one of these characters in a JSON string, in each of its spellings."""
        if ranges not in self._characters:
            self._characters[ranges] = self.add(self._spellings(ranges)) if ranges else self.use("nothing")
        return self._characters[ranges]

    def _spellings(self, ranges: Ranges) -> str:
        plain = _both(ranges, _UNESCAPED)
        short = "".join(
            f"\\x{ord(escape):02X}"
            for escape, character in _SHORT_ESCAPES.items()
            if any(low <= ord(character) <= high for low, high in ranges)
        )
        units = [digits for low, high in _both(ranges, ((0, 0xFFFF),)) for digits in _hex_digits(low, high, 4)]
        for low, high in _both(ranges, ((0x10000, 0x10FFFF),)):
            for a, b, c, d in _pairs(low, high):
                leads, trails = " | ".join(_hex_digits(a, b, 4)), " | ".join(_hex_digits(c, d, 4))
                units.append(rf'({leads}) "\\u" ({trails})')
        escapes = ([f"[{short}]"] if short else []) + [f'"u" ({" | ".join(units)})']
        return " | ".join(([_class(plain)] if plain else []) + [rf'"\\" ({" | ".join(escapes)})'])

    def one_of(self, values: Iterable[object]) -> str:
        """Return an expression for these values as :func:`json.dumps` writes them, with space between their parts."""
        texts: set[str] = set()
        parts: list[str] = []
        for value in values:
            if isinstance(value, list | dict) and value:
                parts.append(self._container(value))
                continue
            texts |= {json.dumps(value), json.dumps(value, ensure_ascii=False)}
            if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
                texts.add(str(int(value)))
        if texts:
            parts.append(self._one_of_texts(sorted(texts)))
        return "(" + " | ".join(parts) + ")"

    def _container(self, value: list[object] | dict[str, object]) -> str:
        space = self.use("space")
        if isinstance(value, list):
            items = [self.add(self.one_of([item])) for item in value]
        else:
            items = [
                f'{self.one_of([key])} {space} ":" {space} {self.add(self.one_of([item]))}'
                for key, item in value.items()
            ]
        left, right = "[]" if isinstance(value, list) else "{}"
        return f'"{left}" {space} ' + f' "," {space} '.join(items) + f' {space} "{right}"'

    def _one_of_texts(self, texts: list[str]) -> str:
        """Return an expression in which common beginnings stand once, so that few readings are open at a time."""
        start = ""
        todo = [("", texts, 0)]
        while todo:
            name, group, offset = todo.pop()
            parts = []
            at = 0
            while at < len(group):
                if len(group[at]) == offset:
                    parts.append('""')
                    at += 1
                    continue
                end = at
                while end < len(group) and group[end][offset : offset + 1] == group[at][offset]:
                    end += 1
                first, last = group[at], group[end - 1]
                common = offset
                while common < len(first) and common < len(last) and first[common] == last[common]:
                    common += 1
                part = _literal(first[offset:common])
                if end - at > 1:
                    rest = self.new_name()
                    todo.append((rest, group[at:end], common))
                    part += f" {rest}"
                parts.append(part)
                at = end
            if name:
                self.define(name, " | ".join(parts))
            else:
                start = " | ".join(parts)
        return start

    def other_strings(self, strings: Iterable[str]) -> str:
        """Return the name of the rule for any string but these, however they are spelled."""
        trie: list[tuple[dict[str, int], bool]] = [({}, False)]
        for string in strings:
            at = 0
            for character in string:
                children = trie[at][0]
                if character not in children:
                    children[character] = len(trie)
                    trie.append(({}, False))
                at = children[character]
            trie[at] = (trie[at][0], True)
        if len(trie) == 1 and not trie[0][1]:
            return self.use("string")
        names = [self.new_name() for _ in trie]
        rest = self.add(f"{self.use('char')}*")
        for name, (children, is_one) in zip(names, trie, strict=True):
            codes = [(ord(character), ord(character)) for character in children]
            parts = [f"{self.character(_without(_ANY, codes))} {rest}"]
            parts += [f"{self.character(((ord(c), ord(c)),))} {names[child]}" for c, child in children.items()]
            self.define(name, " | ".join(parts + ([] if is_one else ['""'])))
        return self.add(rf'"\"" {names[0]} "\""')


def pattern_expression(text: GrammarText, pattern: str) -> str:
    """Return an expression for the characters of a JSON string that a regular expression, as ECMA-262's, is found in.

    Raises ValueError for what a grammar cannot hold: looking around, references back, word boundaries, anchors within
    groups, Unicode properties.
    """
    return _Pattern(text, pattern).expression()


_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = _ranges(
    (ord(c), ord(c))
    for c in "\t\n\v\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(map(chr, range(0x2000, 0x200B)))
)
_LINE_ENDS: Ranges = ((0xA, 0xA), (0xD, 0xD), (0x2028, 0x2029))
_CLASSES = {
    **{"d": _DIGITS, "w": _WORD, "s": _SPACE},
    **{"D": _without(_ANY, _DIGITS), "W": _without(_ANY, _WORD), "S": _without(_ANY, _SPACE)},
}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
_COUNTS = re.compile(r"\{(\d+)(?:(,)(\d*))?\}", re.ASCII)
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|u\{([0-9a-fA-F]{1,8})\}")


class _Pattern:
    def __init__(self, text: GrammarText, pattern: str) -> None:
        self.text = text
        self.pattern = pattern
        self.at = 0

    def look(self, n: int = 1) -> str:
        return self.pattern[self.at : self.at + n]

    def take(self, expected: str) -> bool:
        found = self.pattern.startswith(expected, self.at)
        self.at += len(expected) if found else 0
        return found

    def refuse(self, what: str) -> ValueError:
        return UnsupportedError(f"{what} is not supported; overspill.guidance may know it")

    def expression(self) -> str:
        rest = f"{self.text.use('char')}*"
        parts = []
        for starts, ends, expression in self.alternatives(0):
            parts.append(" ".join(filter(None, ("" if starts else rest, expression, "" if ends else rest))) or '""')
        if self.at < len(self.pattern):
            raise ValueError(f"unbalanced parentheses in {self.pattern[:60]!r}")
        return " | ".join(parts)

    def alternatives(self, depth: int) -> list[tuple[bool, bool, str]]:
        found = [self.sequence(depth)]
        while self.take("|"):
            found.append(self.sequence(depth))
        return found

    def sequence(self, depth: int) -> tuple[bool, bool, str]:
        starts = ends = False
        items: list[str] = []
        while self.look() not in ("", "|", ")"):
            if self.look() in "^$":
                is_start = self.look() == "^"
                self.at += 1
                if depth > 0 or (bool(items) if is_start else self.look() not in ("", "|", "$")):
                    raise self.refuse(f"{'^' if is_start else '$'} within the pattern")
                starts, ends = starts or is_start, ends or not is_start
                continue
            if self.look() in "*+?" or _COUNTS.match(self.pattern, self.at):
                raise ValueError(f"nothing to repeat before {self.look()}")
            items.append(self.repeated(self.atom(depth)))
        return starts, ends, " ".join(items)

    def repeated(self, atom: str) -> str:
        if counts := _COUNTS.match(self.pattern, self.at):
            self.at = counts.end()
            low, high = counts[1], counts[3] if counts[2] else counts[1]
            if any(int(count[:9] or 0) > _MOST_COUNT for count in (low, high)):
                raise ValueError(f"{counts[0][:40]} has counts of more than {_MOST_COUNT}")
            if high and int(low) > int(high):
                raise ValueError(f"{counts[0]}: the most, {int(high)}, is below the least, {int(low)}")
            atom += f"{{{int(low)},{int(high) if high else ''}}}"
        elif self.look() and self.look() in "*+?":
            atom += self.look()
            self.at += 1
        else:
            return atom
        self.take("?")  # lazy: the same strings fit
        return atom

    def atom(self, depth: int) -> str:
        character = self.look()
        if character == "(":
            return self.group(depth + 1)
        if self.look(2) == "{,":
            raise self.refuse("{,")
        if character == "[":
            return self.text.character(self.klass())
        self.at += 1
        if character == ".":
            return self.text.character(_without(_ANY, _LINE_ENDS))
        if character == "\\":
            return self.text.character(self.escape(in_class=False))
        return self.text.character(((ord(character), ord(character)),))

    def group(self, depth: int) -> str:
        if depth > _MOST_GROUPS:
            raise ValueError(f"groups within more than {_MOST_GROUPS} others")
        self.at += 1
        if self.look() == "?" and not self.take("?:"):
            name = re.compile(r"\?<[A-Za-z_$][\w$]*>").match(self.pattern, self.at)
            if not name:
                raise self.refuse(f"({self.look(3)}")
            self.at = name.end()
        parts = [expression or '""' for _, _, expression in self.alternatives(depth)]
        if not self.take(")"):
            raise ValueError(f"unbalanced parentheses in {self.pattern[:60]!r}")
        return f"({' | '.join(parts)})"

    def klass(self) -> Ranges:
        self.at += 1
        negated = self.take("^")
        parts: list[tuple[int, int]] = []
        if self.look() == "]":
            raise self.refuse("an empty class")
        while not self.take("]"):
            low = self.class_item()
            if self.look() == "-" and self.look(2) not in ("-]", "-"):
                self.at += 1
                high = self.class_item()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1]:
                    raise ValueError("a range in a class that is not from one character to another")
                if high[0][0] < low[0][0]:
                    raise ValueError("a range in a class that ends before it begins")
                low = ((low[0][0], high[0][0]),)
            parts += low
        return _without(_ANY, parts) if negated else _both(_ranges(parts), _ANY)

    def class_item(self) -> Ranges:
        character = self.look()
        if character == "":
            raise ValueError("unterminated character class")
        self.at += 1
        return self.escape(in_class=True) if character == "\\" else ((ord(character), ord(character)),)

    def escape(self, in_class: bool) -> Ranges:
        character = self.look()
        if character == "":
            raise ValueError("a backslash at the end")
        if coded := _CODE.match(self.pattern, self.at):
            self.at = coded.end()
            code = int(next(filter(None, coded.groups())), 16)
            if 0xD800 <= code < 0xDC00 and (
                pair := re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})").match(self.pattern, self.at)
            ):
                self.at = pair.end()
                code = 0x10000 + ((code - 0xD800) << 10) + int(pair[1], 16) - 0xDC00
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise ValueError(f"\\{coded[0]} is no character")
            return ((code, code),)
        self.at += 1
        if character in _CLASSES:
            return _CLASSES[character]
        code = _CONTROLS.get(character, ord(character))
        if character == "c" and re.match("[A-Za-z]", self.look()):
            code = ord(self.look()) % 32
            self.at += 1
        elif character == "b" and in_class:
            code = 8
        elif character == "0" and not self.look().isdecimal():
            code = 0
        elif character not in _CONTROLS and character.isalnum():
            raise self.refuse(f"\\{character}")
        return ((code, code),)
