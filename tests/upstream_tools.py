"""Build and run llama.cpp's own tools against the installed libraries; see ``upstream/CMakeLists.txt``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model_files import llama_cpp_folder
from overspill import _core


def build_upstream_tools(cache: Path) -> Path:
    """Return a folder with ``llama-completion`` and ``llama-bench``, built once per version of the libraries."""
    libraries = Path(_core.__file__).parent / "lib"
    if sys.platform == "win32" or not list(libraries.glob("*ggml-cpu.*")):
        pytest.skip("upstream's tools are linked to libggml-cpu, which plugin builds and Windows do not allow")
    project = Path(__file__).parent / "upstream"
    version = hashlib.sha256((project / "CMakeLists.txt").read_bytes())
    version.update(str(libraries).encode())
    for library in sorted(libraries.iterdir()):
        version.update(library.read_bytes())
    # In the checkout, like every build, so that ccache finds the paths alike in the next one.
    build = cache / version.hexdigest()[:12]
    if not (build / "llama-bench").is_file():
        shutil.rmtree(build, ignore_errors=True)
        configure = ["cmake", "-S", str(project), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DOVERSPILL_LLAMA_CPP_DIR={llama_cpp_folder()}", f"-DOVERSPILL_LIBRARIES={libraries}"]
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-3000:]}"
    return build


def completion(tools: Path, model: Path, prompt: str, n: int) -> str:
    """Return llama-completion's greedy continuation of ``prompt``."""
    command = [str(tools / "llama-completion"), "--model", str(model), "--prompt", prompt, "--no-escape"]
    command += ["--predict", str(n), "--temp", "0", "--threads", "2", "--ctx-size", "1024"]
    command += ["--no-display-prompt", "--no-conversation", "--no-warmup"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=True)
    text = done.stdout.decode(errors="replace")
    # What it prints after the text, depending on how it ended.
    for end in (" [end of text]\n\n\n", "\n\n"):
        if text.endswith(end):
            return text.removesuffix(end)
    raise AssertionError(f"llama-completion ended in an unknown way: {text!r}")


def decode_rate(tools: Path, model: Path, n: int, n_threads: int) -> float:
    """Return the decode speed that llama-bench measures, in tokens per second."""
    command = [str(tools / "llama-bench"), "--model", str(model), "--n-prompt", "0", "--n-gen", str(n)]
    command += ["--threads", str(n_threads), "--repetitions", "1", "--output", "json"]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True, env={**os.environ})
    return float(json.loads(done.stdout)[0]["avg_ts"])
