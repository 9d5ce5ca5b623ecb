"""JSON files that are damaged: in their structure, in their values, and in their bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

# Whatever a value may be replaced by. Texts that begin with RAW are written as they are, since Python cannot hold them.
RAW = "@raw@"
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.5, -1.5, 1e308),
    *(
        "",
        "a",
        "0",
        "CPU",
        "cpu",
        "gpu",
        "0-3",
        "0-999999999",
        "9" * 400,
        "\0",
        "\x1b[31m",
        "x" * 10_000,
        "(",
        "(a+)+$",
    ),
    *([], {}, [None], [[]], [{}], {"a": None}, {"": ""}, ["a", "b"], [["a", "b"]], [["(", "CPU"]], [1, 2, 3]),
    *({"role": "user"}, {"role": "user", "content": []}, [{"role": "user", "content": {}}], [{"role": 1}]),
    *(f"{RAW}{text}" for text in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', '"\\u0000"')),
    *(f"{RAW}{text}" for text in ("[" * 100_000, "[" * 5000 + "]" * 5000, '{"a":' * 300 + "1" + "}" * 300)),
    *(f"{RAW}{text}" for text in ('{"a": 1, "a": 2}', "01", "'a'", "[1,]", "nul", "/* */ 1", "")),
)


def damaged(data: Any, seed: int, finish: Callable[[Any], Any] = lambda data: data) -> bytes:
    """Return a file with damage that the seed decides.

    ``finish`` is done to data after most of the damage to it: it may write a checksum that is right.
    """
    chance = random.Random(seed)
    data = copy.deepcopy(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = _changed(data, chance)
    if chance.random() < 0.9:
        data = finish(data)
    content = _written(data)
    return _broken(content, chance) if chance.random() < 0.25 else content


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container and key of it."""
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    for key, value in items:
        yield data, key
        yield from _places(value)


def _changed(data: Any, chance: random.Random) -> Any:
    places = list(_places(data))
    if not places or chance.random() < 0.02:
        return copy.deepcopy(chance.choice(VALUES))
    container, key = chance.choice(places)
    value = container[key]
    match chance.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[chance.choice(("", "a", f"{key} ", str(key).upper()))] = container.pop(key)
        case 2:
            container[key] = [value] if chance.random() < 0.5 else {"a": value}
        case 3 if isinstance(value, int | float) and not isinstance(value, bool):
            container[key] = chance.choice((-value, value + 1, value * 10**20, str(value), float(min(value, 1e300))))
        case 3 if isinstance(value, str):
            container[key] = chance.choice((value[:-1], value + "\ufffd", value.upper(), value * 3, list(value)))
        case 4 if isinstance(container, list):
            container.insert(key, copy.deepcopy(value))
        case 5:
            other, other_key = chance.choice(places)
            container[key] = copy.deepcopy(other[other_key])
        case _:
            container[key] = copy.deepcopy(chance.choice(VALUES))
    return data


def _written(data: Any) -> bytes:
    if isinstance(data, dict):
        return b"{" + b", ".join(json.dumps(key).encode() + b": " + _written(one) for key, one in data.items()) + b"}"
    if isinstance(data, list):
        return b"[" + b", ".join(map(_written, data)) + b"]"
    if isinstance(data, str) and data.startswith(RAW):
        return data.removeprefix(RAW).encode()
    return json.dumps(data).encode()


def _broken(content: bytes, chance: random.Random) -> bytes:
    """Return the content with its bytes damaged."""
    at = chance.randrange(len(content) + 1)
    match chance.randrange(6):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
        case 2:
            return content[:at] + chance.randbytes(chance.randrange(1, 9)) + content[at:]
        case 3:
            return content.decode().encode(chance.choice(("utf-16", "utf-8-sig", "utf-32-le")))
        case 4:
            return content * 2
        case _:
            return chance.choice((b"", b"\0" * 100, b"GGUF" + content, chance.randbytes(100)))
