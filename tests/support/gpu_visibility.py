"""Which GPUs this process and those that it starts see: none, the real ones, or a stand-in. See ``gpu_worlds``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from programs import SUPPORT, WITHOUT_GPU, python_environment

# The size of the stand-in's memory, "" for none; where its library lies; a child's world, and the file of its reports.
SIZE, TOOLS, WORLD, REPORTS = (f"OVERSPILL_TEST_{name}" for name in ("STAND_IN", "TOOLS", "WORLD", "REPORTS"))
BESIDE = "OVERSPILL_TEST_BESIDE_GPU"
STAND_IN_NAME = "GPU0"
STAND_IN_SIZE = "2GiB"
EVERYWHERE = SUPPORT / "stand_in_everywhere"


@cache
def gpus_here() -> tuple[str, ...]:
    """Return the names of the GPUs in this process."""
    from overspill import devices

    return tuple(device.name for device in devices() if device.is_gpu and device.backend != "RPC")


@cache
def tools_folder() -> Path:
    """Return the folder of the compiled tools, the stand-in among them."""
    from upstream_tools import build_upstream_tools

    return build_upstream_tools(SUPPORT.parents[1] / "build" / "upstream-tools")


def register_stand_in() -> None:
    """Give this process the stand-in that the environment describes."""
    from overspill.base.units import parse_bytes

    # A copy of its own: it may be this very module whose import of overspill has led here.
    spec = importlib.util.spec_from_file_location("upstream_tools_of_stand_in", SUPPORT / "upstream_tools.py")
    assert spec is not None
    assert spec.loader is not None
    tools = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tools
    spec.loader.exec_module(tools)
    tools.stand_in_gpu(Path(os.environ[TOOLS]), STAND_IN_NAME, parse_bytes(SIZE, os.environ[SIZE]))


# The environment before GPUs were hidden.
_before = dict(os.environ)


@cache
def gpu_environment() -> dict[str, str]:
    """Return the environment of programs that are to see the GPU, or a stand-in if there is none."""
    look = "import overspill; print(sum(device.is_gpu for device in overspill.devices()))"
    done = subprocess.run([sys.executable, "-c", look], env=_before, stdout=subprocess.PIPE, text=True, check=True)
    if int(done.stdout):
        return _before
    path = python_environment(EVERYWHERE)["PYTHONPATH"]
    return {**_before, **WITHOUT_GPU, "PYTHONPATH": path, SIZE: STAND_IN_SIZE, TOOLS: str(tools_folder())}


def enter_world() -> None:
    """Hide GPUs from this process, or show what is in a GPU's place: before overspill is imported, which looks."""
    if WORLD in os.environ:
        return
    assert "overspill" not in sys.modules
    if not os.environ.get(BESIDE):
        os.environ |= WITHOUT_GPU
        return
    os.environ |= gpu_environment()
    if os.environ.get(SIZE):
        register_stand_in()
