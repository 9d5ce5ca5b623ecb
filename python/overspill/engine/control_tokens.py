"""Control tokens that a conversation's own texts spell out: they stay text in the prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from overspill._core import Model
from overspill.base.cached import cached_property

__all__ = ["ControlTokens", "rewritten", "unused_character", "written_out"]

NativeModel: TypeAlias = Model

_WHITE = " \t\n\v\f\r"  # what llama.cpp's isspace() says, and no other white space


class ControlTokens:
    """The control tokens of a vocabulary, and the texts in which they are only text.

    A mark, a character that nothing else in the conversation has, is put into each name of a control token that a
    message spells out, behind its first character. A template copies the mark with the text. So in its prompt the names
    without a mark are the template's own.

    A template can also cut a text, and what is left may be a name. Then marks around every character tell: no name that
    has a character of a message is without one.
    """

    def __init__(self, model: NativeModel) -> None:
        """Take the control tokens of a model's vocabulary."""
        self._strips = {text: (left, right) for text, left, right in model.control_tokens()}
        # A mark has no place in a single character.
        self._names = {name for name in self._strips if len(name) > 1}

    @cached_property
    def _begins(self) -> frozenset[str]:
        return frozenset(name[:n] for name in self._names for n in range(1, len(name)))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(name[n:] for name in self._names for n in range(1, len(name)))

    @cached_property
    def _middles(self) -> frozenset[str]:
        """What is left of names without some of the brackets around them."""
        found = set()
        for name in self._names:
            word = re.search(r"\w.*\w|\w", name)
            if word:
                found |= {name[a:b] for a in range(1, word.start() + 1) for b in range(word.end(), len(name) + 1)}
        return frozenset(found)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._names), default=0)

    @cached_property
    def _lengths(self) -> dict[str, list[int]]:
        """Lengths of the names that begin with a character, the longest first."""
        lengths: dict[str, set[int]] = {}
        for name in self._names:
            lengths.setdefault(name[0], set()).add(len(name))
        return {first: sorted(of_it, reverse=True) for first, of_it in lengths.items()}

    @cached_property
    def _first(self) -> re.Pattern[str]:
        return re.compile("[" + re.escape("".join(self._lengths)) + "]" if self._lengths else "(?!)")

    @cached_property
    def _characters(self) -> frozenset[str]:
        """What names are made of, but for white space: templates take that away around texts."""
        return frozenset(letter for name in self._names for letter in name if not letter.isspace())

    @cached_property
    def _brackets(self) -> frozenset[str]:
        """What names are told from words by."""
        return frozenset(letter for letter in self._characters if not (letter.isalnum() or letter in "-_"))

    def _at(self, text: str, place: int) -> str | None:
        """Return the longest name that begins at a place of a text, or None."""
        for length in self._lengths.get(text[place], ()):
            if (name := text[place : place + length]) in self._names:
                return name
        return None

    def fenced(self, text: str, mark: str) -> str:
        """Return a text with marks around each character that names have, if it can be cut so that a name is left."""
        if not any(letter in text for letter in self._brackets):
            return self.marked(text, mark)
        return text.translate({ord(letter): f"{mark}{letter}{mark}" for letter in self._characters})

    def marked(self, text: str, mark: str) -> str:
        """Return a text with marks in the names of control tokens, and where the text around it may complete one."""
        places = [match.start() for match in self._first.finditer(text) if self._at(text, match.start())]
        # The template, or the next text, may go on with the rest of a name; some templates strip spaces first.
        last = places[-1] if places else -1
        for size in sorted({len(text), len(text.rstrip())}):
            for n in range(min(self._longest, size), 0, -1):
                if size - n > last and text[size - n : size] in self._begins:
                    places.append(size - n)
        places = sorted(set(places))
        # Or it may have begun one.
        begin = text.lstrip()
        goes_on = begin in self._middles or any(begin[:n] in self._ends for n in range(1, self._longest))
        pieces, before = [mark] if goes_on else [], 0
        for place in places:
            pieces += [text[before : place + 1], mark]
            before = place + 1
        return "".join([*pieces, text[before:]])

    def names(self, text: str) -> list[str]:
        """Return the control tokens of a prompt with marks."""
        return [name for name, _, _ in self._pieces(text) if name is not None]

    def parts(self, text: str, mark: str) -> Iterator[tuple[str, bool]]:
        """Yield the parts of a prompt with marks, without them; and whether control tokens are recognised in each.

        The prompt is cut only at control tokens, where a tokenizer cuts it as well.
        """
        begin = end = 0  # of the part with control tokens that was read, but not yielded yet
        drops_space = False
        for kind, a, b in self._pieces(text):
            if kind is None and mark in text[a:b]:
                if begin < end:
                    yield text[begin:end], True
                plain = text[a:b].replace(mark, "")
                following = self._at(text, b) if b < len(text) else None
                plain = plain.lstrip(_WHITE) if drops_space else plain
                yield plain.rstrip(_WHITE) if following and self._strips[following][0] else plain, False
                begin = b
            end = b
            drops_space = kind is not None and self._strips[kind][1]
        if begin < end:
            yield text[begin:end], True

    def without_last(self, text: str) -> str:
        """Return a text without the control token at its end, if it has one."""
        last = list(self._pieces(text))[-1:]
        return text[: last[0][1]] if last and last[0][0] is not None else text

    def _pieces(self, text: str) -> Iterator[tuple[str | None, int, int]]:
        """Yield the name, or None, the beginning and the end of control tokens and of what is between them."""
        done = 0
        for match in self._first.finditer(text):
            place = match.start()
            if place >= done and (name := self._at(text, place)):
                if done < place:
                    yield None, done, place
                done = place + len(name)
                yield name, place, done
        if done < len(text):
            yield None, done, len(text)


# Keys of messages and tools whose values are a caller's own data, and those whose value has names of its own as keys.
_DATA = frozenset({"arguments", "const", "default", "enum", "examples"})
_NAMED = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})


def rewritten(value: Any, rewrite: Callable[[str], str]) -> Any:
    """Return a copy of a message or a tool in which each text is another one.

    Words that OpenAI's API and JSON Schema give a meaning stay, as keys and as types: a template looks for them. Keys
    of arguments, and names of properties, are texts.
    """
    if isinstance(value, str):
        return rewrite(value)
    if isinstance(value, list):
        return [rewritten(part, rewrite) for part in value]
    if not isinstance(value, Mapping):
        return value
    changed = {}
    for key, part in value.items():
        if not _is_word(key):
            changed[rewrite(key)] = _all_rewritten(part, rewrite)
        elif key in _DATA:
            changed[key] = _all_rewritten(part, rewrite)
        elif key in _NAMED and isinstance(part, Mapping):
            changed[key] = {rewrite(name): rewritten(schema, rewrite) for name, schema in part.items()}
        elif key == "type" and all(map(_is_word, part if isinstance(part, list) else [part])):
            changed[key] = part
        else:
            changed[key] = rewritten(part, rewrite)
    return changed


def _all_rewritten(value: Any, rewrite: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return rewrite(value)
    if isinstance(value, list):
        return [_all_rewritten(part, rewrite) for part in value]
    if isinstance(value, Mapping):
        return {rewrite(key): _all_rewritten(part, rewrite) for key, part in value.items()}
    return value


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.removeprefix("$").isidentifier()


def unused_character(text: str) -> str:
    """Return a character that a text does not have, however it is written there: a letter without case, if one is left.

    Raises
    ------
    ValueError
        The text has every character.
    """
    used = set(text)
    escapes = {int(digits, 16) for digits in re.findall(r"\\u([0-9a-f]{4})", text.lower())}
    for is_last_resort in (False, True):
        for code in range(0xA000, 0x110000):
            letter = chr(code)
            if letter in used or 0xD800 <= code < 0xE000 or _escaped(code) & escapes:
                continue
            if is_last_resort or (letter.isalpha() and letter.lower() == letter.upper() == letter):
                return letter
    raise ValueError("messages have every character that there is; one has to be left, to tell texts from the template")


def _escaped(code: int) -> set[int]:
    """Return the numbers by which JSON writes a character."""
    units = chr(code).encode("utf-16-be")
    return {int.from_bytes(units[i : i + 2]) for i in range(0, len(units), 2)}


def written_out(text: str, mark: str) -> str:
    """Return a text in which the mark is a character wherever a template has written it by its number."""
    return text.replace(json.dumps(mark)[1:-1], mark)
