"""Give each Python program that finds this folder a stand-in GPU, as a driver gives a real one, for overspill's import.

Python imports this module when it starts. The environment says how large the GPU is, and where the stand-in lies; see
``gpu_visibility``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _AfterImport:
    """Finds overspill as others do, and has the stand-in registered once it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the other finders' answer for overspill, and none for everything else."""
        if name != "overspill":
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # whoever asks need not be who imports
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            from gpu_visibility import register_stand_in

            register_stand_in()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if os.environ.get("OVERSPILL_TEST_STAND_IN"):
    sys.meta_path.insert(0, _AfterImport())
