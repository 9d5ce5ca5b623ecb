"""The options of all commands: their names, their help, the errors about them, and what they do to a model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from commands import overspill
from model_files import llama_cpp_folder
from overspill import Model
from overspill.cli.app import COMMANDS, app
from overspill.cli.options import with_option_names

COMMAND_LINE: Any = typer.main.get_command(app)
LOADING = ("run", "chat", "compare", "tune", "bench", "experts")
# Those of llama.cpp's tools, by our parameters.
SAME_AS_LLAMA_CPP = {
    "n_ctx": "--ctx-size",
    "n_batch": "--batch-size",
    "n_ubatch": "--ubatch-size",
    "n_threads": "--threads",
    "type_k": "--cache-type-k",
    "type_v": "--cache-type-v",
    "flash_attention": "--flash-attn",
    "offload": "--gpu-layers",
    "override": "--override-kv",
    "seed": "--seed",
    "max_tokens": "--predict",
    "system": "--system-prompt",
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repeat_penalty": "--repeat-penalty",
}
# A value that each loading option refuses.
REFUSED = {
    "n_ctx": "0",
    "n_batch": "0",
    "n_ubatch": "70000",
    "n_threads": "0",
    "n_parallel": "300",
    "prompt_cache": "much",
    "type_k": "f17",
    "type_v": "f17",
    "flash_attention": "perhaps",
    "load_mode": "magic",
    "experts": "some",
    "memory": "cpu=much",
    "rpc": "nowhere",
    "override": "gpt-oss.rope.freq_base=high",
    "offload": "some",
}


def options_of(command: str) -> dict[str, list[str]]:
    """Return the spellings of a command's options, by parameter."""
    return {one.name: one.opts for one in COMMAND_LINE.commands[command].params if one.param_type_name == "option"}


def together(text: str) -> str:
    """Return a text without spaces and ends of lines, wherever it was wrapped."""
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("columns", [80, 120])
def test_no_help_is_cut_off(columns: int) -> None:
    """Every summary, description and option is there to its last word, and no line is too long."""
    environment = {**os.environ, "COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}
    shown = overspill("--help", environment=environment).stdout
    for name, command in COMMAND_LINE.commands.items():
        assert together(f"{name} {command.short_help}") in together(shown)
        page = overspill(name, "-h", environment=environment).stdout
        wanted = [command.help, *(one.help for one in command.params)]
        assert all(together(text) in together(page) for text in wanted), name
        assert all(spelling in page for spellings in options_of(name).values() for spelling in spellings), name
        assert "..." not in re.sub(r"(?m)^Usage: .*\n|MODEL MODEL\.\.\.(\s|$)|\}\.\.\.", "", page), name
        assert max(map(len, page.splitlines())) <= columns
    assert "..." not in shown.replace("[ARGS]...", "")
    assert len(COMMAND_LINE.commands) == len(COMMANDS)


def test_names_are_those_of_llama_cpp() -> None:
    """Every spelling in its source, of what we have as well."""
    source = (llama_cpp_folder() / "common/arg.cpp").read_text(encoding="utf-8")
    spellings = [re.findall(r'"(-[^"]+)"', found) for found in re.findall(r"\{\s*((?:\"-[^\"]+\",?\s*)+)\}", source)]
    for parameter, name in SAME_AS_LLAMA_CPP.items():
        theirs = {one for group in spellings if name in group for one in group}
        assert theirs
        assert theirs <= set(options_of("run")[parameter]), parameter


@pytest.mark.parametrize("command", [*LOADING, "plan", "doctor"])
def test_an_option_has_the_same_names_everywhere(command: str) -> None:
    """Commands leave options out, and rename none."""
    one_list = options_of("run")
    here = options_of(command)
    assert all(here[name] == names for name, names in one_list.items() if name in here)
    assert "n_threads" in here or command in ("plan", "tune")


@pytest.mark.parametrize("parameter", REFUSED)
@pytest.mark.usefixtures("no_gpu")
def test_an_error_names_the_option(tiny_gpt_oss_path: Path, parameter: str) -> None:
    """In one line, whichever spelling was used."""
    for spelling in options_of("run")[parameter]:
        done = overspill("run", tiny_gpt_oss_path, "x", spelling, REFUSED[parameter])
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert any(name in done.stderr for name in options_of("run")[parameter] if name.startswith("--"))


def test_no_loading_option_is_left_out_of_the_sweep() -> None:
    """Each has a value that it refuses."""
    of_replies = {"temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "max_tokens", "system"}
    of_run = {"raw", "json_schema", "grammar", "stop", "session", "verbose"}
    assert set(options_of("run")) - of_replies - of_run == set(REFUSED)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("n_ctx must be at least 1, not 0", "--ctx must be at least 1, not 0"),
        ('give load_mode="mmap", a smaller n_ctx, or type_k', "give --load-mode mmap, a smaller --ctx, or --type-k"),
        ('offload="gpu", but there is no GPU here', "--offload gpu, but there is no GPU here"),
        ("experts must be one of auto", "--experts must be one of auto"),
        ("the experts take memory, and the seed is random", "the experts take memory, and the seed is random"),
        ("/models/n_ctx.gguf: no such file", "/models/n_ctx.gguf: no such file"),
        ("model.n_ctx is 5", "model.n_ctx is 5"),
        ("--ctx is for n_ctx_train", "--ctx is for n_ctx_train"),
    ],
)
def test_arguments_of_python_become_options(message: str, text: str) -> None:
    """Words of English, paths and attributes stay as they are."""
    assert with_option_names(message) == text


@pytest.mark.usefixtures("no_gpu")
def test_overrides_reach_the_model(tiny_gpt_oss_path: Path) -> None:
    """In both forms: the reply is that of the library with the same values, and not the plain one."""
    options = ("Hello", "--raw", "-n", "12", "--temp", "0", "-t", "1")
    plain = overspill("run", tiny_gpt_oss_path, *options).stdout
    values = {"gpt-oss.rope.freq_base": 50.0, "gpt-oss.expert_used_count": 1}
    with Model(tiny_gpt_oss_path, overrides=values, n_threads=1) as model:
        wanted = model.generate("Hello", max_tokens=12, temperature=0).text + "\n"
    short = ["--override", "gpt-oss.rope.freq_base=50", "--override", "gpt-oss.expert_used_count=1"]
    long = ["--override-kv", "gpt-oss.rope.freq_base=float:50", "--override-kv", "gpt-oss.expert_used_count=int:1"]
    for given in (short, long):
        done = overspill("run", tiny_gpt_oss_path, *options, *given)
        assert done.returncode == 0, done.stderr
        assert done.stdout == wanted != plain


def test_overrides_of_texts(tiny_gpt_oss_path: Path) -> None:
    """A text may look like a number, and a header's plan follows its figures."""
    done = overspill(
        *("plan", tiny_gpt_oss_path, "--ram", "8GiB", "--override", "general.name=123"),
        *("--override", "gpt-oss.context_length=512", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert '"n_ctx": 512' in done.stdout


@pytest.mark.usefixtures("no_gpu")
def test_all_layers_are_the_gpu(tiny_gpt_oss_path: Path) -> None:
    """``-ngl`` is ``--offload`` by another name."""
    assert "there is no GPU here" in overspill("run", tiny_gpt_oss_path, "x", "-ngl", "all").stderr
    assert overspill("run", tiny_gpt_oss_path, "x", "-n", "1", "-ngl", "0").returncode == 0


def test_what_a_model_will_do_is_said_before_it_is_loaded(gpu: str, tiny_gpt_oss_path: Path) -> None:
    """One line, where a plan leaves a part of it in RAM; none where the caller decides where it goes."""
    options = ("run", tiny_gpt_oss_path, "Hello", "--raw", "-n", "1")
    told = overspill(*options, "--memory", f"{gpu}=1032MiB", "--experts", "static").stderr.splitlines()
    lines = [line for line in told if "tok/s" in line and "stop:" not in line]
    assert len(lines) == 1
    assert re.search(r"about \d+\.\d tok/s, [\d.e-]+ s to the first token after a prompt of 1 token, ", lines[0])
    assert lines[0].endswith(" MiB on CPU")
    for offload in ("gpu", "cpu"):
        assert "to the first token after" not in overspill(*options, "--offload", offload).stderr


def complete(*words: object) -> list[str]:
    """Return what bash would complete the last word to."""
    given = ["overspill", *map(str, words)]
    asked = {"_OVERSPILL_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(given), "COMP_CWORD": str(len(given) - 1)}
    return overspill(environment={**os.environ, **asked}).stdout.split()


def test_a_shell_completes_commands_options_and_models(tmp_path: Path) -> None:
    """Models are files, folders with some, and names that ``overspill list`` shows."""
    (tmp_path / "mine").mkdir()
    for name in ("model.gguf", "mine/other.gguf", "model.txt"):
        (tmp_path / name).touch()
    assert complete("ben") == ["bench"]
    assert "--ctx-size" in complete("run", "--ctx")
    assert sorted(complete("info", tmp_path / "m")) == [f"{tmp_path}/mine/", f"{tmp_path}/model.gguf"]
    for command in ("run", "chat", "compare", "tune", "bench", "experts", "doctor", "plan"):
        assert complete(command, tmp_path / "mod") == [f"{tmp_path}/model.gguf"], command
    assert {"--install-completion", "--show-completion"} <= set(overspill("--help").stdout.split())
