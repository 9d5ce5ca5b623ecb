"""The command: ``PYTHONPATH=tests:tests/support python -m fuzz [TARGET ...] [--n N] [--seed SEED]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzz.runner import Fault, Target, input_of, native_stack, run, serve
from fuzz.targets import QUICK, TARGETS


def _numbers(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def main() -> int:
    """Run what the command line asks for; return 1 if a fault was found."""
    if sys.argv[1:2] == ["--serve"]:
        name, *numbers = sys.argv[2:]
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            serve(name, TARGETS[name](Path(folder)), *map(int, numbers))
        return 0
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Try inputs by chance; exit code 1 for faults.")
    parser.add_argument("target", nargs="*", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--n", type=int, help="inputs of each target; default: a few seconds of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inputs", type=_numbers, help="the numbers of inputs to repeat, such as 7 or 7-12")
    parser.add_argument("--show", action="store_true", help="print the inputs in place of trying them")
    asked = parser.parse_args()
    for name in asked.target:
        if name not in TARGETS:
            parser.error(f"there is no target {name}; there are {', '.join(TARGETS)}")
    n_kinds = 0
    for name in asked.target or TARGETS:
        if asked.show:
            with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
                _show(name, TARGETS[name](Path(folder)), asked.seed, *(asked.inputs or (0, 0)))
            continue
        first, last = asked.inputs or (0, (QUICK[name] if asked.n is None else asked.n) - 1)
        n_kinds += _try(name, asked.seed, first, last)
    return 1 if n_kinds else 0


def _show(name: str, target: Target[Any], seed: int, first: int, last: int) -> None:
    for number in range(first, last + 1):
        print(f"{name}, seed {seed}, input {number}: {input_of(target, name, seed, number)!r}")


def _try(name: str, seed: int, first: int, last: int) -> int:
    began = time.monotonic()
    kinds: dict[str, list[Fault]] = {}
    n_tried = 0
    for found in run(name, seed, first, last):
        if isinstance(found, int):
            n_tried = found - first
            continue
        kinds.setdefault(found.kind, []).append(found)
        if len(kinds[found.kind]) == 1:
            _report(name, seed, found)
    print(f"{name}: {n_tried} inputs in {time.monotonic() - began:.0f} s, {len(kinds)} kinds of faults")
    for kind, faults in kinds.items():
        print(f"  {len(faults)} x {kind} (inputs {', '.join(str(fault.number) for fault in faults[:5])})")
    sys.stdout.flush()
    return len(kinds)


def _report(name: str, seed: int, fault: Fault) -> None:
    print(f"\n--- {name}: {fault.kind}\n{fault.detail.rstrip()}")
    if "SIG" in fault.kind and (stack := native_stack(name, seed, fault.number)):
        print(stack)
    print(f"again: python -m fuzz {name} --seed {seed} --inputs {fault.number}")
    print(f"or, if that is nothing alone: --inputs {fault.first}-{fault.number}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
