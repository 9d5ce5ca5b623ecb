"""Changes by chance of bytes, texts and JSON values, towards what programs forget."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

__all__ = ["INTEGERS", "NUMBERS", "TEXTS", "log_uniform", "mutated_bytes", "mutated_json", "mutated_text"]

INTEGERS = (
    *(0, 1, -1, 2, 3, 7, 31, 32, 33, 64, 127, 128, 255, 256, 257, 512, 513, 1000, 1024, 1025, 4096, 4097, 65535, 65536),
    *(10**6, 10**9, 2**31 - 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1),
    *(2**63, 2**64 - 1, -2, -128, -32768, -(2**31), -(2**31) - 1, -(2**63)),
)
NUMBERS = (*INTEGERS, 0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 1e-300, 1e38, 1e308, math.inf, -math.inf, math.nan)
TEXTS = (
    *("", " ", "\n", "\t", "\0", "a", "A", "0", "-", '"', "'", "\\", "/", "{", "}", "[", "]", "(", ")", "<", ">", "%s"),
    *("{{", "}}", "{%", "%}", "<|", "|>", "</think>", "true", "null", "nan", "1e999", "-1", "0x", "#", "$", "^", "*"),
    *(
        "\u00e9",
        "e\u0301",
        "ß",
        "İ",
        "日本語",
        "🙂",
        "👩‍👩‍👧",
        "\u202e",
        "\u200b",
        "\ufeff",
        "\ufffd",
        "\ufffe",
        "\ue000",
    ),
    *("\U0010ffff", "\x7f", "\x80", "\r\n", "\u2028", "..", "CON", "a" * 300, "é" * 300),
)

_MOST_WORDS, _MOST_CHARACTERS = 50_000, 500_000


def log_uniform(random: Random, most: int) -> int:
    """Return an integer from 1 to ``most``, small ones more often."""
    return min(most, int(math.exp(random.uniform(0.0, math.log(most + 1)))))


def times(random: Random, change: Callable[[], None]) -> None:
    """Do something once, or a few times."""
    for _ in range(1 + int(random.expovariate(1.0))):
        change()


def mutated_bytes(random: Random, data: bytes) -> bytes:
    """Return ``data`` with bits, bytes and stretches changed, moved, dropped or added."""
    changed = bytearray(data)

    def change() -> None:
        at = random.randrange(len(changed) + 1)
        end = min(len(changed), at + log_uniform(random, 64))
        match random.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                changed[at:end] = random.randbytes(end - at)
            case 2:
                del changed[at:end]
            case 3:
                changed[at:at] = changed[at:end] * log_uniform(random, 100)
            case 4:
                n = random.choice((1, 2, 4, 8))
                value = random.choice(INTEGERS) % (1 << (8 * n))
                changed[at : at + n] = value.to_bytes(n, "little")
            case 5:
                del changed[at:]
            case _:
                other = random.randrange(len(changed) + 1)
                changed[at:at] = changed[other : other + log_uniform(random, 200)]

    times(random, change)
    return bytes(changed)


def mutated_text(random: Random, text: str, pieces: Sequence[str] = ()) -> str:
    """Return ``text`` with some of its words changed, moved, dropped, repeated or nested.

    ``pieces`` are the words of the language that it is in.
    """
    # In pieces of the text's own language, so that much of what comes out nearly is in it.
    words = _words(text)

    def piece() -> str:
        kind = random.random()
        if pieces and kind < 0.6:
            return random.choice(pieces)
        if kind < 0.7:
            return str(random.choice(NUMBERS))
        if kind < 0.9 or not words:
            return random.choice(TEXTS)
        return chr(random.choice((random.randrange(128), random.randrange(0xD800), random.randrange(0xE000, 0x110000))))

    def change() -> None:
        at = random.randrange(len(words) + 1)
        end = min(len(words), at + log_uniform(random, 20))
        match random.randrange(9):
            case 0:
                words.insert(at, piece())
            case 1:
                words[at : at + 1] = [piece()]
            case 2:
                del words[at:end]
            case 3:
                other = random.randrange(len(words) + 1)
                words[at:at] = words[other : other + log_uniform(random, 20)]
            case 4:
                words[at:end] = words[at:end] * log_uniform(random, 3000)
            case 5:
                words.insert(at, piece() * log_uniform(random, 3000))
            case 6:
                opening, closing = random.choice(("()", "[]", "{}", '""', "<>"))
                n = log_uniform(random, 3000)
                words.insert(end, closing * random.choice((n, n, n, 0, 1)))
                words.insert(at, opening * n)
            case 7 if end > at:
                other = random.randrange(at, end)
                words[at], words[other] = words[other], words[at]
            case _:
                if at < len(words):
                    word = words[at]
                    cut = random.randrange(len(word) + 1)
                    words[at] = word[:cut] + piece() + word[cut + random.randrange(2) :]

    def change_unless_long() -> None:
        change()
        del words[_MOST_WORDS:]

    times(random, change_unless_long)
    return "".join(words)[:_MOST_CHARACTERS]


def _words(text: str) -> list[str]:
    words: list[str] = []
    kind = ""
    for character in text:
        is_word = character.isalnum() or character in "_-"
        now = "word" if is_word else "space" if character.isspace() else ""
        if now and now == kind:
            words[-1] += character
        else:
            words.append(character)
        kind = now
    return words


def any_json(random: Random, depth: int = 0) -> Any:
    """Return a value that JSON can hold, numbers without end among them."""
    kind = random.randrange(9 if depth < 3 else 6)
    match kind:
        case 0:
            return random.choice((None, True, False))
        case 1 | 2:
            return random.choice(NUMBERS)
        case 3 | 4 | 5:
            return random.choice(TEXTS)
        case 6:
            return [any_json(random, depth + 1) for _ in range(random.randrange(4))]
        case 7:
            return {random.choice(TEXTS): any_json(random, depth + 1) for _ in range(random.randrange(4))}
        case _:
            value: Any = any_json(random, 3)
            name = random.choice(TEXTS)
            for _ in range(log_uniform(random, 500)):
                value = [value] if kind == 8 and random.random() < 0.5 else {name: value}
            return value


def mutated_json(random: Random, value: Any, names: Sequence[str] = ()) -> Any:
    """Return a copy of a JSON value with some of its parts replaced, moved, dropped, renamed or repeated.

    ``names`` are what its mappings may say.
    """
    whole = [copy.deepcopy(value)]

    def copied(part: Any) -> Any:
        try:
            return copy.deepcopy(part)
        except RecursionError:
            return None

    def places() -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = []
        waiting: list[tuple[Any, Any]] = [(whole, 0)]
        while waiting:
            holder, key = waiting.pop()
            found.append((holder, key))
            inner = holder[key]
            if isinstance(inner, dict):
                waiting += [(inner, name) for name in inner]
            elif isinstance(inner, list) and len(inner) <= 200:
                waiting += [(inner, i) for i in range(len(inner))]
        return found

    def change() -> None:
        known = places()
        if len(known) > _MOST_WORDS:
            return
        holder, key = random.choice(known)
        others, other_key = random.choice(known)
        old = holder[key]
        match random.randrange(9):
            case 0 | 1:
                holder[key] = any_json(random)
            case 2 if isinstance(old, int | float) and not isinstance(old, bool):
                holder[key] = random.choice((old + 1, old - 1, -old, float(old), str(old), [old], old * 1000))
            case 2 if isinstance(old, str):
                holder[key] = mutated_text(random, old[:2000])
            case 3 if holder is not whole:
                del holder[key]
            case 4:
                holder[key] = copied(others[other_key])
            case 5 if isinstance(holder, dict):
                name = random.choice(names) if names and random.random() < 0.7 else random.choice(TEXTS)
                holder[name] = holder.pop(key)
            case 6 if isinstance(old, dict):
                name = random.choice(names) if names and random.random() < 0.8 else random.choice(TEXTS)
                old[name] = copied(others[other_key]) if random.random() < 0.5 else any_json(random)
            case 6 | 7 if isinstance(old, list):
                old[:] = old * log_uniform(random, 200 if len(old) < 20 else 2)
            case 8 if names:
                for _ in range(log_uniform(random, 300)):
                    old = {random.choice(names): old} if random.random() < 0.8 else [old]
                holder[key] = old
            case _:
                holder[key] = random.choice((None, [], {}, "", [old], {"a": old}))

    times(random, change)
    return whole[0]


def mutated_json_text(random: Random, value: Any, names: Sequence[str] = ()) -> str:
    """Return the text of a changed JSON value; sometimes the text is changed as well, or instead."""
    how = random.random()
    if how < 0.8:
        value = mutated_json(random, value, names)
    try:
        text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    except (ValueError, RecursionError):
        text = "[" * 100_000
    return mutated_text(random, text, names) if how > 0.7 else text
