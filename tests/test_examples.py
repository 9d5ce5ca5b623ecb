"""The scripts in examples/ run, and print what the library gives otherwise."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from overspill import Chat, Completion, Model, Placement
from rounding import NATS

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.usefixtures("no_gpu")


@dataclass(frozen=True)
class Ran:
    """What an example printed, and the folder that it ran in."""

    output: str
    errors: str
    folder: Path


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs an example in a folder of its own."""

    def example(name: str, *arguments: object, stdin: str = "") -> Ran:
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
        done = subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return Ran(done.stdout, done.stderr, tmp_path)

    return example


def greedy(path: Path, prompt: str, n_tokens: int) -> Completion:
    """Return a prompt's continuation by a model that has decoded nothing else."""
    with Model(path) as model:
        return model.generate(prompt, max_tokens=n_tokens, temperature=0)


def test_ask(run: Run, smollm2_path: Path) -> None:
    """It prints the reply to the question that is given."""
    ran = run("ask", smollm2_path, "What do cats eat?")
    with Model(smollm2_path) as model:
        reply = model.ask("What do cats eat?", system="Answer in one sentence.", max_tokens=100, temperature=0)
    assert ran.output == reply.text + "\n"
    assert "tok/s" in ran.errors


def test_stream(run: Run, smollm2_path: Path) -> None:
    """It ends with the first sentence of the longer text."""
    text = run("stream", smollm2_path).output.rstrip("\n")
    assert text.endswith(".")
    whole = greedy(smollm2_path, "Once upon a time", 100).text
    assert whole.startswith(text)
    assert "." not in text[:-1]


def test_chat_with_tool(run: Run, smollm2_path: Path, tool_model_path: Path) -> None:
    """Each line gets an answer, and an empty one ends it; a model whose template knows no tools is told so."""
    ran = run("chat_with_tool", tool_model_path, stdin="Say hello.\n\nThis is not read.\n")
    with Model(tool_model_path) as model:
        chat = Chat(model, system="Be brief.", max_tokens=200, temperature=0)
        stream = chat.send("Say hello.", tools=[tool_of("chat_with_tool", "get_time")])
        assert ran.output == stream.finish().text + "\n"
    with pytest.raises(AssertionError, match="knows no tools"):
        run("chat_with_tool", smollm2_path, stdin="Say hello.\n")


def tool_of(example: str, name: str) -> Callable[..., str]:
    """Return a function of an example, without running the rest of it."""
    tree = ast.parse((EXAMPLES / f"{example}.py").read_text(encoding="utf-8"))
    kept: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)
    ]
    names: dict[str, Callable[..., str]] = {}
    exec(compile(ast.Module(kept, []), example, "exec"), names)
    return names[name]


def test_the_tool_itself() -> None:
    """It is the time in UTC, moved by the hours that are asked for."""
    get_time = tool_of("chat_with_tool", "get_time")
    here, there = (np.datetime64(get_time(hours)[:16]) for hours in (0, 3))
    assert np.timedelta64(179, "m") <= there - here <= np.timedelta64(181, "m")


def test_own_sampler(run: Run, smollm2_path: Path) -> None:
    """It prints what a loop over fresh logits chooses by the same rule."""
    text = run("own_sampler", smollm2_path).output.rstrip("\n")
    with Model(smollm2_path) as model:
        tokens = list(model.tokenize("Once upon a time"))
        chosen: list[int] = []
        logits = model.eval(tokens)
        for _ in range(40):
            row = logits.copy()
            row[(tokens + chosen)[-20:]] = -np.inf
            chosen.append(int(row.argmax()))
            logits = model.eval(chosen[-1:])
        assert text == model.detokenize(chosen).rstrip("\n")


def test_json_to_dataclass(run: Run, tiny_gpt_oss_path: Path, smollm2_path: Path) -> None:
    """A model with random weights fits the schema as well, by the judgement of another library."""
    tree = ast.parse((EXAMPLES / "json_to_dataclass.py").read_text(encoding="utf-8"))
    (schema,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCHEMA"
    )
    for path in (tiny_gpt_oss_path, smollm2_path):
        jsonschema.validate(json.loads(run("json_to_dataclass", path).output), ast.literal_eval(schema))


def test_save_placement(run: Run, smollm2_path: Path) -> None:
    """The file is a placement with the first layers on the CPU, and the bytes printed are those of a loaded model."""
    ran = run("save_placement", smollm2_path, "kept.json")
    assert Placement.load(ran.folder / "kept.json").layers[0].attention == "CPU"
    with Model(smollm2_path, n_ctx=2048, offload="cpu") as model:
        assert f"CPU: {model.memory['CPU'].total_bytes:,} bytes" in ran.output


def test_cascade(run: Run, smollm2_path: Path, gemma_path: Path) -> None:
    """The text is that of the model which the last line names."""
    ran = run("cascade", smollm2_path, gemma_path, "The capital of France is")
    answered = re.match(r"the (small|large) model answered", ran.errors)
    assert answered
    path = smollm2_path if answered[1] == "small" else gemma_path
    assert ran.output.rstrip("\n") == greedy(path, "The capital of France is", 60).text.rstrip("\n")


def test_compare_models(run: Run, smollm2_path: Path, gemma_path: Path) -> None:
    """The page has both questions and both models' names, and nothing from elsewhere."""
    ran = run("compare_models", "report.html", smollm2_path, gemma_path)
    page = (ran.folder / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"^\d+\.\d tokens/s$", ran.output, re.MULTILINE)) == 2
    for text in ("Why is the sky blue?", "Name three rivers in Europe.", smollm2_path.stem, gemma_path.stem):
        assert text in page
    assert not re.search(r"(?:src|href)=\"https?:", page)


def test_several_at_once(run: Run, smollm2_path: Path) -> None:
    """Each continuation is the one that its prompt has alone, or parts from it where two tokens are as likely."""
    lines = run("several_at_once", smollm2_path).output.splitlines()
    prompts = ["Once upon a time", "The sea is"]
    with Model(smollm2_path, n_ctx=1024, offload="cpu") as model:
        for line, prompt in zip(lines, prompts, strict=True):
            text = ast.literal_eval(line)
            assert text.startswith(prompt)
            found = model.tokenize(text.removeprefix(prompt), add_special=False)
            alone = model.generate(prompt, temperature=0, max_tokens=20, logprobs=5).tokens
            parted = next((pair for pair in zip(alone, found, strict=False) if pair[0].id != pair[1]), None)
            if parted is not None:
                odds = dict(parted[0].top_logprobs)
                assert odds[parted[0].id] - odds[parted[1]] < NATS


def test_every_example_has_a_test_and_is_short() -> None:
    """Its name, a docstring of two parts that says how it is called, and at most sixty lines."""
    for file in EXAMPLES.glob("*.py"):
        assert f"test_{file.stem}" in globals(), file.name
        text = file.read_text(encoding="utf-8")
        first, _, usage = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        assert first.endswith(".")
        assert usage.startswith(f"python examples/{file.name} ")
        assert len(text.splitlines()) <= 60
