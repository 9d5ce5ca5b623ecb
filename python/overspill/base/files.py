"""The folders of the user, and files that are replaced whole."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "replace_json", "user_folder"]


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


def replace_json(file: Path, data: object) -> None:
    """Write ``data`` to a file as JSON; readers see the old content or the new, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f"{file.stem}-", delete=False
    ) as draft:
        json.dump(data, draft, indent=1, allow_nan=False)
    Path(draft.name).replace(file)
