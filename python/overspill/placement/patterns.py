"""Few and short regular expressions that match the names of given tensors, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from overspill.header.tensor_names import layer_of

__all__ = ["patterns_for"]


@dataclass
class _Group:
    """Layers that share one pattern, and the names that it must and must not match."""

    layers: list[int]
    wanted: set[str]
    unwanted: set[str]


def patterns_for(moved: Mapping[str, str], names: Iterable[str], devices: Sequence[str]) -> list[tuple[str, str]]:
    """Return regular expressions that match exactly the tensors in ``moved``, each with its device.

    They have no comma and no equals sign, which have a meaning on llama-server's command line.

    Parameters
    ----------
    moved
        The devices of tensors, by name.
    names
        The names of all tensors of the model.
    devices
        The devices, in the order of the result.
    """
    # By the text before a layer's number, and the number; tensors outside of layers count as one layer.
    layers: dict[tuple[str, int | None], list[str]] = {}
    for name in names:
        layer = layer_of(name)
        before = "" if layer is None else name.partition(f"{layer}.")[0]
        layers.setdefault((before, layer), []).append(name[len(before) + len(f"{layer}.") :] if before else name)
    found: list[tuple[str, str]] = []
    for device in devices:
        groups: dict[str, list[_Group]] = {}
        for (before, layer), rests in layers.items():
            prefix = before if layer is None else f"{before}{layer}."
            wanted = {rest for rest in rests if moved.get(prefix + rest) == device}
            unwanted = set(rests) - wanted
            if not wanted:
                continue
            for group in groups.setdefault(before, []):
                if not group.wanted & unwanted and not wanted & group.unwanted:
                    break
            else:
                group = _Group([], set(), set())
                groups[before].append(group)
            group.layers += [] if layer is None else [layer]
            group.wanted |= wanted
            group.unwanted |= unwanted
        for before, alike in groups.items():
            for group in alike:
                numbers = f"{_numbers_pattern(group.layers)}\\." if group.layers else ""
                found.append((f"^{re.escape(before)}{numbers}{_names_pattern(group)}", device))
    return found


def _numbers_pattern(numbers: Iterable[int]) -> str:
    """Return a pattern of these numbers, such as ``([0-9]|1[0-5])``."""
    tens: dict[int, list[int]] = {}
    for number in sorted(numbers):
        tens.setdefault(number // 10, []).append(number % 10)
    alternatives = []
    for ten, digits in tens.items():
        if len(digits) == 10:
            last = "[0-9]"
        elif len(digits) == 1:
            last = str(digits[0])
        elif len(digits) > 2 and digits[-1] - digits[0] == len(digits) - 1:
            last = f"[{digits[0]}-{digits[-1]}]"
        else:
            last = f"[{''.join(map(str, digits))}]"
        alternatives.append(f"{ten or ''}{last}")
    return _alternatives(alternatives)


def _names_pattern(group: _Group) -> str:
    """Return a pattern of the wanted names of a group that matches none of the others."""
    if group.layers and not group.unwanted:
        return ""
    spoilt = {rest.partition(".")[0] for rest in group.unwanted}
    stems = sorted({rest.partition(".")[0] for rest in group.wanted} - spoilt)
    single = sorted(rest for rest in group.wanted if rest.partition(".")[0] in spoilt)
    # A stem ends at a word boundary, with or without a suffix such as .weight.
    whole = [f"{_stems_pattern(stems)}\\b"] if stems else []
    return _alternatives([*whole, *(f"{re.escape(rest)}$" for rest in single)])


def _stems_pattern(stems: Sequence[str]) -> str:
    """Return a pattern of stems; words that all begin or end with are written once: ``ffn_(down|up)_exps``."""
    if len(stems) == 1:
        return re.escape(stems[0])
    words = [stem.split("_") for stem in stems]
    n_start = _n_common([word[:-1] for word in words])
    n_end = _n_common([word[n_start + 1 :][::-1] for word in words])
    start = "".join(f"{word}_" for word in words[0][:n_start])
    end = "".join(f"_{word}" for word in words[0][len(words[0]) - n_end :])
    middles = [re.escape(stem[len(start) : len(stem) - len(end)]) for stem in stems]
    return f"{re.escape(start)}{_alternatives(middles)}{re.escape(end)}"


def _n_common(sequences: Sequence[Sequence[str]]) -> int:
    """Return the number of items that all sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))


def _alternatives(patterns: Sequence[str]) -> str:
    return patterns[0] if len(patterns) == 1 else f"({'|'.join(patterns)})"
