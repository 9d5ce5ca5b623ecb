"""What README.md and docs/ tell a reader to run does run, and prints what they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

import overspill
import overspill.compat
import overspill.guidance
import overspill.hub
from documents import ROOT, Block, Command, blocks, commands, documents, inline_commands, n_words
from overspill import Model
from overspill.cli.app import app
from servers import serving

COMMANDS = [command for document in documents() for command in commands(document)]
WITH_PYTHON = [name for name in documents() if any(block.language == "python" for block in blocks(name))]
RUN_BY_CI = "it takes minutes, and .ci/run does it"
NO_CUDA = "it needs NVIDIA's toolkit or a GPU"
NO_DOCKER = "it needs Docker and a registry of images"
NO_NETWORK = "it downloads from elsewhere"
NO_MACHINE = "it needs the address of another machine"
MINUTES = "it builds or measures for minutes"
NOT_HERE = {
    'pip install . && overspill run "What is the capital of France?"': RUN_BY_CI,
    "pip install '.[test]' && pytest": RUN_BY_CI,
    "pip install .": MINUTES,
    "pip wheel . --no-deps -C cmake.args=--preset=portable": MINUTES,
    "pip install . -C cmake.define.GGML_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=86-real": NO_CUDA,
    "pip install 'nvidia-cublas==13.*' 'nvidia-cuda-runtime==13.*'": NO_CUDA,
    "pip install 'nvidia-cublas-cu12==12.*' 'nvidia-cuda-runtime-cu12==12.*'": NO_CUDA,
    "pip install 'overspill==0.1.0+cu13' --find-links PAGE_OF_THE_RELEASE": NO_CUDA,
    "docker build -t overspill .": NO_DOCKER,
    "docker build -t overspill-cuda -f Dockerfile.cuda --build-arg CUDA_ARCHITECTURES=86-real .": NO_DOCKER,
    "docker run --rm -it -v ~/models:/models overspill chat model.gguf": NO_DOCKER,
    "docker run --rm -it -v ~/models:/models --gpus all overspill-cuda chat model.gguf": NO_DOCKER,
    "pip install . -C cmake.define.OVERSPILL_LLAMA_CPP_DIR=/path/to/llama.cpp": MINUTES,
    "pip install pip scikit-build-core pybind11 cmake ninja": NO_NETWORK,
    "python vendor/fetch.py": NO_NETWORK,
    "pip install . --no-index --no-build-isolation --no-deps": MINUTES,
    "overspill pull hf:OWNER/REPOSITORY": NO_NETWORK,
    "overspill serve-device --host 192.168.1.20": NO_MACHINE,
    "pip install 'overspill[server]'": NO_NETWORK,
    "overspill serve cascade:gpt-oss-20b.gguf,gpt-oss-120b.gguf": "it runs until it is told to end, in tests/server",
    "overspill serve gpt-oss-20b.gguf": "it runs until it is told to end, in tests/server",
    'overspill run --rpc 192.168.1.20:50052 model.gguf "Why is the sky blue?"': NO_MACHINE,
    "pytest benchmarks --benchmark-json out.json -s": MINUTES,
    "pytest benchmarks/test_kernel_speed.py -s": MINUTES,
}
"""Commands that no test runs, and why."""
MADE_UP = {"overspill list"}
"""Commands whose output is that of a disk which nobody has."""
SERVER = "http://127.0.0.1:8080/v1"
"""What documents call a server's address."""
NAMES = ("model", "gemma", "a", "b", "mixture", "gpt-oss-20b", "gpt-oss-120b")
"""Models that documents speak of."""


StandIns = Callable[[Path, str, str], Path]


@pytest.fixture(scope="session")
def stand_ins(
    smollm2_path: Path, gemma_path: Path, tiny_gpt_oss_path: Path, tool_model_path: Path, gpt_oss_120b_header: Path
) -> StandIns:
    """Return a function that fills a folder with files of the names that a document speaks of."""

    def fill(folder: Path, document: str, text: str) -> Path:
        for name in NAMES:
            (folder / f"{name}.gguf").symlink_to(stand_in(name, document, text))
        (folder / "cut.gguf").write_bytes(smollm2_path.read_bytes()[:100_000])
        for name in ("article.txt", "question.txt"):
            (folder / name).write_text("Is the sea blue? Answer with yes or no.\n", encoding="utf-8")
        return folder

    def stand_in(name: str, document: str, text: str) -> Path:
        if name == "gpt-oss-120b" and text.startswith("overspill plan"):
            return gpt_oss_120b_header
        has_experts = name == "mixture" or (name == "gpt-oss-20b" and document == "docs/offload.md")
        if has_experts or text.startswith("overspill bench"):
            return tiny_gpt_oss_path
        if document == "docs/chat.md":
            return tool_model_path
        return gemma_path if name in ("gemma", "b") else smollm2_path

    return fill


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, tiny_gpt_oss_path: Path) -> dict[str, str]:
    """Return the environment of a reader's shell: a home with one model, which is Ollama's, and no network."""
    home = tmp_path_factory.mktemp("home")
    models = home / ".ollama/models"
    digest = "0" * 64
    (models / "blobs").mkdir(parents=True)
    (models / f"blobs/sha256-{digest}").symlink_to(tiny_gpt_oss_path)
    manifest = models / "manifests/registry.ollama.ai/library/gpt-oss/20b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(
        '{"schemaVersion": 2, "layers": [{"mediaType": "application/vnd.ollama.image.model", '
        f'"digest": "sha256:{digest}", "size": {tiny_gpt_oss_path.stat().st_size}}}]}}'
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "OLLAMA_", "XDG_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "HOME": str(home), "PATH": path, "HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "100"}


def as_pattern(shown: str, *, exactly: bool) -> re.Pattern[str]:
    """Return what output has to match: ``...`` is any text, spaces are alike, and so are numbers if not ``exactly``."""
    parts = [re.escape(" ".join(part.split())) for part in shown.split("...")]
    pattern = r"\s*.*?\s*".join(part.replace(r"\ ", r"\s+") for part in parts)
    return re.compile(pattern if exactly else re.sub(r"\d+", r"\\d+", pattern), re.DOTALL)


@pytest.mark.skipif(sys.platform == "win32", reason="the documents' commands are those of a POSIX shell")
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("command", [one for one in COMMANDS if one.text not in NOT_HERE], ids=str)
def test_a_command_runs(command: Command, stand_ins: StandIns, environment: dict[str, str], tmp_path: Path) -> None:
    """It ends as the document says: with an error if one is shown, else well; and prints what is shown."""
    folder = stand_ins(tmp_path, command.document, command.text)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.text],
        cwd=folder,
        env=environment,
        input="Hello\n",
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    fails = any(line.startswith("error:") for line in command.output.splitlines())
    assert (done.returncode != 0) == fails, done.stderr
    if command.output and command.text not in MADE_UP:
        printed = " ".join((done.stderr if fails else done.stdout).split())
        exactly = fails or "--ram" in command.text  # then nothing of this machine is in it
        assert as_pattern(command.output, exactly=exactly).fullmatch(printed), printed


def test_commands_that_are_not_run_are_in_documents() -> None:
    """None is left in the list that no document has any more, and what CI is to run is in its script."""
    assert set(NOT_HERE) <= {command.text for command in COMMANDS}
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").replace("\\", "")
    for text, reason in NOT_HERE.items():
        assert reason is not RUN_BY_CI or text.split(" && ")[-1] in script


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_runs(
    gpu: str, document: str, stand_ins: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document's blocks run one after the other, in one namespace, beside a GPU or its stand-in."""
    assert gpu
    monkeypatch.chdir(stand_ins(tmp_path, document, ""))
    names: dict[str, Any] = {"overspill": overspill, "prompts": ["Once upon a time", "The sea is"]}
    with ExitStack() as opened:
        for block in blocks(document):
            if block.language != "python":
                continue
            if SERVER in block.text:
                server = opened.enter_context(serving("gpt-oss-20b.gguf", "--offload", "cpu", "--ctx", 1024))
                block = replace(block, text=block.text.replace(SERVER, server.api))
            run_python(block, names)
    for value in names.values():
        if isinstance(value, Model):
            value.close()


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block, with a model at hand where the text speaks of one."""
    if "model" not in names or names["model"].closed:
        names["model"] = Model("model.gguf", n_ctx=1024)
    if "logits" not in names:
        names["logits"] = names["model"].eval([1, 2, 3]).copy()
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, block.document, "exec"), names)


def test_commands_in_sentences_have_options_that_exist() -> None:
    """``overspill COMMAND --option`` within a text names a command and options of it."""
    known: Any = typer.main.get_command(app)
    wrong = []
    for document in documents():
        for text in inline_commands(document):
            name, *words = text.split()[1:]
            command = known.commands.get(name)
            if command is None:
                wrong.append(f"{document}: {text}")
                continue
            options = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
            given = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)}
            wrong += [f"{document}: {text}: {option}" for option in sorted(given - options)]
    assert not wrong


@pytest.mark.parametrize("document", documents())
def test_files_that_are_named_exist(document: str) -> None:
    """Tests, benchmarks, scripts and examples that a document names by their path."""
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:tests|benchmarks|scripts|examples|vendor)/[\w/.-]*\.(?:py|sh|md|txt|toml)\b", text))
    assert not {path for path in named if not (ROOT / path).exists()}


def test_the_reference_has_every_name_once() -> None:
    """What ``import overspill`` exports, and the two modules beside it."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in documents() if name.startswith("docs/api/")]
    listed = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    modules = (overspill, overspill.hub, overspill.guidance, overspill.compat)
    assert sorted(listed) == sorted(f"{module.__name__}.{name}" for module in modules for name in module.__all__)


def test_the_picture_is_what_the_command_prints(gpt_oss_120b_header: Path, tmp_path: Path) -> None:
    """``docs/plan.svg`` is the script's, small, and loads nothing."""
    kept, made = ROOT / "docs/plan.svg", tmp_path / "plan.svg"
    (tmp_path / "gpt-oss-120b.gguf").symlink_to(gpt_oss_120b_header)
    script = [sys.executable, "scripts/plan_picture.py", str(tmp_path / "gpt-oss-120b.gguf"), str(made)]
    subprocess.run(script, cwd=ROOT, check=True, timeout=120)
    assert made.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8")
    assert kept.stat().st_size < 60_000
    assert not re.search(r"url\(['\"]?http|@import|<image|<script", kept.read_text(encoding="utf-8"))


def test_the_readme_is_short() -> None:
    """At most 700 words of text, with one block of Python of ten lines or so."""
    assert n_words("README.md") <= 700
    (python,) = (block for block in blocks("README.md") if block.language == "python")
    assert len(python.text.splitlines()) <= 14
