"""Try the overspill that is installed, with a tiny model and without a download: ``try_wheel.py``.

Needs the package ``gguf``, which writes the model, and the source of llama.cpp, which the build has brought: the model
takes its vocabulary from there.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import overspill
from overspill._core import GPU_BACKENDS

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from model_files import write_tiny_gpt_oss  # after its folder is known

PROMPT = "The quick brown fox"


class Kept(logging.Handler):
    """Keeps the messages of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.messages.append(record.getMessage())


def check_devices(messages: list[str]) -> None:
    """Check that there is a CPU, and that a build for GPUs says once that it found none, where there is none."""
    found = overspill.devices()
    print(*found, sep="\n")
    assert found[-1].kind == "cpu", found
    missing = [backend for backend in GPU_BACKENDS if all(one.backend != backend for one in found)]
    assert not (missing and Path("/dev/nvidia0").exists()), f"{missing} found no GPU, and there is one"
    said = [message for message in messages if "no usable GPU" in message]
    assert len(said) == len(missing), f"{len(missing)} of {GPU_BACKENDS} found no GPU, and {said} was said"


def check_model(path: Path) -> None:
    """Check that a stream comes to its end, and that kernels of ours and of llama.cpp have the same logits."""
    with overspill.Model(path, n_ctx=128) as model:
        with model.stream(PROMPT, max_tokens=8, temperature=0) as stream:
            print("".join(map(str, stream)), stream.stats, sep="\n")
        assert stream.stats.tokens == 8, stream.stats
        ours = logits_of(model)
    with overspill.Model(path, n_ctx=128, kernels="llama.cpp") as model:
        theirs = logits_of(model)
    difference = float(np.abs(ours - theirs).max() / theirs.std())
    print(f"largest difference between kernels: {difference:.2g} of the logits' deviation")
    assert difference < 0.01, difference


def logits_of(model: overspill.Model) -> np.ndarray:
    """Return the logits after the prompt."""
    model.eval(model.tokenize(PROMPT))
    return np.array(model.logits)


def check_command(path: Path) -> None:
    """Check that the command is installed, and continues a text."""
    command = [str(Path(sys.executable).with_name("overspill")), "run", str(path), "--raw", PROMPT, "-n", "4"]
    print(*command)
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert result.stdout.strip(), "overspill run said nothing"


def main() -> None:
    """Try all of it."""
    kept = Kept()
    logging.getLogger("overspill").addHandler(kept)
    print(f"overspill {overspill.__version__} of {Path(overspill.__file__).parent}")
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_gpt_oss(Path(folder) / "tiny.gguf")
        check_model(path)
        check_devices(kept.messages)
        check_command(path)
    print("the wheel works")


if __name__ == "__main__":
    main()
