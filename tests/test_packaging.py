"""What releases are made with: the package of a CUDA version, and the trial of a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with what ``set_cuda.sh`` works on."""
    if sys.platform == "win32":
        pytest.skip("wheels with CUDA are built on Linux")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "set_cuda.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def set_cuda(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    command = [str(checkout / "scripts" / "set_cuda.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)


def project(folder: Path) -> dict[str, Any]:
    """Return what a ``pyproject.toml`` says."""
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("major", "packages"),
    [
        ("12", ["nvidia-cublas-cu12==12.*", "nvidia-cuda-runtime-cu12==12.*"]),
        ("13", ["nvidia-cublas==13.*", "nvidia-cuda-runtime==13.*"]),
    ],
)
def test_a_package_of_a_cuda_version(checkout: Path, major: str, packages: list[str]) -> None:
    """Version and dependencies say which one; the rest is as it was."""
    expected = project(ROOT)
    expected["project"]["version"] += f"+cu{major}"
    expected["project"]["dependencies"] = packages + expected["project"]["dependencies"]
    assert set_cuda(checkout, major).returncode == 0
    assert project(checkout) == expected


def test_a_cuda_version_is_not_set_twice(checkout: Path) -> None:
    """Nor is an unknown one."""
    before = project(checkout)
    assert (set_cuda(checkout, "11").returncode, set_cuda(checkout).returncode) == (2, 2)
    assert project(checkout) == before
    assert set_cuda(checkout, "13").returncode == 0
    after = project(checkout)
    result = set_cuda(checkout, "12")
    assert result.returncode == 1
    assert "has it got a CUDA version already?" in result.stderr
    assert project(checkout) == after


def test_the_installed_package_is_tried(tmp_path: Path) -> None:
    """As release builds try each wheel."""
    command = [sys.executable, str(ROOT / "scripts" / "try_wheel.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("the wheel works\n")
