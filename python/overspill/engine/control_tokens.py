"""Control tokens that a conversation's own texts spell out: they stay text in the prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from overspill._core import Model
from overspill.base.cached import cached_property

__all__ = ["ControlTokens", "unused_character"]

NativeModel: TypeAlias = Model


class ControlTokens:
    """The control tokens of a vocabulary, and the texts in which they are only text.

    A mark, a character that nothing else in the conversation has, is put into each name of a control token that a
    message spells out, behind its first character. A template copies the mark with the text. So in its prompt the names
    without a mark are the template's own.
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

    def _at(self, text: str, place: int) -> str | None:
        """Return the longest name that begins at a place of a text, or None."""
        for length in self._lengths.get(text[place], ()):
            if (name := text[place : place + length]) in self._names:
                return name
        return None

    def marked(self, value: Any, mark: str) -> Any:
        """Return a copy of a text, or of the lists and mappings of texts, with marks in the names of control tokens."""
        if isinstance(value, str):
            return self._marked_text(value, mark)
        if isinstance(value, Mapping):
            return {self.marked(key, mark): self.marked(part, mark) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(part, mark) for part in value]
        return value

    def _marked_text(self, text: str, mark: str) -> str:
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
                plain = plain.lstrip() if drops_space else plain
                yield plain.rstrip() if following and self._strips[following][0] else plain, False
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


def unused_character(text: str) -> str:
    """Return a character that a text does not have, and its JSON neither: a letter without case."""
    used, escapes = set(text), set(re.findall(r"\\u([0-9a-f]{4})", text.lower()))
    letters = (chr(code) for code in range(0xA000, 0x110000) if f"{code:04x}" not in escapes)
    return next(letter for letter in letters if letter not in used and letter.isalpha())
