"""Fill ``vendor/llama.cpp`` with the pinned llama.cpp source, unmodified.

CMake runs this while it configures. It can be run by hand too, to fill the folder
before going offline: ``python vendor/fetch.py`` (needs pip and scikit-build-core).

pip does the download, so that mirrors, private indexes and its cache work as they
do for any other package, and it refuses a file whose hash is not the pinned one.
A folder that was filled by other means is left alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from copy import copy
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
PIN = HERE / "llama.cpp.txt"
TARGET = HERE / "llama.cpp"
STAMP = HERE / ".llama.cpp.pin"

# Not needed to build or test, and half of the source distribution by size.
LEFT_OUT = (".git", "docs", "media", "tools/ui", "tools/server")


def is_current() -> bool:
    """Tell whether the folder is filled, with this pin or by hand."""
    if not (TARGET / "CMakeLists.txt").is_file():
        return False
    return not STAMP.is_file() or STAMP.read_text() == PIN.read_text()


def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Return the member renamed to its place below the target, or None to leave it out."""
    parts = PurePosixPath(member.name).parts
    if parts[1:3] != ("vendor", "llama.cpp") or len(parts) == 3:
        return None
    inside = "/".join(parts[3:])
    if any(inside == folder or inside.startswith(folder + "/") for folder in LEFT_OUT):
        return None
    kept = copy(member)  # replace() came with Python 3.11.4
    kept.name = inside
    return kept


def download(folder: Path) -> Path | None:
    """Let pip bring the pinned source distribution; None if it could not."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--requirement", str(PIN)]
    command += ["--require-hashes", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    command += ["--dest", str(folder)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        lines = [line for line in result.stdout.splitlines() if "ERROR" in line]
        print("\n".join(lines or result.stdout.splitlines()[-3:]), file=sys.stderr)
        return None
    return next(folder.glob("*.tar.gz"))


def main() -> int:
    """Fill the folder if it is not filled; return the exit status."""
    if is_current():
        return 0
    with tempfile.TemporaryDirectory(dir=HERE) as temporary:
        archive = download(Path(temporary))
        if archive is None:
            print(
                "overspill: the llama.cpp source is missing and could not be downloaded: "
                "connect once to a package index and run 'python vendor/fetch.py', "
                "or build with -C cmake.define.OVERSPILL_LLAMA_CPP_DIR=/path/to/llama.cpp",
                file=sys.stderr,
            )
            return 1
        unpacked = Path(temporary) / "llama.cpp"
        with tarfile.open(archive) as source:
            members = [kept for member in source if (kept := wanted(member))]
            # Python 3.11.0 to 3.11.3 have no filters; the hash vouches for the archive there.
            source.extraction_filter = getattr(tarfile, "data_filter", None)
            source.extractall(unpacked, members)
        shutil.rmtree(TARGET, ignore_errors=True)
        unpacked.rename(TARGET)
    STAMP.write_text(PIN.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
