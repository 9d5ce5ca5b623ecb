"""Names and texts from files and models command no terminal: what the commands write has no control characters.

Everything in the files here has them: metadata, names of tensors and files, and the tokens that the model says.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import gguf
import pytest

import overspill as package
from commands import overspill
from overspill import Model, ModelInfo, Placement
from sweeps import sweep
from terminal_screen import Terminal

# A title, a colour by an 8-bit sequence, a place on the screen, text that turns around, a bell, a deleted character.
EVIL = "\x1b]0;EVIL\x07\x9b31m\x1b[17;3H\u202e\u2066\x08\x7f[/red]"
# What our own commands send: colours, erased lines, the cursor up and at the line's begin or hidden, modes of the
# terminal, and the question where the cursor is.
OURS = re.compile(r"\x1b\[(?:[\d;]*[mAK]|[\d;]*[CDGJ]|\?(?:1|7|12|25|2004|2026)[hl]|6n|0?;?0?H)|\x1b[=>]|\r|\n|\t")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


# Bytes as a byte-level vocabulary writes them.
PLAIN = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTES = {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - PLAIN))} | {n: chr(n) for n in PLAIN}


@pytest.fixture(scope="module")
def evil(tiny_gpt_oss_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return files by what is in them: a model that runs, one that does not, and a placement."""
    folder = tmp_path_factory.mktemp("evil") / f"folder{EVIL.replace('/', '')}"
    folder.mkdir()
    files = {name: folder / f"{name}{EVIL.replace('/', '')}.gguf" for name in ("runs", "fails")}
    reader = gguf.GGUFReader(tiny_gpt_oss_path)
    *tokens, end = reader.fields["tokenizer.ggml.tokens"].contents()
    said = "".join(BYTES[byte] for byte in EVIL.encode())
    for name, file in files.items():
        writer = gguf.GGUFWriter(file, "gpt-oss")
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or key == "general.architecture":
                continue
            value = field.contents()
            if key == "tokenizer.ggml.tokens":
                value = [*(token if len(token) == 1 else f"{said}{i}" for i, token in enumerate(tokens)), end]
            if key == "general.name":
                value = f"name{EVIL}"
            kind = field.types[0]
            writer.add_key_value(key, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
        for key in ("general.license", "general.author", f"key{EVIL}"):
            writer.add_string(key, f"value{EVIL}")
        writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
        for tensor in reader.tensors:
            evil_name = f"{tensor.name}{EVIL}" if name == "fails" else tensor.name
            writer.add_tensor(evil_name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    placement = Placement(ModelInfo.from_file(files["runs"]), [f"GPU{EVIL}"], default="gpu")
    files["placement"] = folder / f"placement{EVIL.replace('/', '')}.json"
    placement.save(files["placement"])
    files["broken"] = folder / f"broken{EVIL.replace('/', '')}.json"
    files["broken"].write_text('{"devices": "' + json.dumps(EVIL)[1:-1] + '"}')
    files["missing"] = folder / f"missing{EVIL.replace('/', '')}.gguf"
    files["bytes"] = folder / os.fsdecode(b"bytes\x9b31m\xff.gguf")
    return files


# Names of the files above stand for these; --temp 0 has a long reply of tokens that are not characters.
RUNS = ["--ctx", "64", "--threads", "1", "--offload", "cpu"]
CASES: list[tuple[str, ...]] = [
    ("info", "runs"),
    ("run", "runs", "Hi", "-n", "8", "--temp", "0", *RUNS),
    ("run", "missing", "Hi"),
    ("info", EVIL),
    ("info", f"--{EVIL}"),
    ("info", "fails"),
    ("info", "bytes"),
    (EVIL,),
    ("plan", "runs", "--ram", "8GiB", "--vram", "1GiB"),
    ("plan", "fails", "--ram", "8GiB", "--vram", "1GiB"),
    ("plan", "runs", "--ram", EVIL),
    ("plan", "runs", "--ram", "8GiB", "--pin", f"/{EVIL}/=cpu"),
    ("plan", "runs", "--ram", "8GiB", "--save", "missing/x"),
    ("doctor", "runs"),
    ("doctor", "fails"),
    ("devices",),
    ("run", "fails", "Hi", "--verbose", *RUNS),
    ("run", "runs", EVIL, "-n", "4", "--verbose", *RUNS),
    ("run", "runs", "Hi", "--offload", "placement"),
    ("run", "runs", "Hi", "--offload", "broken"),
    ("run", "runs", "Hi", "--grammar", "broken"),
    ("run", "runs", "Hi", "--json-schema", f'{{"type": "{EVIL[:3]}"}}'),
    ("chat", "missing"),
    ("chat", "runs", "--load", "broken", *RUNS),
    ("compare", "runs", "runs", "Hi", "-n", "8", "--temp", "0", *RUNS),
    ("compare", "runs", "fails", EVIL, "-n", "4", "--temp", "0", *RUNS),
    ("compare", "runs", "runs", "Hi", "-n", "4", "--no-progress", *RUNS),
    ("bench", "runs", "-p", "4", "-n", "4", "-r", "1", "--threads", "1"),
    ("bench", "fails", "-p", "4", "-n", "4", "-r", "1", "--threads", "1"),
    ("tune", "runs", "--ctx", "64", "--seconds", "0"),
    ("serve-device", "--host", EVIL),
    ("run", "runs", "Hi", "--rpc", EVIL),
]


def arguments_of(case: tuple[str, ...], files: dict[str, Path]) -> list[str]:
    """Return the arguments, with files for their names."""
    return [str(files.get(argument, argument)) for argument in case]


def controls_in(output: str) -> list[str]:
    """Return the control characters that are not our own commands', with what comes after them."""
    rest = OURS.sub("", output)
    return [rest[found.start() : found.start() + 12] for found in CONTROLS.finditer(rest)]


@pytest.mark.parametrize("case", sweep([(case,) for case in CASES], (0, 1, 2, 4)))
@pytest.mark.usefixtures("no_gpu")
def test_a_terminal_gets_no_commands(evil: dict[str, Path], tmp_path: Path, case: tuple[str, ...]) -> None:
    """What is left without the program's own sequences is text."""
    terminal = Terminal(["-m", "overspill", *arguments_of(case, evil)], tmp_path)
    terminal.end("\x04" if case[0] == "chat" else "")
    assert terminal.raw.strip()
    assert not controls_in(terminal.raw), terminal.raw
    assert "EVIL" not in terminal.screen.title


@pytest.mark.slow
@pytest.mark.usefixtures("no_gpu")
def test_a_chat_gets_no_commands(evil: dict[str, Path], tmp_path: Path) -> None:
    """Nor from the model's name, its replies, a saved conversation and the names of its files."""
    terminal = Terminal(["-m", "overspill", "chat", str(evil["runs"]), "-n", "8", *RUNS], tmp_path)
    kept = evil["runs"].parent / "kept.json"
    for message in ("Hi", "/retry", "/stats", "/placement", f"/save {kept}", f"/load {kept}", "/load none", "/nothing"):
        terminal.ask(message)
    assert terminal.end() == 0
    assert "EVIL" in terminal.text
    assert not controls_in(terminal.raw.replace("\b", "")), terminal.raw  # with which the line editor goes back
    assert "EVIL" not in terminal.screen.title


@pytest.mark.parametrize("case", sweep([(case,) for case in CASES if case[0] != "run"], (0, 2, 5, 11)))
@pytest.mark.usefixtures("no_gpu")
def test_a_pipe_gets_text(evil: dict[str, Path], case: tuple[str, ...]) -> None:
    """All but the model's text is without control characters there, too."""
    done = overspill(*arguments_of(case, evil), stdin="Hi")
    assert not CONTROLS.search(done.stderr), done.stderr
    if case[0] not in ("chat", "compare"):
        assert not CONTROLS.search(done.stdout), done.stdout


@pytest.mark.usefixtures("no_gpu")
def test_a_pipe_gets_the_models_text_as_it_is(evil: dict[str, Path]) -> None:
    """A program that reads it may want each character."""
    with Model(evil["runs"], n_ctx=64, n_threads=1, offload="cpu") as model:
        text = model.generate("Hi", max_tokens=8, temperature=0).text
        reply = "".join(token.text for token in model.chat("Hi", max_tokens=8, temperature=0))
    assert "\x1b" in text
    options = ["-n", "8", "--temp", "0", *RUNS]
    done = overspill("run", evil["runs"], "Hi", *options)
    assert done.stdout == f"{text}\n"
    assert not CONTROLS.search(done.stderr)
    assert overspill("chat", evil["runs"], *options, stdin="Hi").stdout == f"{reply}\n"
    compared = overspill("compare", evil["runs"], evil["runs"], "Hi", *options).stdout
    assert compared.count(reply.strip("\n")) == 2


def test_commands_write_to_our_consoles() -> None:
    """Others would not leave control characters out."""
    folder = Path(package.__file__).parent / "cli"
    files = [file for file in folder.rglob("*.py") if file.name != "output.py"]
    assert len(files) > 10
    for file in files:
        source = file.read_text(encoding="utf-8")
        assert not re.search(r"\bConsole\(|sys\.stdout\.write|\bprint_exception", source), file
