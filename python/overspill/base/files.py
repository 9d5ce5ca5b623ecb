"""The folders of the user, and files that are replaced whole."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "replace_json", "user_folder"]


def user_folder(variable: str, unix: str, mac: str) -> Path:
    """Return our folder in one of the user's; it need not be there yet.

    Parameters
    ----------
    variable
        The environment variable that names the user's folder.
    unix, mac
        Where it is otherwise, from the home folder on; on Windows it is the one for local data.
    """
    if variable in os.environ or sys.platform not in ("win32", "darwin"):
        folder = Path(os.environ.get(variable) or Path.home() / unix)
    elif sys.platform == "darwin":
        folder = Path.home() / mac
    else:
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return folder / "overspill"


def cache_folder() -> Path:
    """Return the folder of what is kept of this machine."""
    return user_folder("XDG_CACHE_HOME", ".cache", "Library/Caches")


def replace_json(file: Path, data: object) -> None:
    """Write a file, of which readers see the old content or the new, and nothing in between."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f"{file.stem}-", delete=False
    ) as draft:
        json.dump(data, draft, indent=1, allow_nan=False)
    Path(draft.name).replace(file)
