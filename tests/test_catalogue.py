"""Models on the disk: laid out as each program keeps them, listed once, and found by every name."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import overspill
from commands import overspill as command
from header_files import write_header
from model_files import write_tiny_gpt_oss
from overspill import Error, Model, ModelInfo
from overspill.catalogue.choice import best_fit
from overspill.catalogue.disk import FoundModel, models_on_disk, without_repetition
from overspill.catalogue.model_files import quantisation_in
from overspill.hub import resolve

COMMITS = ["a" * 40, "b" * 40]
VARIABLES = (
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "LLAMA_CACHE", "LOCALAPPDATA", "OLLAMA_MODELS"),
    *("OVERSPILL_MODELS", "XDG_CACHE_HOME"),
)
CACHES = {"darwin": "Library/Caches", "win32": "AppData/Local"}.get(sys.platform, ".cache")
"""The folder for caches in a home."""

Put = Callable[..., Path]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home folder, which is the user's, in which no program was told of another place."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(folder))
    return folder


@pytest.fixture
def put(tiny_gpt_oss_path: Path) -> Put:
    """Return a function that puts a copy of the tiny model at a path."""

    def copy(*path: str | Path) -> Path:
        file = Path(*path)
        file.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(tiny_gpt_oss_path, file))

    return copy


def put_hub(put: Put, cache: Path, repository: str, *files: str, commit: str = COMMITS[0], ref: str = "main") -> Path:
    """Put files into the hub's cache as its client does; return the folder of the snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    for file in files:
        blob = put(folder, "blobs", f"blob-of-{file.replace('/', '-')}")
        link = folder / "snapshots" / commit / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


def put_ollama(put: Put, root: Path, name: str, digest: str) -> Path:
    """Put a model where Ollama keeps it; return its blob."""
    blob = put(root, "blobs", f"sha256-{digest}")
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": f"sha256:{'f' * 64}", "size": 1},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": blob.stat().st_size},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return blob


def listed(folder: Path) -> dict[str, FoundModel]:
    """Return what is listed of the models in a folder, by name; a service may have others on this machine."""
    shown = without_repetition(models_on_disk())
    return {model.name: model for model in shown if folder in model.file.parents}


def test_each_program_keeps_models_in_its_own_way(
    home: Path, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model is listed once with a name that leads to its file, however often and by whom it is kept."""
    snapshot = put_hub(put, home / ".cache/huggingface/hub", "a/b", "x-Q4_K_M.gguf", "sub/x-Q8_0.gguf", "mmproj-x.gguf")
    old = snapshot.with_name(COMMITS[1])
    shutil.copytree(snapshot, old, symlinks=True)
    ollama = home / ".ollama/models"
    blobs = [put_ollama(put, ollama, f"registry.ollama.ai/library/gpt-oss/{tag}", "0" * 64) for tag in ("20b", "x")]
    thing = put_ollama(put, ollama, "registry.ollama.ai/someone/thing/latest", "1" * 64)
    from_hub = put_ollama(put, ollama, "hf.co/someone/repo-GGUF/Q4_K_M", "2" * 64)
    own, other = tmp_path / "own", tmp_path / "other"
    (own / "deep").mkdir(parents=True)
    split = write_tiny_gpt_oss(own / "deep/split.gguf", n_files=2)
    (own / "link.gguf").symlink_to(snapshot / "x-Q4_K_M.gguf")
    (own / "loop").symlink_to(own, target_is_directory=True)
    shutil.copy(split, own / "torn-00001-of-00003.gguf")  # the other parts are not there
    monkeypatch.setenv("OVERSPILL_MODELS", os.pathsep.join(map(str, (own, other, tmp_path / "missing"))))
    expected = {
        "hf:a/b:Q4_K_M": ("Hugging Face", snapshot / "x-Q4_K_M.gguf"),
        "hf:a/b:Q8_0": ("Hugging Face", snapshot / "sub/x-Q8_0.gguf"),
        "lmstudio:c/d": ("LM Studio", put(home, ".lmstudio/models/c/d/y-Q4_0.gguf")),
        "lmstudio:c/e/y.gguf": ("LM Studio", put(home, ".cache/lm-studio/models/c/e/y.gguf")),
        "lmstudio:c/e/z.gguf": ("LM Studio", put(home, ".cache/lm-studio/models/c/e/z.gguf")),
        "gpt-oss:20b": ("Ollama", blobs[0]),
        "someone/thing:latest": ("Ollama", thing),
        "hf.co/someone/repo-GGUF:Q4_K_M": ("Ollama", from_hub),
        "ggml-org_w": ("llama.cpp", put(home, CACHES, "llama.cpp/ggml-org_w.gguf")),
        "v": ("OVERSPILL_MODELS", put(own, "v.gguf")),
        str(other / "v.gguf"): ("OVERSPILL_MODELS", put(other, "v.gguf")),
        "split-00001-of-00002": ("OVERSPILL_MODELS", split),
    }
    found = listed(tmp_path)
    assert {name: (model.source, model.file) for name, model in found.items()} == expected
    assert found["split-00001-of-00002"].files == tuple(sorted(split.parent.iterdir()))
    names = {name: file for name, (_, file) in expected.items()}
    names |= {
        "hf:a/b:q8_0": snapshot / "sub/x-Q8_0.gguf",
        "hf:A/B:Q4_K_M@main": snapshot / "x-Q4_K_M.gguf",
        f"hf:a/b:Q4_K_M@{COMMITS[1]}": old / "x-Q4_K_M.gguf",
        "lmstudio:c/d/y-Q4_0.gguf": home / ".lmstudio/models/c/d/y-Q4_0.gguf",
        "gpt-oss:x": blobs[1],
        "GPT-OSS:20B": blobs[0],
        "ollama:gpt-oss:20b": blobs[0],
        "someone/thing": thing,
        "ollama:someone/thing": thing,
        "link": own / "link.gguf",
        "~/.lmstudio/models/c/d": home / ".lmstudio/models/c/d/y-Q4_0.gguf",
    }
    assert {name: resolve(name) for name in names} == names


def test_the_command_lists_what_can_be_read(home: Path, put: Put, tmp_path: Path) -> None:
    """With its size and whether it fits: as a table, and as JSON; damaged files and manifests are left out."""
    good = put_ollama(put, home / ".ollama/models", "registry.ollama.ai/library/good/1b", "0" * 64)
    put_ollama(put, home / ".ollama/models", "registry.ollama.ai/library/bad/1b", "1" * 64).write_bytes(b"no model")
    (home / ".ollama/models/manifests/registry.ollama.ai/library/good/2b").write_text("{")
    own = tmp_path / "own"
    own.mkdir()
    split = write_tiny_gpt_oss(own / "split.gguf", n_files=2)
    huge = write_header(own / "huge.gguf", "deepseek-v3")  # of its true size, on the disk it takes no space
    environment = {**os.environ, "OVERSPILL_MODELS": str(own)}
    done = command("list", "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = {model["name"]: model for model in json.loads(done.stdout) if tmp_path in Path(model["file"]).parents}
    assert set(shown) == {"good:1b", "huge", "split-00001-of-00002"}
    sizes = [file.stat().st_size for file in own.glob("split-*")]
    assert len(sizes) == 2
    assert shown["split-00001-of-00002"]["file_bytes"] == sum(sizes)
    assert shown["split-00001-of-00002"]["file"] == str(split)
    assert shown["good:1b"]["file_bytes"] == good.stat().st_size
    assert shown["good:1b"]["quantisation"] == ModelInfo.from_file(good).quantisation
    assert shown["good:1b"]["verdict"] in ("fits on the GPU", "CPU only")
    assert huge.stat().st_size > 3e11
    assert shown["huge"]["verdict"] == "does not fit"
    table = command("list", environment=environment).stdout.splitlines()
    assert table[0].split() == ["name", "size", "quantisation", "from", "fits"]
    (line,) = [line for line in table if line.startswith("huge ")]
    assert line.split()[-3:] == ["does", "not", "fit"]
    assert f"{huge.stat().st_size / 2**30:.0f} GiB" in line


def test_without_models_the_list_says_how_to_get_one(home: Path) -> None:
    """On standard error: there is nothing to list."""
    done = command("list", environment={**os.environ, "OLLAMA_MODELS": str(home)})
    assert (done.returncode, done.stdout) == (0, "")
    assert "overspill pull hf:OWNER/REPOSITORY" in done.stderr
    assert command("list", "--json", environment={**os.environ, "OLLAMA_MODELS": str(home)}).stdout == "[]\n"


@pytest.mark.parametrize(
    ("variable", "below", "name"),
    [
        ("HF_HOME", "hub", "hf:a/b:Q8_0"),
        ("HF_HUB_CACHE", "", "hf:a/b:Q8_0"),
        ("XDG_CACHE_HOME", "huggingface/hub", "hf:a/b:Q8_0"),
        ("OLLAMA_MODELS", "", "m:1b"),
        ("LLAMA_CACHE", "", "m-Q8_0"),
        ("XDG_CACHE_HOME", "llama.cpp", "m-Q8_0"),
    ],
)
@pytest.mark.usefixtures("home")
def test_a_cache_that_was_moved(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str, name: str
) -> None:
    """The environment says where it is, as it says to the program itself."""
    monkeypatch.setenv(variable, str(tmp_path / "moved"))
    folder = tmp_path / "moved" / below
    if name.startswith("hf:"):
        file = put_hub(put, folder, "a/b", "m-Q8_0.gguf") / "m-Q8_0.gguf"
    elif variable == "OLLAMA_MODELS":
        file = put_ollama(put, folder, "registry.ollama.ai/library/m/1b", "0" * 64)
    else:
        file = put(folder, "m-Q8_0.gguf")
    assert list(listed(tmp_path)) == [name]
    assert resolve(name) == file


def test_everything_takes_names(home: Path, put: Put) -> None:
    """A model is loaded, planned and described by the name, and its blob has no ending."""
    blob = put_ollama(put, home / ".ollama/models", "registry.ollama.ai/library/gpt-oss/20b", "0" * 64)
    with Model("gpt-oss:20b", n_ctx=64, offload="cpu") as model:
        assert model.info.files == [str(blob)]
        assert model.generate("Hello", max_tokens=2)
    hardware = overspill.Hardware.given(ram="8GiB", vram=0)
    assert overspill.plan("gpt-oss:20b", hardware=hardware).info.files == [str(blob)]
    assert ModelInfo.from_file("ollama:gpt-oss:20b").files == [str(blob)]
    done = command("info", "gpt-oss:20b", "--json")
    assert json.loads(done.stdout)["files"] == [str(blob)]


def test_a_file_wins_over_a_name(home: Path, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called."""
    blob = put_ollama(put, home / ".ollama/models", "registry.ollama.ai/library/llama/latest", "0" * 64)
    monkeypatch.chdir(tmp_path)
    assert resolve("llama") == blob
    put("llama")
    assert resolve("llama") == Path("llama")
    assert resolve("ollama:llama") == blob


def test_a_revision_that_is_not_the_main_one(home: Path, put: Put, tmp_path: Path) -> None:
    """It is listed with its tag, since the plain name is that of the main branch."""
    cache = home / ".cache/huggingface/hub"
    main = put_hub(put, cache, "a/b", "new/x-Q4_K_M.gguf")
    put_hub(put, cache, "a/b", "x-Q4_K_M.gguf", "x-Q8_0.gguf", commit=COMMITS[1], ref="v1")
    old = main.with_name(COMMITS[1])
    assert set(listed(tmp_path)) == {"hf:a/b:Q4_K_M", "hf:a/b/x-Q4_K_M.gguf@v1", "hf:a/b/x-Q8_0.gguf@v1"}
    assert resolve("hf:a/b:Q4_K_M") == resolve("hf:a/b") == main / "new/x-Q4_K_M.gguf"
    assert resolve("hf:a/b:Q4_K_M@v1") == old / "x-Q4_K_M.gguf"
    assert resolve("hf:a/b:Q8_0") == old / "x-Q8_0.gguf"


def test_a_folder_with_one_model(put: Put, tmp_path: Path) -> None:
    """It is that model, split or not, beside a vision projector too; of several, the error has the names."""
    folder = tmp_path / "folder"
    first = write_tiny_gpt_oss(put(folder, "Q8_0", "mmproj.gguf").with_name("split.gguf"), n_files=2)
    for path in (folder, folder / "Q8_0"):
        assert resolve(path) == resolve(str(path)) == first
    put(folder, "other.gguf")
    with pytest.raises(Error, match=r"give the \.gguf file in it: other\.gguf, Q8_0/split-00001-of-00002\.gguf$"):
        resolve(folder)
    for i in range(9):
        put(folder, f"more-{i}.gguf")
    with pytest.raises(Error, match=r"more-3\.gguf, more-4\.gguf and 6 more$"):
        resolve(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert resolve(empty) == empty


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpt-os:20b", "there is no file and no model called gpt-os:20b; did you mean gpt-oss:20b"),
        ("gpt-oss", "did you mean gpt-oss:20b"),
        ("ollama:gpt-oss:20", "did you mean gpt-oss:20b"),
        ("lmstudio:own/repo", "did you mean lmstudio:owner/repo"),
        ("something-else-entirely", "called something-else-entirely; see `overspill list`"),
        ("lmstudio:owner/two", "several models are called lmstudio:owner/two: lmstudio:owner/two/a.gguf, lmstudio:"),
    ],
)
def test_a_wrong_name(home: Path, put: Put, name: str, text: str) -> None:
    """One line has the nearest ones, and says where the others are."""
    put_ollama(put, home / ".ollama/models", "registry.ollama.ai/library/gpt-oss/20b", "0" * 64)
    put(home, ".lmstudio/models/owner/repo/one.gguf")
    put(home, ".lmstudio/models/owner/two/a.gguf")
    put(home, ".lmstudio/models/owner/two/b.gguf")
    done = command("info", name)
    assert done.returncode == 1
    assert text in done.stderr
    assert "overspill list" in done.stderr or text.startswith("several")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["missing.gguf", "./missing", "folder/missing", "~/missing", "~nobody-at-all/missing"])
def test_a_missing_file_is_no_wrong_name(home: Path, name: str) -> None:
    """What looks like a file gets the error of a file."""
    expected = Path(name.replace("~/", f"{home}/"))
    assert resolve(name) == expected
    with pytest.raises(overspill.ModelLoadError, match="no such file"):
        ModelInfo.from_file(name)


@pytest.mark.parametrize(
    "manifest",
    [
        *(b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"layers": 3}', b'{"layers": [3]}', b'{"layers": [{}]}'),
        b'{"layers": [{"mediaType": "application/vnd.ollama.image.model"}]}',
        b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": 3}]}',
        b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../x"}]}',
        b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:' + b"9" * 64 + b'"}]}',
        b'{"layers": [{"mediaType": "application/vnd.ollama.image.projector", "digest": "sha256:' + b"0" * 64 + b'"}]}',
    ],
)
def test_a_damaged_manifest_is_left_out(home: Path, put: Put, tmp_path: Path, manifest: bytes) -> None:
    """The others are listed."""
    ollama = home / ".ollama/models"
    put_ollama(put, ollama, "registry.ollama.ai/library/good/1b", "0" * 64)
    folder = ollama / "manifests/registry.ollama.ai/library/bad"
    folder.mkdir()
    (folder / "1b").write_bytes(manifest)
    (ollama / "manifests/.DS_Store").write_bytes(b"")
    assert list(listed(tmp_path)) == ["good:1b"]


def test_a_blob_that_is_gone(home: Path, put: Put, tmp_path: Path) -> None:
    """A link of the hub's cache that leads nowhere is not listed."""
    snapshot = put_hub(put, home / ".cache/huggingface/hub", "a/b", "x-Q4_K_M.gguf", "x-Q8_0.gguf")
    (snapshot / "x-Q8_0.gguf").resolve().unlink()
    assert list(listed(tmp_path)) == ["hf:a/b:Q4_K_M"]


@pytest.mark.parametrize(
    ("file", "quantisation"),
    [
        ("gemma-3-1b-it-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Q4_K_M/model-IQ2_XXS-00001-of-00003.gguf", "IQ2_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("model_f16.gguf", "F16"),
        ("model-bf16.gguf", "BF16"),
        ("Q4_K_M/model.gguf", ""),
        ("qwq-32b.gguf", ""),
        ("q4-model-Q8_0.imatrix.gguf", "Q8_0"),
    ],
)
def test_the_quantisation_in_the_name_of_a_file(file: str, quantisation: str) -> None:
    """As people write it, in capitals."""
    assert quantisation_in(file) == quantisation


SIZES = {"Q2_K": 3, "Q4_K_S": 5, "Q4_K_M": 6, "Q6_K": 8, "Q8_0": 10, "F16": 20}


@pytest.mark.parametrize(
    ("gpu_gib", "all_gib", "taken"),
    [
        (0, 64, "Q4_K_M"),
        (6, 64, "Q4_K_M"),
        (8, 64, "Q4_K_M"),
        (10, 64, "Q6_K"),
        (12, 64, "Q8_0"),
        (48, 112, "Q8_0"),
        (0, 7.5, "Q4_K_S"),
        (0, 6, "Q2_K"),
    ],
)
def test_the_quantisation_for_a_machine(gpu_gib: float, all_gib: float, taken: str) -> None:
    """Four bits or more on the GPU if they fit with 2 GiB to spare, else the usual one, else what fits at all."""
    sizes = {f"model-{kind}.gguf": size << 30 for kind, size in SIZES.items()}
    assert best_fit(sizes, int(gpu_gib * 2**30), int(all_gib * 2**30))[0] == f"model-{taken}.gguf"


def test_no_quantisation_for_a_machine() -> None:
    """The error has the smallest one and the memory."""
    with pytest.raises(Error, match=r"the smallest, Q2_K, has 3\.0 GiB and does not fit in the 4\.0 GiB"):
        best_fit({f"model-{kind}.gguf": size << 30 for kind, size in SIZES.items()}, 0, 4 << 30)
