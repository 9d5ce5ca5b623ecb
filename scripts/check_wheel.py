"""Check that a wheel built on Linux holds what it should and nothing else: ``check_wheel.py WHEEL``.

The module, llama.cpp's libraries, the RPC server, our Python files and the licences;
libraries that find each other by ``$ORIGIN``, and that need nothing which a machine may lack.
"""

from __future__ import annotations

import re
import stat
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent

MODULE = "overspill/_core.*.so"
CPU = "overspill/lib/libggml-cpu*.so"  # one, or one per variant where they are plugins
CUDA = "overspill/lib/libggml-cuda.so"
SERVER = "overspill/lib/ggml-rpc-server"
REQUIRED = [MODULE, CPU, SERVER]
REQUIRED += [f"overspill/lib/lib{name}.so" for name in ("llama", "ggml", "ggml-base", "ggml-rpc")]
METADATA = ["METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"]

RUNPATHS = {
    MODULE: "$ORIGIN/lib",
    CUDA: ":".join(["$ORIGIN", *(f"$ORIGIN/../../nvidia/{name}/lib" for name in ("cu13", "cublas", "cuda_runtime"))]),
    "overspill/lib/*": "$ORIGIN",
}
# What every Linux with a C++ program has, and what NVIDIA's own wheels bring.
SYSTEM = r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d|ld-linux.*"
NVIDIA = r"lib(cudart|cublas)\.so\.\d+"


def expected_files(dist_info: str) -> list[str]:
    """Return the name, or a pattern for it, of each file that has to be there."""
    kinds = (".py", ".pyi", ".typed", ".jinja", ".html")
    python = [file for file in (ROOT / "python/overspill").rglob("*") if file.suffix in kinds]
    licences = [file.name for file in (ROOT / "vendor/llama.cpp/licenses").iterdir()]
    return [
        *REQUIRED,
        *(str(file.relative_to(ROOT / "python")) for file in python),
        *(f"{dist_info}/licenses/llama.cpp/{licence}" for licence in ["LICENSE", *licences]),
        *(f"{dist_info}/{name}" for name in METADATA),
    ]


def files_of(wheel: ZipFile) -> list[str]:
    """Return the names without those of folders, which auditwheel adds."""
    return [name for name in wheel.namelist() if not name.endswith("/")]


def check_files(wheel: ZipFile) -> list[str]:
    """Return what is missing, surplus, or not executable."""
    names = files_of(wheel)
    dist_info = next(name for name in names if name.endswith(".dist-info/METADATA")).partition("/")[0]
    expected = expected_files(dist_info)
    problems = [f"missing: {wanted}" for wanted in expected if not any(fnmatchcase(name, wanted) for name in names)]
    problems += [
        f"surplus: {name}" for name in names if not any(fnmatchcase(name, wanted) for wanted in [*expected, CUDA])
    ]
    if SERVER in names and not wheel.getinfo(SERVER).external_attr >> 16 & stat.S_IXUSR:
        problems.append(f"not executable: {SERVER}")
    return problems


def check_linking(wheel: ZipFile) -> list[str]:
    """Return the libraries that look for others in the wrong place, or for ones that may be lacking."""
    problems = []
    names = [name for name in wheel.namelist() if name.endswith(".so") or name == SERVER]
    own = {Path(name).name for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            file = wheel.extract(name, folder)
            dynamic = subprocess.run(["readelf", "--dynamic", file], check=True, capture_output=True, text=True).stdout
            entries = re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
            runpath = [value for tag, value in entries if tag != "NEEDED"]
            wanted = next(path for pattern, path in RUNPATHS.items() if fnmatchcase(name, pattern))
            if runpath != [wanted]:
                problems.append(f"{name} looks for libraries in {runpath}, not in {wanted}")
            allowed = f"{SYSTEM}|{NVIDIA}" if name == CUDA else SYSTEM
            problems += [
                f"{name} needs {value}, which a machine may lack"
                for tag, value in entries
                if tag == "NEEDED" and value not in own and not re.fullmatch(allowed, value)
            ]
    return problems


def main() -> int:
    """Check the wheel named on the command line; return the exit status."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    with ZipFile(sys.argv[1]) as wheel:
        problems = check_files(wheel) + check_linking(wheel)
        n_files = len(files_of(wheel))
    for problem in problems:
        print(f"{Path(sys.argv[1]).name}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{Path(sys.argv[1]).name}: {n_files} files, all of them wanted and none missing")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
