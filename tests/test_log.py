"""The log of an application: a few lines of ours at INFO, and llama.cpp's where they are asked for."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from commands import overspill
from programs import in_process

# Counts what a handler of the application gets, which takes INFO and above, while a model is loaded and used.
PROGRAM = """
import json, logging, sys

class Count(logging.Handler):
    def emit(self, record):
        counts.append([record.name, record.levelno])

counts = []
logging.basicConfig(level=int(sys.argv[2]), handlers=[Count(int(sys.argv[4]))])
import overspill
logging.getLogger("overspill.llama").setLevel(int(sys.argv[3]))
with overspill.Model(sys.argv[1], n_ctx=256, n_threads=1) as model:
    model.generate("Once", max_tokens=3)
print(json.dumps(counts))
"""


def lines(path: Path, level: int, *, of_llama: int = logging.NOTSET, of_handler: int = logging.NOTSET) -> Counter[str]:
    """Return the lines of llama.cpp at each level, and those of ours as ``ours``."""
    found = in_process(PROGRAM, str(path), str(level), str(of_llama), str(of_handler))
    return Counter(logging.getLevelName(number) if name == "overspill.llama" else "ours" for name, number in found)


def test_an_application_at_info_is_not_flooded(smollm2_path: Path) -> None:
    """By llama.cpp's 100 lines for each model, which are there at DEBUG, or if its logger is told."""
    n_lines = 100
    assert sum(lines(smollm2_path, logging.INFO).values()) <= 5
    assert sum(lines(smollm2_path, logging.DEBUG, of_handler=logging.INFO).values()) <= 5
    debug = lines(smollm2_path, logging.DEBUG)
    assert debug["DEBUG"] > n_lines
    assert debug["INFO"] == 0
    told = lines(smollm2_path, logging.WARNING, of_llama=logging.INFO)
    assert told["INFO"] > n_lines
    assert told["DEBUG"] == 0
    assert sum(lines(smollm2_path, logging.DEBUG, of_llama=logging.ERROR).values()) <= 5


@pytest.mark.parametrize("verbose", [True, False])
def test_the_command_line_shows_llama_cpps_log_if_asked(smollm2_path: Path, verbose: bool) -> None:
    """By ``--verbose``."""
    done = overspill("run", smollm2_path, "Hi", "-n", "2", *(["--verbose"] if verbose else []))
    assert done.returncode == 0, done.stderr
    n_lines = done.stderr.count("overspill.llama: ")
    assert n_lines > 100 if verbose else n_lines == 0
