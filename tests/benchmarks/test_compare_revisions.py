"""``benchmarks/compare.py``: what follows from the times, and what is asked for; its builds are too long for a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import overspill
from compare import ROOT, NotMeasuredError, Row, Side, commit_of, main, markdown_table, measure, parse, unpack
from measurements import MEASUREMENTS
from quantities.measuring import LEAST_CHANGE, Change, Models


def ratios(change: float, rounds: int = 10, seed: int = 1, spread: float = 0.02) -> list[float]:
    """Return what rounds would give of a change by this factor."""
    random = np.random.default_rng(seed)
    return list(change * np.exp(random.normal(0, spread, rounds)))


def row(*change: float, **fields: object) -> Row:
    """Return a row whose rounds gave these ratios."""
    return Row("import", ([1.0] * len(change), list(change)), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "no difference seen"), (1.05, "slower"), (0.95, "faster"), (1.002, "no difference seen")],
)
def test_verdict(factor: float, verdict: str) -> None:
    """Five percent are seen among two percent of noise in ten rounds, and none where there are none."""
    change = Change.of(ratios(factor))
    assert change.verdict == verdict
    assert change.low < factor < change.high
    assert (change.low <= 1 <= change.high) == (verdict == "no difference seen")


def test_certain_but_tiny() -> None:
    """A change below what the layout of the code makes is none, however certain."""
    change = Change.of(ratios(1 + LEAST_CHANGE / 2, spread=1e-4))
    assert change.low > 1
    assert change.verdict == "no difference seen"


@pytest.mark.parametrize(("rounds", "critical"), [(8, 0), (10, 3), (12, 7), (15, 15), (20, 37)])
def test_interval_is_the_signed_rank_tests(rounds: int, critical: int) -> None:
    """The interval leaves out as many mean logarithms on either side as the test's printed tables say, at 1 %."""
    values = ratios(1.0, rounds)
    logs = np.log(values)
    means = sorted((a + b) / 2 for i, a in enumerate(logs) for b in logs[i:])
    change = Change.of(values)
    assert np.log([change.low, change.high]) == pytest.approx([means[critical], means[-1 - critical]])


def test_false_alarms() -> None:
    """Equal sides whose noise has heavy tails are taken for different in one comparison of a hundred."""
    random = np.random.default_rng(1)
    changes = [Change.of(list(np.exp(0.02 * random.standard_t(2, 10)))) for _ in range(3000)]
    alarms = sum(not change.low <= 1 <= change.high for change in changes)
    assert 12 <= alarms <= 52  # the exact level is 10 of 1024, with four standard deviations


def test_one_disturbed_round_changes_little() -> None:
    """Something else ran in one round, ten times as long."""
    undisturbed = ratios(1.0)
    change = Change.of([*undisturbed[:-1], 10.0])
    assert change.ratio == pytest.approx(Change.of(undisturbed).ratio, abs=0.01)
    assert change.verdict == "no difference seen"


def test_fail_over() -> None:
    """Only a row whose whole interval is beyond fails, or one that fails on this side."""
    assert row(*ratios(1.10)).is_too_slow(5)
    assert not row(*ratios(1.06)).is_too_slow(5)
    assert not row(*ratios(0.90)).is_too_slow(5)
    assert row(problem="fails in the working tree: out of memory").is_too_slow(5)
    assert not row(problem="not in HEAD~1: no Sampler").is_too_slow(5)


def test_table_says_what_is_not_compared() -> None:
    """A faster side that answers something else is no news, and a missing one no failure."""
    lines = markdown_table(
        [row(*ratios(0.9), answers_differ=True), row(problem="not in v1: no | Sampler")]
    ).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("| faster, ANSWERS DIFFER |")
    assert lines[3].endswith(r"| not in v1: no \| Sampler |")


def repository(folder: Path, pin: str) -> Path:
    """Return a checkout with one commit, which pins llama.cpp."""
    (folder / "vendor").mkdir(parents=True)
    (folder / "vendor" / "llama.cpp.txt").write_text(pin)
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "--message", "Pin"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def test_unknown_revision(tmp_path: Path) -> None:
    """One line, whatever is given."""
    root = repository(tmp_path, "1")
    assert len(commit_of(root, "HEAD")) == 40
    for revision in ("nowhere", "--all", "", "HEAD:vendor"):
        with pytest.raises(SystemExit, match=r"^compare: there is no revision .*$"):
            commit_of(root, revision)


def test_no_repository(tmp_path: Path) -> None:
    """A folder without git, and one that is only part of somebody else's checkout."""
    outer = repository(tmp_path / "outer", "1")
    (tmp_path / "unpacked").mkdir()
    for folder in (tmp_path / "unpacked", outer / "vendor"):
        with pytest.raises(SystemExit, match=r"^compare: .* is not a git checkout, .*$"):
            commit_of(folder, "HEAD")


@pytest.mark.parametrize("is_same", [True, False], ids=["the same pin", "another pin"])
def test_source_of_llama_cpp_is_shared(tmp_path: Path, is_same: bool) -> None:
    """A revision with the working tree's pin needs no network; another has to bring its own."""
    root = repository(tmp_path / "checkout", "1")
    source = root / "vendor" / "llama.cpp"
    source.mkdir()
    (source / "CMakeLists.txt").write_text("project(llama.cpp)")
    (root / "vendor" / ".llama.cpp.pin").write_text("1")
    if not is_same:
        (root / "vendor" / "llama.cpp.txt").write_text("2")
    unpack(root, commit_of(root, "HEAD"), tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "vendor" / "llama.cpp.txt").read_text() == "1"
    for file in ("llama.cpp/CMakeLists.txt", ".llama.cpp.pin"):
        assert (tmp_path / "unpacked" / "vendor" / file).is_file() == is_same


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "REV"),
        (["HEAD", "--rounds", "7"], "--rounds must be at least 8"),
        (["HEAD", "--only", "nothing"], "choose from 'tiny-greedy'"),
        (["HEAD", "--fail-over", "much"], "invalid float value"),
    ],
)
def test_wrong_command_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is wrong."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


def test_command_line() -> None:
    """Everything is measured unless some are named."""
    options = parse(["HEAD~1"])
    assert (options.rev, options.rounds, options.only, options.fail_over) == ("HEAD~1", 10, None, None)
    options = parse(["main", "--only", "import", "load", "--fail-over", "5"])
    assert (options.only, options.fail_over) == (["import", "load"], 5.0)


@pytest.mark.parametrize("name", ["tiny-greedy", "draw-top-k", "logits-view"])
def test_measurement(tiny_gpt_oss_path: Path, name: str) -> None:
    """It takes time, and gives the same answer every time."""
    models = Models(tiny_gpt_oss_path, tiny_gpt_oss_path, tiny_gpt_oss_path)
    one, other = (replace(MEASUREMENTS[name], rounds=1).take(models) for _ in range(2))
    assert one.best.ours > 0
    assert one.ours[0].answer == other.ours[0].answer != []


def test_what_a_side_lacks(tmp_path: Path) -> None:
    """A side without the API is told from one that fails."""
    package = tmp_path / "overspill"
    package.mkdir()
    (package / "__init__.py").write_text("")
    side = Side("an old one", tmp_path, tmp_path)
    models = Models(tmp_path, tmp_path, tmp_path)
    with pytest.raises(NotMeasuredError, match=r"^not in an old one: .*Sampler"):
        measure(side, "draw-top-k", models)
    assert measure(side, "import", models).seconds[0] > 0
    (package / "__init__.py").write_text("raise OSError('lost')")
    with pytest.raises(NotMeasuredError, match=r"^fails in an old one: OSError: lost$"):
        measure(side, "import", models)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "quantities").glob("*.py")), ids=lambda file: file.stem)
def test_quantities_use_public_names(file: Path) -> None:
    """Other revisions have these, whatever their modules are; only a rival runs with this tree's alone."""
    tree = ast.parse(file.read_text())
    within_functions = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in within_functions:
            assert node.module is not None
            assert not node.module.startswith("overspill")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "overspill":
            assert node.attr in (*overspill.__all__, "__file__")


def test_unknown_revision_on_the_command_line() -> None:
    """The whole script says it in one line, before it builds anything."""
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "no-such-revision"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("compare: ")
    assert done.stderr.count("\n") == 1
