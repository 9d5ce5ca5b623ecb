"""The command line, as a user sees it: in pipes, in a terminal, interrupted, and used wrongly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from commands import overspill
from overspill import Model
from sweeps import sweep

COMMAND = [sys.executable, "-m", "overspill"]
# The same, with a line once it has been imported: before that, Python itself is interrupted.
TELLING = [
    sys.executable,
    "-c",
    "import sys; from overspill.cli.app import main; print('ready', file=sys.stderr); main()",
]
STATS = r"(\d+\.\d\d|–) tok/s · \d+ tokens? · (\d+\.\d\d s to|no) first token(?: · busy CPU: [^·]+)? · stop: \w+"


@pytest.mark.usefixtures("no_gpu")  # whose measurement may be disturbed, and says so
def test_pipes_carry_text_only(tiny_gpt_oss_path: Path) -> None:
    """Text on standard output, one line of stats on standard error, no colours and no progress bar."""
    done = overspill("run", str(tiny_gpt_oss_path), "Hello", "-n", "5", "--seed", "1")
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert done.stdout.strip()
    assert re.fullmatch(STATS + "\n", done.stderr)
    assert "5 tokens" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    again = overspill("run", str(tiny_gpt_oss_path), "Hello", "-n", "5", "--seed", "1")
    assert again.stdout == done.stdout


def test_prompt_from_standard_input(tiny_gpt_oss_path: Path) -> None:
    """``-`` reads it, whatever its language."""
    options = ["-n", "8", "--temp", "0"]
    given = overspill("run", str(tiny_gpt_oss_path), "昔々 [bold]あるところに[/bold]", *options)
    read = overspill("run", str(tiny_gpt_oss_path), "-", *options, stdin="昔々 [bold]あるところに[/bold]")
    assert given.returncode == read.returncode == 0
    assert given.stdout == read.stdout


@pytest.mark.slow  # it is downloaded once, of 491 MB
def test_without_a_model_the_demo_answers() -> None:
    """A whole and correct answer of a chat model; its licence and limits are named, and not in the text."""
    done = overspill("run", "What is the capital of France?", "--temp", "0")
    assert done.returncode == 0
    assert re.fullmatch(r"[^\n]*\bParis\b[^\n]*\.\n", done.stdout)
    assert "Apache-2.0" in done.stderr
    assert "wrong about facts" in done.stderr.replace("\n", "")
    assert "stop: eos" in done.stderr
    talked = overspill("chat", "--temp", "0", stdin="What is the capital of France?")
    assert talked.returncode == 0
    assert "Paris" in talked.stdout


def test_a_model_with_a_template_answers(smollm2_path: Path) -> None:
    """The prompt is a message, behind a system prompt; with --raw it is a text that goes on."""
    options = ("-n", "12", "--temp", "0")
    answered = overspill("run", str(smollm2_path), "What do cats eat?", *options)
    guided = overspill("run", str(smollm2_path), "What do cats eat?", "--system", "Answer in French.", *options)
    raw = overspill("run", str(smollm2_path), "What do cats eat?", "--raw", *options)
    keywords: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    with Model(smollm2_path) as model:
        assert answered.stdout == model.ask("What do cats eat?", **keywords).text + "\n"
    with Model(smollm2_path) as model:  # which has nothing to reuse, as that rounds otherwise
        assert guided.stdout == model.ask("What do cats eat?", system="Answer in French.", **keywords).text + "\n"
        assert raw.stdout == model.generate("What do cats eat?", **keywords).text + "\n"
    assert len({answered.stdout, guided.stdout, raw.stdout}) == 3


def test_a_reply_that_ends_at_once_says_so(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """An empty line alone would look like a fault of the program."""
    grammar = tmp_path / "nothing.gbnf"
    grammar.write_text('root ::= ""')
    done = overspill("run", str(tiny_gpt_oss_path), "Hello", "--raw", "--grammar", str(grammar))
    assert done.returncode == 0
    assert not done.stdout.strip()
    assert "ended its reply without a text" in done.stderr


def test_a_closed_pipe_ends_quietly(gemma_path: Path) -> None:
    """When the reader goes away there is nothing to complain about."""
    process = subprocess.Popen(
        [*COMMAND, "run", str(gemma_path), "Hello", "-n", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in errors
    assert "Exception" not in errors


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["run"], 2, "Missing argument"),
        (["run", "a", "b", "c"], 2, "put the prompt in quotes"),
        (["run", "x", "--bogus"], 2, "No such option"),
        (["run", "TINY", "x", "--temp", "-1"], 2, "--temp must be 0 or more"),
        (["run", "TINY", "x", "-n", "-1"], 2, "--max-tokens must be at least 1"),
        (["run", "TINY", "x", "--ctx", "0"], 2, "--ctx must be at least 1"),
        (["run", "TINY", "x", "--offload", "some"], 2, "offload must be"),
        (["run", "TINY", "x", "--load-mode", "some"], 2, "--load-mode must be one of mmap"),
        (["run", "TINY", "x", "--json-schema", '{"type": "colour"}'], 2, "unrecognized type"),
        (["run", "TINY", "x", "--json-schema", "missing.json"], 1, "missing.json"),
        (["run", "TINY", "x", "--grammar", "THIS"], 2, "grammar, line 1, column"),
        (["run", "TINY", "word word word", "--ctx", "1"], 1, "the context holds 1"),
        (["run", "TINY", "x", "--offload", "gpu"], 1, "there is no GPU here"),
        (["run", "TINY"], 2, "a PROMPT is missing"),
        (["run", "missing.gguf"], 2, "a PROMPT is missing"),
        (["run", "TINY", "x", "--raw", "--system", "y"], 2, "give either --raw"),
        (["run", "missing.gguf", "x"], 1, "missing.gguf: no such file"),
        (["run", "FOLDER", "x"], 1, "is a directory; give the .gguf file in it"),
        (["run", "THIS", "x"], 1, "is not a GGUF file"),
        (["run", "VOCAB", "x"], 1, "holds a vocabulary and no weights"),
        (["info", "missing.gguf"], 1, "no such file"),
        (["info"], 2, "Missing argument"),
        (["frobnicate"], 2, "No such command"),
    ],
)
@pytest.mark.usefixtures("no_gpu")
def test_mistakes_get_one_line_and_an_exit_code(
    tiny_gpt_oss_path: Path, vocab_path: Path, arguments: list[str], code: int, text: str
) -> None:
    """The line says what is wrong; nothing comes out on standard output."""
    names = {"TINY": tiny_gpt_oss_path, "VOCAB": vocab_path, "FOLDER": vocab_path.parent, "THIS": Path(__file__)}
    done = overspill(*(str(names.get(argument, argument)) for argument in arguments))
    assert done.returncode == code
    assert text in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    # A wrong option adds how to get help; everything else is the line alone.
    assert done.stderr.count("\n") == 1 or "--help" in done.stderr


# A command line whose library has a bug.
WITH_A_BUG = """
import overspill

def broken(*arguments, **options):
    return None + 1

overspill.Model = overspill.devices = broken
from overspill.cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "has_traceback"),
    [(["run", "TINY", "x"], False), (["run", "TINY", "x", "--verbose"], True), (["devices"], True)],
)
def test_a_bug_is_no_mistake_of_the_caller(
    tiny_gpt_oss_path: Path, arguments: list[str], *, has_traceback: bool
) -> None:
    """One line says what it is and how to see more; a command without --verbose shows it at once."""
    given = [str(tiny_gpt_oss_path) if argument == "TINY" else argument for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_BUG, *given], input="", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert re.match(r"error: a bug in overspill(; --verbose shows where)?: TypeError: unsupported operand", line)
    assert ("--verbose" in line) == (not has_traceback)
    assert ("Traceback" in done.stderr) == ("in broken\n" in done.stderr) == has_traceback
    if not has_traceback:
        assert done.stderr.count("\n") == 1


def test_verbose_shows_where_a_mistake_was_found(tiny_gpt_oss_path: Path) -> None:
    """A bug may look like a mistake."""
    done = overspill("run", str(tiny_gpt_oss_path), "x", "--temp", "-1", "--verbose")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "--temp must be 0 or more" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_replies_that_fit(gemma_path: Path, tmp_path: Path) -> None:
    """A schema on the command line or in a file, and a grammar in a file."""
    schema = json.dumps({"enum": ["yes", "no"]})
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "grammar.gbnf").write_text('root ::= "\\"yes\\"" | "\\"no\\""')
    for option, value in (
        ("--json-schema", schema),
        ("--json-schema", str(tmp_path / "schema.json")),
        ("--grammar", str(tmp_path / "grammar.gbnf")),
    ):
        done = overspill("run", str(gemma_path), "Is it so? ", option, value, "-n", "20")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) in ("yes", "no")


def test_devices() -> None:
    """The CPU is always among them, with its memory."""
    text = overspill("devices")
    assert text.returncode == 0
    assert re.search(r"^CPU +cpu +CPU +\d+\.\d\d GiB", text.stdout, re.MULTILINE)
    assert "\x1b" not in text.stdout
    (cpu,) = [device for device in json.loads(overspill("devices", "--json").stdout) if device["kind"] == "cpu"]
    assert cpu["total_bytes"] >= cpu["free_bytes"] > 0


def test_info(tiny_gpt_oss_path: Path) -> None:
    """Architecture, layers, experts, quantisation, and bytes by part."""
    text = overspill("info", str(tiny_gpt_oss_path)).stdout
    for line in ("architecture +gpt-oss", "layers +4", "experts +8, 4 used per token", "quantisation +MXFP4"):
        assert re.search(rf"^{line}", text, re.MULTILINE), text
    facts = json.loads(overspill("info", str(tiny_gpt_oss_path), "--json").stdout)
    assert (facts["n_layers"], facts["n_experts"], facts["n_experts_used"]) == (4, 8, 4)
    assert 0 < sum(facts["bytes_by_part"].values()) < facts["file_bytes"]


def test_version_and_help() -> None:
    """They name the version of llama.cpp, and the exit codes."""
    assert re.fullmatch(r"overspill \d+\.\d+\.\d+, llama.cpp \w+, backends: CPU.*\n", overspill("--version").stdout)
    for command in ([], ["run"], ["info"], ["devices"]):
        assert "Exit codes" in overspill(*command, "--help").stdout


pexpect: Any = pytest.importorskip("pexpect", reason="a terminal is played by pexpect, which needs a POSIX system")


def terminal(*arguments: str) -> Any:
    """Run it in a terminal of 80 columns."""
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    return pexpect.spawn(
        sys.executable,
        ["-m", "overspill", *arguments],
        env=environment,
        encoding="utf-8",
        dimensions=(24, 80),
        timeout=60,
    )


def finish(child: Any) -> object:
    """Wait for the end, and return the exit code."""
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def test_a_terminal_shows_progress_and_colours(gemma_path: Path) -> None:
    """A progress bar while it loads, then the text, then the stats, dimmed."""
    child = terminal("run", str(gemma_path), "Hello", "-n", "4")
    child.expect("loading")
    child.expect(STATS)
    assert finish(child) == 0


@pytest.mark.parametrize("phase", sweep(["prefill", "decode"], always=[1]))
@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_prints_what_there_is_and_the_stats(gemma_path: Path, phase: str) -> None:
    """The exit code says that it was interrupted."""
    prompt = "word " * 7000 if phase == "prefill" else "Once upon a time"
    for wait_s in (0.5, 2, 8):
        child = terminal("run", str(gemma_path), prompt, "-n", "0", "--batch", "4096", "-ngl", "cpu")
        child.expect("loading")
        child.expect(r"\x1b\[2K|\r\n")  # the bar has been taken away, and warnings are above it
        if phase == "decode":
            child.expect("[a-z]{2,} [a-z]{2,} [a-z]{2,}")  # text
        else:
            time.sleep(wait_s)
        child.sendintr()
        # Nothing shows that the prompt has begun: on a busy machine Ctrl-C may come too early for stats.
        if child.expect([STATS, "error: interrupted"]) == 0:
            break
        assert finish(child) == 130
    assert "stop: interrupted" in child.after
    assert ("no first token" in child.after) == (phase == "prefill")
    assert finish(child) == 130


@pytest.mark.parametrize("delay_s", [0.0, 0.2, 0.4])
@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_at_any_time_leaves_no_traceback(gemma_path: Path, delay_s: float) -> None:
    """While it loads, before the first token, or in the middle of the text."""
    command = [*TELLING, "run", str(gemma_path), "Hello", "-n", "0", "-ngl", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == b"ready\n"
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors, errors
    assert errors.count(b"\n") == 1, errors


def test_ctrl_c_stays_ignored(gemma_path: Path) -> None:
    """As a shell has it for what it runs in the background."""
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *TELLING, "run", str(gemma_path), "Hello", "-n", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert b"5 tokens" in errors
