"""The runner notices every kind of harm, goes on after it, and gives the same inputs again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from fuzz import guided, runner
from fuzz.mutators import mutated_bytes, mutated_json, mutated_text
from fuzz.runner import Fault, run
from fuzz.targets import TARGETS
from programs import python_environment

KINDS = {
    "nothing": None,
    "an exception": "KeyError in harmful.py, check",
    "a bad address": "ended by SIGSEGV in string_at",
    "an abort": "ended by SIGABRT",
    "an exit": "ended with code 3",
    "no end": "no end within 1 s in _spin",
    "a long wait": "no end within 1 s",
    "too much memory": "more than 0.1 GB in _grow",
}


@pytest.mark.skipif(not runner.WATCHES_PROCESSES, reason="what a process takes is read from /proc")
@pytest.mark.parametrize("name", KINDS)
def test_harm_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told with its number and its kind; the inputs after it are tried as well."""
    monkeypatch.setattr(runner, "CPU_LIMIT_S", 1.0)
    monkeypatch.setattr(runner, "WALL_LIMIT_S", 3.0 if name == "a long wait" else 60.0)
    monkeypatch.setattr(runner, "MEMORY_LIMIT_BYTES", 100_000_000)
    found = list(run(name, 1, 0, 4, "fuzz.harmful"))
    faults = [fault for fault in found if isinstance(fault, Fault)]
    kind = KINDS[name]
    assert [fault.number for fault in faults] == ([] if kind is None else [2])
    assert all(fault.kind.startswith(str(kind)) and fault.first == 0 for fault in faults), faults
    assert found[-1] == 5


def test_mutators_are_repeatable() -> None:
    """A seed gives the same changes, and nearly every one is a change."""
    value = {"a": [1, 2.5, {"b": "text of some words"}], "c": None}
    text = json.dumps(value)
    n_same = 0
    for seed in range(500):
        changed = [
            (
                mutated_bytes(random, text.encode()),
                mutated_text(random, text, ["a", "{"]),
                repr(mutated_json(random, value, ["a", "b"])),
            )
            for random in (Random(seed), Random(seed))
        ]
        assert changed[0] == changed[1]
        n_same += (text.encode() in changed[0]) + (text in changed[0]) + (repr(value) in changed[0])
    assert n_same < 300
    assert value == json.loads(text)


@pytest.mark.parametrize("name", ["grammars", "utf8_buffer"])
def test_without_its_tool_the_guided_one_fails(name: str, tmp_path: Path) -> None:
    """What was not tried has not passed: one line says what to do, and the exit code is that of an error."""
    program = (
        "import pathlib, sys; sys.modules['atheris'] = None; from fuzz import guided; "
        "guided.BUILT = pathlib.Path(sys.argv.pop()); sys.exit(guided.main())"
    )
    command = [sys.executable, "-c", program, name, "--runs", "1", str(tmp_path)]
    environment = python_environment(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*: (pip install|cmake) .*\n", done.stderr), done.stderr


def test_the_workflow_names_targets() -> None:
    """Those of the core, and of the others none that there is not."""
    workflow = Path(__file__).parents[2] / ".github" / "workflows" / "fuzz.yml"
    native, others = re.findall(r"for target in (.*); do", workflow.read_text(encoding="utf-8"))
    assert native.split() == list(guided.NATIVE)
    assert set(others.split()) <= set(TARGETS)
