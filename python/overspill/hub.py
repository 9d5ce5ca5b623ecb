"""The names of models that the library and every command take."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from overspill._core import Error
from overspill.base.checks import as_path
from overspill.base.files import expanded
from overspill.catalogue.disk import FoundModel, models_on_disk
from overspill.catalogue.download import HubName, bring
from overspill.catalogue.model_files import is_gguf, models_in

__all__ = ["resolve"]

logger = logging.getLogger("overspill")

_SHOWN = 5  # of the models in a folder


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the local file of a model, which is downloaded first if it is on the hub and not on the disk.

    Parameters
    ----------
    path
        A file, a folder with one model in it, or a text with a name. A file that exists wins over a name.

        ======================================  ======================================================================
        ``hf:OWNER/REPOSITORY:QUANT``           on the Hugging Face hub, such as ``hf:owner/model-GGUF:Q4_K_M``; from
                                                its cache if it is there
        ``hf:OWNER/REPOSITORY``                 likewise, in the quantisation that suits this machine's memory best
        ``hf:OWNER/REPOSITORY/FILE.gguf``       this file; of a split model the first, and all are downloaded
        ``gpt-oss:20b``, ``ollama:gpt-oss``     Ollama's; the tag ``latest`` if there is none
        ``lmstudio:OWNER/REPOSITORY[/FILE]``    LM Studio's
        any other                               as ``overspill list`` shows it
        ======================================  ======================================================================

        ``@REVISION`` at the end of a name on the hub is for a branch, tag or commit other than the main one.
        Downloads go to the hub's own cache, and an interrupted one is resumed.

    Returns
    -------
    Path
        The file; of a split model, its first. What looks like a file and is not there is returned as it is.

    Raises
    ------
    Error
        There is no model of that name, or the folder has several; or the hub does not have the file, does not let you
        have it, or cannot be reached.
    ValueError, TypeError
        ``path`` is no path, or begins with ``hf:`` and is not of one of these forms.
    """
    file = expanded(as_path("path", path))
    if os.path.isdir(file):  # noqa: PTH112  # no error for a name that is too long for a file
        return _only_model_in(file)
    if not isinstance(path, str) or os.path.exists(file):  # noqa: PTH110
        return file
    if path.startswith("hf:"):
        return bring(HubName.parse(path), logger.warning, use_cache=True)
    models = models_on_disk()
    if found := _named(path, models):
        return found.file
    if _looks_like_a_file(path):
        return file
    raise Error(_unknown(path, models))


def _only_model_in(folder: Path) -> Path:
    found = [files[0] for files in models_in(folder, depth=1)]
    if len(found) > 1:
        names = [file.relative_to(folder).as_posix() for file in found]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise Error(f"{folder} is a directory; give the .gguf file in it: {', '.join(names[:_SHOWN])}{more}")
    return found[0] if found else folder


def _named(name: str, models: Iterable[FoundModel]) -> FoundModel | None:
    """Return the model of that name, or None; an Error if it is a lesser name of several."""
    wanted = name.casefold()
    found = [model for model in models if wanted in map(str.casefold, model.names)]
    found.sort(key=lambda model: model.name.casefold() != wanted)
    if len(found) > 1 and found[0].name.casefold() != wanted:
        raise Error(f"several models are called {name}: {', '.join(model.name for model in found[:_SHOWN])}")
    return found[0] if found else None


def _looks_like_a_file(name: str) -> bool:
    if name.startswith(("ollama:", "lmstudio:")):
        return False
    separators = {"/", os.sep, os.altsep or os.sep}
    return is_gguf(name) or name.startswith((".", "~")) or any(separator in name for separator in separators)


def _unknown(name: str, models: Iterable[FoundModel]) -> str:
    shown = {other.casefold(): model.name for model in models for other in model.names}
    near = difflib.get_close_matches(name.casefold(), shown, n=6, cutoff=0.5)
    names = list(dict.fromkeys(shown[other] for other in near))[:3]
    advice = f"did you mean {' or '.join(names)}? `overspill list` shows all" if names else "see `overspill list`"
    return f"there is no file and no model called {name:.200}; {advice}"
