"""``overspill compare``, in a pipe and in a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from commands import overspill
from comparisons import OPTIONS, Page, places
from overspill import compare

# Sections say what is so without a GPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

COMMAND = [sys.executable, "-m", "overspill", "compare"]
SHORT = ["--threads", "1", "--ctx", "256", "-n", "8", "--seed", "3"]
STATS = r"(\d+\.\d\d|–) tok/s · \d+ tokens? · \d+\.\d\d s to first token(?: · busy CPU: [^·]+)? · stop: \w+"


def test_a_pipe_gets_sections(gemma_path: Path, tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """Question, model, answer, stats, memory and verdict, as text; and the page is written."""
    report = tmp_path / "report.html"
    asked = overspill("compare", gemma_path, tiny_gpt_oss_path, "昔々 [bold]あるところに", "--html", report, *SHORT)
    assert asked.returncode == 0, asked.stderr
    assert asked.stderr == f"written: {report}\n"
    assert "\x1b" not in asked.stdout
    found = compare([gemma_path, tiny_gpt_oss_path], "昔々 [bold]あるところに", seed=3, **OPTIONS)
    sections = asked.stdout.split("\n## ")
    assert sections[0] == "# 昔々 [bold]あるところに\n"
    for section, one in zip(sections[1:], found.models, strict=True):
        assert section.startswith(f"{one.label}\n\n")
        assert one.answers[0].text.strip("\n") in section
        assert re.search(f"^{STATS}$\n^CPU .*B of .*B$\n^CPU only", section, re.MULTILINE)
    assert "decode" in asked.stdout.splitlines()[-3]
    assert "昔々 [bold]あるところに" in Page(report.read_text(encoding="utf-8")).text


@pytest.mark.parametrize("form", ["lines", "json", "standard input"])
def test_several_questions(tiny_gpt_oss_path: Path, tmp_path: Path, form: str) -> None:
    """One on each line, or in a list; the question alone may come from standard input."""
    questions = ["What is 1+1?", "日本の首都は？"] if form != "standard input" else ["two\nlines"]
    arguments: list[object] = [tiny_gpt_oss_path, tiny_gpt_oss_path, *SHORT, "--json"]
    if form == "lines":
        (tmp_path / "q.txt").write_text("\n".join(["", *questions, "  "]), encoding="utf-8")
        arguments += ["--questions", tmp_path / "q.txt"]
    elif form == "json":
        (tmp_path / "q.json").write_text(json.dumps(questions))
        arguments += ["--questions", tmp_path / "q.json"]
    else:
        arguments.insert(2, "-")
    done = overspill("compare", *arguments, stdin="two\nlines")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["questions"] == questions
    for one in found["models"]:
        assert [answer["stats"]["tokens"] for answer in one["answers"]] == [8] * len(questions)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "Missing argument"),
        (["TINY", "x"], 2, "two or more models can be compared, and here is 1"),
        (["TINY", "TINY"], 2, "is a model: put the question, in quotes, after the models"),
        (["TINY", "TINY", "x", "--questions", "EMPTY"], 2, "holds no questions"),
        (["TINY", "TINY", "--questions", "missing.txt"], 1, "missing.txt"),
        (["TINY", "TINY", "--questions", "WRONG"], 2, "must hold a list of questions as strings"),
        (["TINY", "TINY", "x", "--html", "FOLDER"], 1, "is a folder; give a file in it"),
        (["TINY", "TINY", "x", "--html", "FOLDER/none/report.html"], 1, "its folder is missing"),
        (["TINY", "missing.gguf", "x"], 1, "missing.gguf: no such file"),
        (["TINY", "TINY", "x", "--temp", "-1"], 2, "--temp must be 0 or more"),
        (["TINY", "TINY", "x", "--memory", "20GiB"], 2, "--memory must be DEVICE=SIZE"),
        (["TINY", "TINY", "x", *["--offload", "cpu"] * 3], 2, "one for each of the 2 models, not 3"),
    ],
    ids=str,
)
def test_mistakes_get_one_line_and_an_exit_code(
    tiny_gpt_oss_path: Path, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    """The line says what is wrong; nothing comes out on standard output."""
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.json").write_text("{}")
    names = {"TINY": tiny_gpt_oss_path, "EMPTY": tmp_path / "empty.txt", "WRONG": tmp_path / "wrong.json"}
    given = [str(names.get(argument, argument)).replace("FOLDER", str(tmp_path)) for argument in arguments]
    done = overspill("compare", *given)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 or "--help" in done.stderr


def test_a_model_that_fails_makes_the_command_fail(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """The other's answer is there, the page is written, and the error is the last line."""
    damaged, report = tmp_path / "damaged.gguf", tmp_path / "report.html"
    damaged.write_bytes(tiny_gpt_oss_path.read_bytes()[:-1000])
    done = overspill("compare", tiny_gpt_oss_path, damaged, "x", "--html", report, *SHORT)
    assert done.returncode == 1
    assert re.search(STATS, done.stdout)
    assert done.stderr.splitlines()[-1].startswith("error: damaged: ")
    assert "damaged.gguf" in report.read_text(encoding="utf-8")


def terminal(*arguments: object, columns: int = 90, interrupt_at: str = "") -> tuple[list[list[str]], object]:
    """Run it in a terminal of 24 lines, with Ctrl-C when a text is there; return the screens, and the exit code.

    The last of the screens has what scrolled out above it.
    """
    pexpect: Any = pytest.importorskip("pexpect", reason="a terminal is played by pexpect, which needs a POSIX system")
    pyte: Any = pytest.importorskip("pyte")
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    child = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *map(str, arguments)],
        env=environment,
        encoding="utf-8",
        dimensions=(24, columns),
        timeout=120,
    )
    screen = pyte.HistoryScreen(columns, 24, history=1000)
    stream = pyte.Stream(screen)
    screens: list[list[str]] = []
    interrupted = False
    while True:
        try:
            stream.feed(child.read_nonblocking(65536, timeout=120))
        except pexpect.EOF:
            break
        screens.append(list(screen.display))
        if interrupt_at and not interrupted and re.search(interrupt_at, "\n".join(screen.display)):
            interrupted = True
            child.sendintr()
    child.close()
    above = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
    screens.append([*above, *screen.display])
    return screens, child.exitstatus


def cells(screen: Sequence[str]) -> list[list[str]]:
    """Return the lines of the table on a screen in their columns, and check that these are in line."""
    (top,) = [number for number, line in enumerate(screen) if re.fullmatch(r"[─┼]+ *", line)][:1]
    rows = [line for line in screen[top - 1 :] if "│" in line]
    # A wide character takes up two places of the screen: the second is empty.
    assert {line.index("│") for line in rows} == {screen[top].index("┼")}
    return [[cell.strip() for cell in line.split("│")] for line in rows]


@pytest.mark.slow
def test_a_terminal_shows_columns_that_grow(gemma_path: Path, tiny_gpt_oss_path: Path) -> None:
    """First one answer grows and the other waits; at the end both are whole, in line, whatever the language."""
    prompt = "昔々、あるところに"
    screens, code = terminal(
        gemma_path, tiny_gpt_oss_path, prompt, "--threads", 1, "-n", 120, "--seed", 3, "--ctx", 512
    )
    assert code == 0
    growing = {
        len("".join(left for left, *_ in cells(places(screen))))
        for screen in screens[:-1]
        if any("waiting" in line for line in screen) and any("┼" in line for line in screen)
    }
    assert len(growing) > 2
    last = places(screens[-1])
    rows = cells(last)
    answers = ["".join(row[column] for row in rows).replace(" ", "") for column in (0, 1)]
    found = compare([gemma_path, tiny_gpt_oss_path], prompt, seed=3, **{**OPTIONS, "n_ctx": 512, "max_tokens": 120})
    for one, shown in zip(found.models, answers, strict=True):
        assert re.sub(r"\s", "", one.answers[0].text) in shown
        assert re.search(r"120tokens.*stop:max_tokens.*CPU.*CPUonly", shown)
    assert re.search(r"[\u3040-\u9fff]{10}", answers[0])
    assert any("times as fast as" in line for line in last)


def test_a_narrow_terminal_gets_sections(tiny_gpt_oss_path: Path) -> None:
    """Where columns would hold a few words."""
    screens, code = terminal(tiny_gpt_oss_path, tiny_gpt_oss_path, "Hello", *SHORT, columns=40)
    assert code == 0
    assert not any("│" in line for line in screens[-1])
    assert sum(line.startswith("## tiny-gpt-oss") for line in screens[-1]) == 2


@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_in_a_terminal(gemma_path: Path, smollm2_path: Path) -> None:
    """What there is stays on the screen, with its stats, and the exit code says that it was interrupted."""
    screens, code = terminal(
        gemma_path, smollm2_path, "Once upon a time", "--threads", 1, "-n", 0, "--seed", 3, interrupt_at="2. tokens"
    )
    assert code == 130
    shown = "\n".join(screens[-1])
    assert re.search(r"stop: interrupted +│", shown)
    assert "It was interrupted: not every answer is there, or whole." in " ".join(shown.split())


@pytest.mark.slow
@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_in_a_pipe(gemma_path: Path, smollm2_path: Path, tmp_path: Path) -> None:
    """The same, and the page is written with what there is."""
    report = tmp_path / "report.html"
    command = [*COMMAND, str(gemma_path), str(smollm2_path), "Once upon a time", "--html", str(report)]
    process = subprocess.Popen(
        [*command, "--threads", "1", "-n", "0", "--seed", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    text = b""
    while len(text.partition(b"## gemma-3-270m-q4_k_m\n\n")[2]) < 20:
        text += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert "stop: interrupted" in (text + rest).decode()
    assert "interrupted" in Page(report.read_text(encoding="utf-8")).text


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(gemma_path: Path, smollm2_path: Path) -> None:
    """When the reader goes away there is nothing to complain about."""
    process = subprocess.Popen(
        [*COMMAND, str(gemma_path), str(smollm2_path), "Once upon a time", "--threads", "1", "-n", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert errors == ""
