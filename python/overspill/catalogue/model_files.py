"""The names of GGUF files: parts of split models, quantisations, and the files that are no models by themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["has_quantisation", "is_gguf", "models_among", "models_in", "parts_of", "quantisation_in"]

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_QUANTISATION = re.compile(
    r"(?:^|[-_. ])((?:UD-)?"
    r"(?:I?Q\d(?:_(?:K|NL|XXS|XS|XL|S|M|L|\d))*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32))(?=[-_. ]|$)",
    re.IGNORECASE,
)


def is_gguf(name: str) -> bool:
    """Return whether a file is one of GGUF, by its name."""
    return name.lower().endswith(".gguf")


def parts_of(name: str) -> list[str]:
    """Return the names of all files of a model whose first file has this name."""
    part = _PART.search(name)
    if part is None or int(part[1]) != 1:
        return [name]
    n = int(part[2])
    return [f"{name[: part.start()]}-{i + 1:05}-of-{n:05}{name[-5:]}" for i in range(n)]


def quantisation_in(name: str) -> str:
    """Return the quantisation in the name of a file, such as ``Q4_K_M``; an empty text if there is none."""
    stem = _PART.sub("", name.rpartition("/")[2])
    stem = stem[:-5] if is_gguf(stem) else stem
    found = _QUANTISATION.findall(stem)
    return found[-1].upper() if found else ""


def has_quantisation(name: str, wanted: str) -> bool:
    """Return whether the file is of the quantisation that the user wrote, in any case, and without ``UD-`` at will."""
    found = quantisation_in(name).casefold()
    return wanted.casefold() in (found, found.removeprefix("ud-"))


def models_among(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the files of each model whose parts are all among the names, the first part first.

    Vision projectors are left out: they are a part of another model.
    """
    there = set(names)
    for name in sorted(there):
        part = _PART.search(name)
        if not is_gguf(name) or "mmproj" in name.rpartition("/")[2].lower() or (part and int(part[1]) != 1):
            continue
        parts = parts_of(name)
        if there.issuperset(parts):
            yield parts


def models_in(folder: Path, *, depth: int) -> Iterator[list[Path]]:
    """Yield the files of each model in a folder and in those below it, ``depth`` levels down.

    Hidden folders, those that cannot be read, and links that lead nowhere are left out.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        is_deepest = len(Path(place).relative_to(folder).parts) == depth
        real = os.path.realpath(place)
        is_known = real in seen  # by a link, which may lead back to where it is
        folders[:] = [] if is_deepest or is_known else sorted(one for one in folders if not one.startswith("."))
        if is_known:
            continue
        seen.add(real)
        for parts in models_among(files):
            found = [Path(place, part) for part in parts]
            if all(map(os.path.exists, found)):
                yield found
