"""Ctrl-C ends every call: one at a time, in a process of its own, is interrupted in its middle.

``pytest -s -m "" tests/engine/test_interrupts.py`` prints how many seconds each took to end, which should be below one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from long_calls import CALLS
from programs import WITHOUT_GPU, python_environment
from sweeps import sweep

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="os.kill() does not interrupt on Windows"),
    pytest.mark.usefixtures("no_gpu"),
]
LIMIT_S = 15
"""Of a busy machine; nothing here ends by itself in that time."""


@pytest.mark.parametrize("name", sweep(CALLS, always=[list(CALLS).index("stream of a long prompt")]))
def test_ctrl_c_ends_it(name: str, tiny_gpt_oss_path: Path, vocabularies: Path, tmp_path: Path) -> None:
    """It arrives as KeyboardInterrupt; what keeps its results returns them."""
    command = [sys.executable, "-m", "long_calls", name, str(tiny_gpt_oss_path), str(vocabularies), str(tmp_path)]
    environment = python_environment(XDG_CACHE_HOME=str(tmp_path), **WITHOUT_GPU)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = json.loads(done.stdout)
    print(f"{name}: {seconds:.2f} s")  # noqa: T201
    assert seconds < LIMIT_S
