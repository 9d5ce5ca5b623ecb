"""The rivals: loops, samplers and tools of llama.cpp, and other packages in environments of their own.

What belongs to the tests is imported where it is needed: the comparison of revisions has no rivals.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantities.measuring import N_THREADS, Timed

if TYPE_CHECKING:
    from upstream_tools import MinimalLoop

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ROOT / "benchmarks" / "scripts"


class NotInstallableError(Exception):
    """A package of somebody else's cannot be installed on this machine."""


@contextmanager
def minimal_loop(
    tools: Path, path: Path, *, n_ctx: int = 1024, n_threads: int = N_THREADS, **placed: Any
) -> Iterator[MinimalLoop]:
    """Open the least that a decode loop in C++ can be, with the model; for a block."""
    from upstream_tools import MinimalLoop

    loop = MinimalLoop(tools, path, n_ctx=n_ctx, n_threads=n_threads, **placed)
    try:
        yield loop
    finally:
        loop.close()


def llama_bench(tools: Path, path: Path, n_tokens: int) -> Timed:
    """Return the mean time of a token in llama-bench, which neither samples nor writes text."""
    from upstream_tools import decode_rate

    return Timed([1 / decode_rate(tools, path, n_tokens, N_THREADS)])


def llama_cpp_python(python: Path, path: Path, n_tokens: int, sampling: Mapping[str, float]) -> Timed:
    """Return the mean time of a token in llama-cpp-python, on the libraries that overspill uses."""
    from overspill import _core

    options = {{"temperature": "temp"}.get(name, name): value for name, value in sampling.items()}
    libraries = {"LLAMA_CPP_LIB_PATH": str(Path(_core.__file__).parent / "lib")}
    arguments = (str(path), str(n_tokens), str(N_THREADS), json.dumps(options))
    (rate,) = _output_of(python, SCRIPTS / "decode_with_llama_cpp_python.py", arguments, libraries)
    return Timed([1 / rate])


def xllamacpp(python: Path, path: Path, prompt: str, n_tokens: int) -> Timed:
    """Return the mean time of a token of a greedy reply in xllamacpp; the answer is its text."""
    arguments = (str(path), prompt, str(n_tokens), str(N_THREADS))
    rate, text = _output_of(python, SCRIPTS / "decode_with_xllamacpp.py", arguments)
    return Timed([1 / rate], text)


def _output_of(
    python: Path, program: Path, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> list[Any]:
    """Return the JSON in the last line that a program prints."""
    environment = {**os.environ, **(variables or {})}
    command = [str(python), str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    printed: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def python_with_llama_cpp_python() -> Path:
    """Return a Python with llama-cpp-python for the same llama.cpp, which brings no build of its own."""
    pin = (ROOT / "vendor" / "llama.cpp.txt").read_text()
    version = re.search(r"llama-cpp-python==\S+", pin)
    assert version is not None
    return _environment("rival", ["--no-binary", "llama-cpp-python", version[0]], {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"})


def python_with_xllamacpp() -> Path:
    """Return a Python with xllamacpp, whose wheel brings a llama.cpp of its own."""
    return _environment("xllamacpp", ["--only-binary", ":all:", "xllamacpp"])


def _environment(name: str, requirement: Sequence[str], variables: Mapping[str, str] | None = None) -> Path:
    """Return the Python of an environment in ``build/``, made if it is not there."""
    folder = ROOT / "build" / name
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *requirement]
        environment = {**os.environ, **(variables or {})}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise NotInstallableError(f"{' '.join(requirement)}: {done.stderr.strip()[-200:]}")
        (folder / "installed").touch()
    return python
