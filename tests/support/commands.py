"""``overspill`` as a shell runs it, in a process of its own with files for its standard streams."""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from gpu_visibility import BESIDE

# Half of what most commands take is Python's imports, so the processes are copies of one that has done them.
LAUNCHER = """
import json, os, signal, sys
from overspill.cli.app import main

requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
for line in requests:
    arguments, environment, folder, streams = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        for number, name in enumerate(streams):
            os.dup2(os.open(name, os.O_RDWR), number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["overspill", *arguments]
        main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


@cache
def _launcher() -> subprocess.Popen[str]:
    # A process with threads must not be copied.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(process.communicate)
    return process


def overspill(
    *arguments: object, stdin: str = "", environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run the command; return its exit code and what it wrote."""
    given = [str(argument) for argument in arguments]
    if not hasattr(os, "fork") or BESIDE in os.environ:  # a GPU cannot be used in a copy of a process
        command = [sys.executable, "-m", "overspill", *given]
        return subprocess.run(
            command, input=stdin, capture_output=True, encoding="utf-8", timeout=120, env=dict(environment)
        )
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        for stream in streams:
            stream.write_text(stdin if stream.name == "stdin" else "", encoding="utf-8")
        launcher = _launcher()
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        request = [given, dict(environment), str(Path.cwd()), [str(stream) for stream in streams]]
        launcher.stdin.write(json.dumps(request) + "\n")
        launcher.stdin.flush()
        code = int(launcher.stdout.readline())
        output, errors = (stream.read_text(encoding="utf-8") for stream in streams[1:])
        # A build for GPUs, which are hidden here, says so.
        errors = re.sub(r"^overspill: built with .*, but no usable GPU was found for it: .*\n", "", errors)
        return subprocess.CompletedProcess(given, code, output, errors)
