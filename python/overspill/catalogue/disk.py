"""The models on the disk: in the caches of the usual programs, and in folders of the user's own."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overspill._core import Error
from overspill.base.files import cache_folder, expanded, read_json
from overspill.catalogue.model_files import models_in, quantisation_in

__all__ = ["FoundModel", "cached_models", "models_on_disk", "without_repetition"]

_DEPTH = 5  # levels of folders that are searched
_BLOB = re.compile(r"sha256[:-]([0-9a-f]{64})")
_OLLAMA_MODEL = "application/vnd.ollama.image.model"


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model on the disk."""

    source: str
    """Whose folder it is in, such as ``Ollama``."""
    names: tuple[str, ...]
    """Names of it, the best one first; others may be those of other models, too."""
    files: tuple[Path, ...]
    """Its files, the first part first."""

    @property
    def file(self) -> Path:
        """The file to load."""
        return self.files[0]

    @property
    def name(self) -> str:
        """The name to show."""
        return self.names[0]


def models_on_disk() -> list[FoundModel]:
    """Return every model under every name it has, so that one file may be there several times.

    No two have the same first name. Nothing of a file is read but the manifests of Ollama.
    """
    taken: set[str] = set()
    found = []
    for model in _candidates():
        best = next((name for name in model.names if name.casefold() not in taken), str(model.file))
        taken.add(best.casefold())
        others = [name for name in model.names if name != best]
        found.append(FoundModel(model.source, (best, *others), model.files))
    return found


def without_repetition(models: list[FoundModel]) -> list[FoundModel]:
    """Return each model once, under the first of its names; two names are of one model if they lead to one file."""
    seen = set()
    found = []
    for model in models:
        try:
            status = model.file.stat()
        except OSError:  # removed meanwhile, or not ours to read
            continue
        if (key := (status.st_dev, status.st_ino)) not in seen:
            seen.add(key)
            found.append(model)
    return found


def cached_models(repository: str, revision: str | None) -> Iterator[dict[str, list[Path]]]:
    """Yield the models of each revision of a repository in the hub's cache: their files, by the name in the repository.

    Without a revision, the branch ``main`` comes first.
    """
    for folder in _listed(_hub_cache()):
        if folder.name.casefold() == f"models--{repository.replace('/', '--')}".casefold():
            for snapshot, refs in _snapshots(folder):
                if revision is None or revision in (*refs, snapshot.name):
                    models = models_in(snapshot, depth=_DEPTH)
                    yield {files[0].relative_to(snapshot).as_posix(): files for files in models}


def _candidates() -> Iterator[FoundModel]:
    yield from _of_the_hub()
    yield from _of_lm_studio()
    yield from _of_ollama()
    own = os.environ.get("OVERSPILL_MODELS", "").split(os.pathsep)
    yield from _of_folder("llama.cpp", _llama_cpp_cache(), depth=0)
    for folder in own:
        if folder:
            yield from _of_folder("OVERSPILL_MODELS", expanded(Path(folder)), depth=_DEPTH)
    yield from _of_folder("Overspill", cache_folder(), depth=0)


def _of_folder(source: str, folder: Path, *, depth: int) -> Iterator[FoundModel]:
    for files in models_in(folder, depth=depth):
        name = files[0].name
        yield FoundModel(source, (name[:-5], str(files[0]), name), tuple(files))


def _of_the_hub() -> Iterator[FoundModel]:
    for folder in _listed(_hub_cache()):
        kind, _, repository = folder.name.partition("--")
        if kind != "models" or "--" not in repository:
            continue
        repository = repository.replace("--", "/", 1)
        for snapshot, refs in _snapshots(folder):
            for files in models_in(snapshot, depth=_DEPTH):
                file = files[0].relative_to(snapshot).as_posix()
                names = [f"hf:{repository}/{file}@{ref}" for ref in (*refs, snapshot.name)]
                if "main" in refs:
                    quantisation = quantisation_in(file)
                    short = [f"hf:{repository}:{quantisation}"] if quantisation else []
                    names = [*short, f"hf:{repository}/{file}", *names]
                yield FoundModel("Hugging Face", tuple(names), tuple(files))


def _snapshots(folder: Path) -> list[tuple[Path, list[str]]]:
    """Return the revisions of a repository in the cache, each with its branches and tags; ``main`` first."""
    refs: dict[str, list[str]] = {}
    for file in sorted((folder / "refs").rglob("*")):
        try:
            commit = file.read_text(encoding="ascii").strip()
        except (OSError, ValueError):  # a folder, or damaged
            continue
        refs.setdefault(commit, []).append(file.relative_to(folder / "refs").as_posix())
    found = [(snapshot, refs.get(snapshot.name, [])) for snapshot in _listed(folder / "snapshots")]
    return sorted(found, key=lambda one: "main" not in one[1])


def _of_lm_studio() -> Iterator[FoundModel]:
    for root in (Path.home() / ".lmstudio/models", Path.home() / ".cache/lm-studio/models"):
        found = [(files, files[0].relative_to(root).as_posix()) for files in models_in(root, depth=_DEPTH)]
        in_repository = Counter("/".join(path.split("/")[:2]) for _, path in found)
        for files, path in found:
            repository = "/".join(path.split("/")[:2])
            whole, short = f"lmstudio:{path}", f"lmstudio:{repository}"
            names = (short, whole) if in_repository[repository] == 1 and path != repository else (whole, short)
            yield FoundModel("LM Studio", names, tuple(files))


def _of_ollama() -> Iterator[FoundModel]:
    for root in _ollama_folders():
        for place, folders, files in os.walk(root / "manifests"):
            folders.sort()
            for file in sorted(files):
                manifest = Path(place, file)
                names = _ollama_names(manifest.relative_to(root / "manifests").parts)
                blob = _ollama_blob(root, manifest) if names else None
                if blob is not None:
                    yield FoundModel("Ollama", names, (blob,))


def _ollama_names(manifest: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a model by the place of its manifest: registry, owner, name and tag; none elsewhere."""
    if len(manifest) < 4 or manifest[-1].startswith("."):
        return ()
    registry, *owner, name, tag = manifest
    if registry != "registry.ollama.ai":
        owner = [registry, *owner]
    elif owner == ["library"]:
        owner = []
    bare = "/".join([*owner, name])
    names = [f"{bare}:{tag}", bare] if tag == "latest" else [f"{bare}:{tag}"]
    return (*names, *(f"ollama:{name}" for name in names))


def _ollama_blob(root: Path, manifest: Path) -> Path | None:
    """Return the file with the model of a manifest; None if the manifest is damaged, or the file is not there."""
    try:
        layers = read_json(manifest)["layers"]
        digests = [one["digest"] for one in layers if one["mediaType"] == _OLLAMA_MODEL]
        blob = root / "blobs" / f"sha256-{_BLOB.fullmatch(digests[0])[1]}"  # type: ignore[index]
        return blob if blob.is_file() else None
    except (Error, OSError, ValueError, TypeError, LookupError):
        return None


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _hub_cache() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(variable):
            return expanded(Path(folder))
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return expanded(Path(os.environ.get("HF_HOME") or Path(base, "huggingface"))) / "hub"


def _ollama_folders() -> list[Path]:
    if folder := os.environ.get("OLLAMA_MODELS"):
        return [expanded(Path(folder))]
    # Its service on Linux has a home of its own.
    service = [Path("/usr/share/ollama/.ollama/models")] if sys.platform == "linux" else []
    return [Path.home() / ".ollama/models", *service]


def _llama_cpp_cache() -> Path:
    if folder := os.environ.get("LLAMA_CACHE"):
        return expanded(Path(folder))
    # Overspill's own folder is beside it.
    return cache_folder().with_name("llama.cpp")
