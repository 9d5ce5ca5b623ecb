"""Runs inputs in child processes, watches them from outside, and says how to repeat each fault.

An input is decided by its target, seed and number, so a fault is told by these three.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar

from programs import WITHOUT_GPU, python_environment

__all__ = ["Fault", "Target", "run", "serve"]

BATCH = 100
"""Inputs of one process."""
CPU_LIMIT_S, WALL_LIMIT_S = 20.0, 60.0
"""For one input. A busy machine stretches the second, not the first."""
MEMORY_LIMIT_BYTES = 1_500_000_000
"""By how much a process may grow."""
WATCHES_PROCESSES = Path("/proc/self/statm").exists()
"""Elsewhere only the clock limits an input."""
_TESTS = Path(__file__).parents[1]

Case = TypeVar("Case")


class Target(Protocol[Case]):
    """What is tried. One object serves the inputs of one process."""

    def make(self, random: Random) -> Case:
        """Return an input."""

    def check(self, case: Case) -> None:
        """Try it: whatever is raised is a fault."""


def input_of(target: Target[Any], name: str, seed: int, number: int) -> Any:
    """Return the input of a number."""
    return target.make(Random(f"{name} {seed} {number}"))


@dataclass(frozen=True)
class Fault:
    """An input that did harm."""

    number: int
    first: int
    """The first input of its process."""
    kind: str
    """What happened and where, the same for inputs that meet the same fault."""
    detail: str


# --- in the child


def serve(name: str, target: Target[Any], seed: int, first: int, last: int) -> None:
    """Try inputs; write a line before and after each to what was the standard output."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable()
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1)

    def tell(**what: Any) -> None:
        channel.write(json.dumps(what) + "\n")
        channel.flush()

    tell(ready=True)
    for number in range(first, last + 1):
        tell(begin=number)
        case = input_of(target, name, seed, number)
        fault = None
        try:
            target.check(case)
        except Exception as error:
            fault = {"kind": _kind(error), "detail": "".join(traceback.format_exception(error))[-6000:]}
        tell(end=number, fault=fault)


def _kind(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "overspill" in Path(frame.filename).parts or frame.name == "check"]
    where = ours[-1] if ours else frames[-1]
    said = re.sub(r"/\S+", "FILE", str(error).split("\n")[0])
    said = re.sub(r"0x[0-9a-f]+|\d+", "N", said)
    said = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", said)[:100]
    return f"{type(error).__name__} in {Path(where.filename).name}, {where.name}: {said}"


# --- in the parent


class _Child:
    def __init__(
        self, program: str, name: str, seed: int, first: int, last: int, debugger: tuple[str, ...] = ()
    ) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        arguments = ["--serve", name, str(seed), str(first), str(last)]
        self.process = subprocess.Popen(
            [*debugger, sys.executable, "-m", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
            env=python_environment(_TESTS, **WITHOUT_GPU),
        )
        self.waiting = b""
        self.base_bytes: int | None = None
        self.since, self.cpu_since = time.monotonic(), 0.0

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what the child tells, and an empty line several times a second."""
        assert self.process.stdout is not None
        file = self.process.stdout.fileno()
        while True:
            if select.select([file], [], [], 0.05)[0]:
                data = os.read(file, 65536)
                if not data:
                    return
                *lines, self.waiting = (self.waiting + data).split(b"\n")
                yield from map(json.loads, lines)
            yield {}

    def begins(self) -> None:
        self.since, self.cpu_since = time.monotonic(), self._cpu_s()

    def harm(self) -> str:
        """Return what is wrong with a process that runs, or nothing."""
        if self._cpu_s() - self.cpu_since > CPU_LIMIT_S or time.monotonic() - self.since > WALL_LIMIT_S:
            return f"no end within {CPU_LIMIT_S:.0f} s"
        grown = self._rss_bytes() - (self.base_bytes or 0)
        if self.base_bytes is not None and grown > MEMORY_LIMIT_BYTES:
            return f"more than {MEMORY_LIMIT_BYTES / 1e9} GB"
        return ""

    def ready(self) -> None:
        self.base_bytes = self._rss_bytes()

    def _cpu_s(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError):  # not Linux, or gone
            return 0.0

    def _rss_bytes(self) -> int:
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0

    def stop(self) -> None:
        """Let it say where it is, and end it."""
        if hasattr(signal, "SIGUSR1") and self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        self.process.kill()
        self.process.wait()

    def ends(self) -> str:
        """Wait for a process that has nothing more to tell; return what is wrong with its end, or nothing."""
        try:
            self.process.wait(WALL_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "the process does not end"
        return ""

    def said(self) -> str:
        """Return the end of what an ended process has written, and close all files."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        with self.log:
            self.log.seek(0)
            return self.log.read()[-20_000:].decode(errors="replace")


def run(name: str, seed: int, first: int, last: int, program: str = "fuzz") -> Iterator[Fault | int]:
    """Try inputs; yield faults as they are found, and after each process the number of the next input.

    ``program`` is the module that calls :func:`serve`.
    """
    while first <= last:
        child = _Child(program, name, seed, first, min(last, first + BATCH - 1))
        at: int | None = None
        harm = ""
        done = first
        try:
            for line in child.lines():
                if "ready" in line:
                    child.ready()
                elif "begin" in line:
                    at = line["begin"]
                    child.begins()
                elif "end" in line:
                    at, done = None, line["end"] + 1
                    if line["fault"] is not None:
                        yield Fault(line["end"], first, **line["fault"])
                harm = child.harm()
                if harm:
                    break
            else:
                harm = child.ends()
        finally:
            child.stop()
            said = child.said()
        failed = bool(at is not None or harm or child.process.returncode)
        if failed and child.base_bytes is None:
            raise RuntimeError(f"{name} did not start: {said}")
        if failed:
            number = max(first, done - 1) if at is None else at
            what = harm or _death(child.process.returncode)
            yield Fault(number, first, f"{what}{_place(said)}", said[-6000:])
            done = number + 1
        first = done
        yield done


def _death(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _place(said: str) -> str:
    """Return where a process ended, from what it wrote last."""
    if found := re.findall(r"([\w.-]+:\d+): (GGML_ASSERT\(.*\) failed|fatal error|.*GGML_ABORT.*)", said):
        return f": {found[-1][0]}: {found[-1][1]}"
    if found := re.findall(r"terminate called .*|what\(\): .*|\*\*\* .* \*\*\*|malloc.*|free\(\).*|Killed", said):
        return f": {found[-1]}"
    if found := re.findall(r'File ".*/([\w/]+\.py)", line \d+ in (\w+)', said):
        return f" in {found[0][1]} ({found[0][0].rpartition('/')[2]})"
    return ""


def native_stack(name: str, seed: int, number: int) -> str:
    """Return the native stack with which one input ends its process; nothing where there is no debugger to tell."""
    if shutil.which("gdb") is None:
        return ""
    ask = ("gdb", "-q", "-batch", "-ex", "handle SIGUSR1 nostop noprint pass", "-ex", "run", "-ex", "bt 16", "--args")
    child = _Child("fuzz", name, seed, number, number, ask)
    output = b""
    end = time.monotonic() + WALL_LIMIT_S
    assert child.process.stdout is not None
    while time.monotonic() < end and child.process.poll() is None:
        if select.select([child.process.stdout], [], [], 0.5)[0]:
            data = os.read(child.process.stdout.fileno(), 65536)
            if not data:
                break
            output += data
    os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()
    child.said()
    frames = [line for line in output.decode(errors="replace").splitlines() if re.match(r"#\d+ ", line)]
    return "\n".join(frames)
