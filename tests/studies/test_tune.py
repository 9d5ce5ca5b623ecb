"""Tuning: what is found is kept for one model on one machine, whatever ends it. How fast anything is, is not asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import overspill
from overspill import Error, Model, ModelInfo, Placement
from overspill.planning.tuned import load_tuned, save_tuned, tuned_options
from overspill.studies.tune import Trial, tune
from programs import in_process, python_environment
from rpc_server import running_server
from sweeps import sweep

SETTINGS = {
    "n_ctx": 256,
    "n_ubatch": 512,
    "n_threads": 1,
    "type_k": "f16",
    "type_v": "f16",
    "flash_attention": "auto",
    "repack": "auto",
    "kernels": "auto",
    "load_mode": "read",
    "offload_min_batch": None,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep results in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_result_is_kept_for_its_model(tiny_gpt_oss_path: Path, gemma_path: Path, cache: Path) -> None:
    """It can be loaded by what was kept; for another model there is nothing, nor in a file that is damaged."""
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    with pytest.raises(Error, match="nothing is tuned for this model on this machine: run overspill tune"):
        tuned_options(info)
    seen: list[Trial] = []
    found = tune(tiny_gpt_oss_path, n_ctx=256, allow_kv_types=["q8_0"], report=seen.append)
    assert not found.stopped
    assert [trial for trial in seen if trial.state != "measuring"] == list(found.trials)
    assert [trial.setting for trial in seen[::2]] == [trial.setting for trial in found.trials]
    assert {"plan", "flash_attention", "type_k, type_v", "load_mode"} <= {trial.setting for trial in found.trials}
    assert all(trial.tokens_per_s or trial.problem for trial in found.trials)
    assert found.file is not None
    assert cache in found.file.parents
    assert [file.name for file in found.file.parent.iterdir()] == [found.file.name]
    assert load_tuned(info) == (found.placement, found.settings)
    with Model(tiny_gpt_oss_path, **tuned_options(info)) as model:
        assert model.n_ctx == 256
        assert model.placement == found.placement
        assert model.generate([1, 2, 3], max_tokens=2).tokens
    with Model(tiny_gpt_oss_path, offload="tuned") as model:
        assert model.n_ctx == 256
        assert model.placement == found.placement
        assert model.n_threads == found.settings["n_threads"]
    with Model(tiny_gpt_oss_path, offload="tuned", n_ctx=128) as model:
        assert model.n_ctx == 128
    other = ModelInfo.from_file(gemma_path)
    assert load_tuned(other) is None
    found.file.write_text(found.file.read_text()[:100])
    assert load_tuned(info) is None


def figures(path: Path, **options: Any) -> tuple[int, bool, bytes]:
    """Return the bytes of a model's KV cache, whether it maps its file, and its logits."""
    maps = Path("/proc/self/maps")
    n_before = maps.read_text().count(str(path))  # other tests' models may be open
    with Model(path, **options) as model:
        is_mapped = maps.read_text().count(str(path)) > n_before
        return model.memory["CPU"].kv_bytes, is_mapped, model.eval(list(range(1, 100))).tobytes()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
@pytest.mark.parametrize(
    ("name", "given", "tuned"),
    sweep(
        [
            ("type_k", "f16", "q8_0"),
            ("type_v", "f16", "q8_0"),
            ("flash_attention", "auto", "off"),
            ("repack", "auto", "on"),
            ("kernels", "auto", "llama.cpp"),
            ("load_mode", "mmap", "read"),
        ],
        always=[0, 1],
    ),
)
def test_what_is_given_counts_more_than_what_was_tuned(
    gemma_path: Path, tiny_gpt_oss_path: Path, name: str, given: str, tuned: str
) -> None:
    """Also where it has the value of the default."""
    path = tiny_gpt_oss_path if name in ("type_k", "type_v") else gemma_path  # any model's KV cache shows its types
    info = ModelInfo.from_file(path)
    settings = {**SETTINGS, name: tuned}
    save_tuned(info, Placement.cpu(info), settings, 1.0)
    as_tuned = figures(path, offload="cpu", **settings)
    as_given = figures(path, offload="cpu", **settings | {name: given})
    assert as_tuned != as_given
    assert figures(path, offload="tuned") == as_tuned
    assert figures(path, offload="tuned", **{name: given}) == as_given


def test_what_was_kept_by_hand_of_another_model_is_refused(tiny_gpt_oss_path: Path, gemma_path: Path) -> None:
    """Also where its file has the right name."""
    info, other = ModelInfo.from_file(tiny_gpt_oss_path), ModelInfo.from_file(gemma_path)
    kept = save_tuned(info, Placement.cpu(info), SETTINGS, 1.0)
    theirs = save_tuned(other, Placement.cpu(other), SETTINGS, 1.0)
    assert kept != theirs
    kept.replace(theirs)
    assert load_tuned(other) is None
    assert load_tuned(info) is None


@pytest.mark.parametrize("earlier_tokens_per_s", [None, 1e-3, 1e9])
@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_keeps_the_best_so_far(tiny_gpt_oss_path: Path, earlier_tokens_per_s: float | None) -> None:
    """Unless an earlier run found faster ones; before anything was measured it is an exception."""
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    if earlier_tokens_per_s is not None:
        save_tuned(info, Placement.cpu(info), SETTINGS, earlier_tokens_per_s)

    def interrupt_the_third(trial: Trial) -> None:
        begun.append(trial)
        if len(begun) == 5:
            signal.raise_signal(signal.SIGINT)

    begun: list[Trial] = []
    found = tune(tiny_gpt_oss_path, n_ctx=128, report=interrupt_the_third)
    assert found.stopped == "interrupted"
    assert len(found.trials) == 2
    assert found.tokens_per_s == max(trial.tokens_per_s or 0 for trial in found.trials if trial.state == "kept")
    tuned = load_tuned(info)
    assert tuned is not None
    if earlier_tokens_per_s == 1e9:
        assert found.file is None
        assert tuned[1] == SETTINGS
    else:
        assert tuned == (found.placement, found.settings)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_gpt_oss_path, n_ctx=128, report=lambda trial: signal.raise_signal(signal.SIGINT))


def test_out_of_time(tiny_gpt_oss_path: Path) -> None:
    """The plan is measured in any case."""
    found = tune(tiny_gpt_oss_path, n_ctx=128, seconds=0)
    assert found.stopped == "out of time"
    assert [(trial.setting, trial.state) for trial in found.trials] == [("plan", "kept")]
    assert found.tokens_per_s == found.planned_tokens_per_s
    assert load_tuned(ModelInfo.from_file(tiny_gpt_oss_path)) is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_ctx": 63}, "n_ctx must be at least 64"),
        ({"seconds": -1}, "seconds must be at least 0"),
        ({"seconds": float("nan")}, "seconds must be at least 0"),
        ({"allow_kv_types": ["q9"]}, "types of the KV cache must be of"),
        ({"memory": {"CUDA7": "1GiB"}}, "memory: there is no device 'CUDA7' here, only CPU"),
        ({"memory": {"cpu": "24"}}, "must have a unit"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_gpu")
def test_bad_arguments(tiny_gpt_oss_path: Path, options: dict[str, Any], text: str) -> None:
    """Each is refused before anything is loaded."""
    with pytest.raises(ValueError, match=text):
        tune(tiny_gpt_oss_path, **options)


# In a process of its own, since a device cannot be taken away again.
ON_A_DEVICE = """
import json, os, sys
import overspill
from overspill.planning.tuned import load_tuned, tuned_options
from overspill.studies.tune import tune

path, endpoint = sys.argv[1:]
info = overspill.ModelInfo.from_file(path)
before = tune(path, n_ctx=128, seconds=0)
overspill.add_rpc_server(endpoint)
unknown = load_tuned(info)
results = []
for memory in ({}, {"gpu": 1 << 30}):
    found = tune(path, n_ctx=128, memory=memory)
    with overspill.Model(path, **tuned_options(info)) as model:
        as_kept = model.placement == found.placement
    trials = [[trial.setting, trial.value, trial.problem] for trial in found.trials]
    results.append({"as_kept": as_kept, "other_file": found.file != before.file, "trials": trials})
print(json.dumps([unknown, results]), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_with_a_device(tiny_gpt_oss_path: Path) -> None:
    """Placements are tried; what was tuned without the device does not hold with it, and is kept beside it."""
    with running_server() as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", ON_A_DEVICE, str(tiny_gpt_oss_path), endpoint],
            capture_output=True,
            text=True,
            timeout=300,
            env=python_environment(),
        )
    assert done.returncode == 0, done.stderr[-3000:]
    unknown, results = json.loads(done.stdout)
    assert unknown is None
    for result in results:
        assert result["as_kept"]
        assert result["other_file"]
    assert any(setting == "placement" for setting, *_ in results[0]["trials"])


COMMAND = [sys.executable, "-m", "overspill", "tune"]


def test_the_command(tiny_gpt_oss_path: Path, cache: Path) -> None:
    """Lines in a pipe, or JSON; a wrong option is refused."""
    arguments = [str(tiny_gpt_oss_path), "--ctx", "128"]
    text = overspill("tune", *arguments)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("plan ")
    assert "flash_attention off" in text.stdout
    assert f"kept in {cache}" in text.stdout
    assert "\x1b" not in text.stdout
    as_json = overspill("tune", *arguments, "--json")
    found = json.loads(as_json.stdout)
    assert as_json.stderr == ""
    assert found["trials"][0]["setting"] == "plan"
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    assert load_tuned(info) == (Placement.from_dict(found["placement"], info), found["settings"])
    wrong = overspill("tune", *arguments, "--memory", "20GiB")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--memory must be DEVICE=SIZE" in wrong.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_in_a_pipe(gemma_path: Path) -> None:
    """The best so far is printed and kept, and the exit code says that it was interrupted."""
    command = [*COMMAND, str(gemma_path), "--ctx", "128"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("plan ")
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted: not everything was tried" in text
    assert "kept in" in text
    assert errors == ""


def test_a_terminal_shows_a_table(tiny_gpt_oss_path: Path) -> None:
    """It grows while trials are made."""
    pexpect: Any = pytest.importorskip("pexpect", reason="a terminal is played by pexpect, which needs a POSIX system")
    environment = {**os.environ, "TERM": "xterm-256color"}
    child = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], str(tiny_gpt_oss_path), "--ctx", "128"],
        env=environment,
        encoding="utf-8",
        dimensions=(40, 120),
        timeout=60,
    )
    for text in ("tok/s", "measuring…", "kept", "flash_attention", "best: "):
        child.expect(text)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


LEAST_BATCH = """
import json, os, sys
from pathlib import Path
from overspill import ModelInfo, Placement
from overspill.studies.tune import _load, _Search
from upstream_tools import stand_in_gpu

path, tools = sys.argv[1], Path(sys.argv[2])
stand_in_gpu(tools, "GPU0", 4 << 30, link_bytes_per_s=2e7)
info = ModelInfo.from_file(path)
trials = []
search = _Search(info, 256, {}, (64, 16), float("inf"), trials.append)
settings = {"n_ctx": 256, "n_ubatch": 64, "n_threads": 1, "repack": "off", "offload_min_batch": None}
found = []
for experts in ("cpu", "gpu"):
    placement = Placement.from_mapping(info, search.gpus, {"default": "gpu", "experts": experts})
    search.changed = None
    with _load(info, offload=placement, **settings) as model:
        search.planned = search._measured(model, placement, settings)
    search._try_least_batch()
    found.append((search.best.settings["offload_min_batch"], search.best.prompt_tokens_per_s))
print(json.dumps([found, [(trial.setting, trial.value, trial.state) for trial in trials]]), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_the_batch_that_a_gpu_takes_over(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """Measured both ways: over so slow a link, a GPU takes over no batch; without weights in RAM nothing is tried."""
    found, trials = in_process(LEAST_BATCH, str(tiny_gpt_oss_path), str(upstream_tools))
    (in_ram, rate), (on_gpu, _) = found
    assert in_ram == 65536
    assert on_gpu is None
    assert rate > 0
    assert trials == [["offload_min_batch", "", "measuring"], ["offload_min_batch", "65536", "kept"]]
