"""Print the seconds that this interpreter takes to import modules: ``import_modules.py MODULE ...``."""

from __future__ import annotations

import sys
import time
from importlib import import_module


def main() -> None:
    """Import, and print."""
    start = time.perf_counter()
    for name in sys.argv[1:]:
        import_module(name)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
