"""Python programs that tests start."""

from __future__ import annotations

import os
from pathlib import Path

SUPPORT = Path(__file__).parent


def python_environment(*folders: Path, **changes: str) -> dict[str, str]:
    """Return this environment, in which programs find the modules beside this one and those in ``folders``."""
    paths = [str(path) for path in (SUPPORT, *folders)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}
