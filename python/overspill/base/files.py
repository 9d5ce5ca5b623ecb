"""The folders of the user, and JSON files: read strictly, and replaced whole."""

from __future__ import annotations

import io
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overspill._core import Error

__all__ = [
    "cache_folder",
    "expanded",
    "finite",
    "open_regular",
    "read_json",
    "replace_json",
    "replacing",
    "user_folder",
    "without_repetition",
]


def user_folder(variable: str, unix: str, mac: str) -> Path:
    """Return Overspill's folder in one of the user's folders; it may not exist yet.

    Parameters
    ----------
    variable
        The environment variable that names the user's folder.
    unix, mac
        The user's folder, relative to the home folder, where the variable is not set. On Windows it is the folder
        for local data.
    """
    if variable in os.environ or sys.platform not in ("win32", "darwin"):
        folder = Path(os.environ.get(variable) or Path.home() / unix)
    elif sys.platform == "darwin":
        folder = Path.home() / mac
    else:
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return folder / "overspill"


def cache_folder() -> Path:
    """Return the folder for measurements of this machine."""
    return user_folder("XDG_CACHE_HOME", ".cache", "Library/Caches")


def expanded(path: Path) -> Path:
    """Return the path with ``~`` replaced by the home folder; as it is if there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def replace_json(file: Path, data: object) -> None:
    """Write ``data`` to a file as JSON; readers see the old content or the new, never a part."""
    text = json.dumps(data, indent=1, allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as draft:
        draft.write(text.encode())


@contextmanager
def replacing(file: Path) -> Iterator[io.BufferedWriter]:
    """Open a draft that takes the place of a file once it is whole and on the disk; until then the old one stays."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem:.40}-")
    try:
        with open(handle, "wb") as draft:  # noqa: PTH123  # it is open already
            yield draft
            draft.flush()
            os.fsync(draft.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink()
        raise


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a file to be read without a buffer; an Error if it is no regular file, OSError if it cannot be opened."""
    file = Path(path)
    # A pipe would be waited for.
    if not stat.S_ISREG(file.stat().st_mode):
        raise Error(f"{path}: is {'a folder' if file.is_dir() else 'no regular file'}")
    return io.FileIO(file)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return what a JSON file says; it is read strictly, since what is damaged must not pass for something else.

    Raises
    ------
    Error
        The file is missing, cannot be read, or is no regular file.
    ValueError
        It is no JSON in UTF-8, has a key twice, a number that is not finite, or text that UTF-8 cannot hold.
    """
    try:
        with open_regular(path) as file:
            content = file.readall()
    except OSError as error:
        raise Error(f"{path}: {error.strerror or error}") from None
    try:
        data = json.loads(
            content.decode(), object_pairs_hook=without_repetition, parse_float=finite, parse_constant=finite
        )
        json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{path} is no JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return data


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; a ValueError if it has a key twice, of which one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def finite(text: str) -> float:
    """Return a number of JSON; a ValueError if it is beyond what a float holds, or none."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.20} is no finite number")
    return number
