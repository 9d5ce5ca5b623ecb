"""Python programs that tests start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
# What hides GPUs from a program: CUDA and ROCm stop at the first index that is none, Vulkan takes only what is named;
# the last one is the stand-in of ``gpu_worlds``.
WITHOUT_GPU = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "ROCR_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "",
    "OVERSPILL_TEST_STAND_IN": "",
}


def python_environment(*folders: Path, **changes: str) -> dict[str, str]:
    """Return this environment, in which programs find the modules beside this one and those in ``folders``."""
    paths = [str(path) for path in (SUPPORT, *folders)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}


def in_process(script: str, *arguments: str, folders: Sequence[Path] = ()) -> Any:
    """Run Python code, and return the JSON that it prints. What it measures is not kept for others."""
    command = [sys.executable, "-c", script, *arguments]
    with tempfile.TemporaryDirectory() as cache:
        environment = python_environment(*folders, XDG_CACHE_HOME=cache, **WITHOUT_GPU)
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
