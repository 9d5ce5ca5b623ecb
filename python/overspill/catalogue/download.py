"""Models of the Hugging Face hub: found in its cache, or downloaded by the hub's own client."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from overspill._core import Error
from overspill.base.checks import as_text
from overspill.base.units import format_bytes
from overspill.catalogue.choice import best_fit, free_bytes
from overspill.catalogue.disk import cached_models
from overspill.catalogue.model_files import has_quantisation, models_among, parts_of, quantisation_in

__all__ = ["HubName", "bring"]

_NAME = re.compile(
    r"hf:(?P<repository>[^/@:]+/[^/@:]+)"
    r"(?:/(?P<file>[^@]+\.gguf)|:(?P<quantisation>[^/@:]+))?"
    r"(?:@(?P<revision>.+))?"
)


@dataclass(frozen=True, slots=True)
class HubName:
    """What the name of a model on the hub says."""

    repository: str
    file: str | None
    quantisation: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Return the parts of a name; a ValueError if it is none."""
        name = _NAME.fullmatch(as_text("path", text))
        if name is None or name["repository"].endswith(".gguf"):
            raise ValueError(
                "path: a model on the hub is written hf:OWNER/REPOSITORY, hf:OWNER/REPOSITORY:QUANT or "
                f"hf:OWNER/REPOSITORY/FILE.gguf, not {text:.200}"
            )
        return cls(**name.groupdict())


def bring(wanted: HubName, say: Callable[[str], None], *, use_cache: bool) -> Path:
    """Return the (first) file of a model, after all its files are on the disk.

    Parameters
    ----------
    wanted
        The model.
    say
        Takes one line about the quantisation, where the name has none.
    use_cache
        Whether a model in the cache will do, and the hub is not asked, where the name has no file.

    Raises
    ------
    Error
        The hub does not have the model, does not let you have it, or cannot be reached.
    """
    for cached in cached_models(wanted.repository, wanted.revision) if use_cache else ():
        if wanted.file is not None:
            if wanted.file in cached:
                return cached[wanted.file][0]
        elif of_kind := _of_quantisation(cached, wanted):
            sizes = {name: sum(file.stat().st_size for file in cached[name]) for name in of_kind}
            return cached[_chosen(wanted, sizes, say if len(sizes) > 1 else None)][0]
    if wanted.file is not None:
        return _download(wanted, wanted.file)
    there = _files_on_hub(wanted)
    models = {parts[0]: sum(there[part] for part in parts) for parts in models_among(there)}
    if not models:
        raise Error(f"hf:{wanted.repository} has no GGUF files; try the repository of a conversion to GGUF")
    of_kind = _of_quantisation(models, wanted)
    if not of_kind:
        kinds = sorted({quantisation_in(name) or name for name in models})
        raise Error(f"hf:{wanted.repository} has no {wanted.quantisation}; it has {', '.join(kinds)}")
    return _download(wanted, _chosen(wanted, {name: models[name] for name in of_kind}, say))


def _of_quantisation(names: Mapping[str, object], wanted: HubName) -> list[str]:
    """Return the names of the files to choose from."""
    if wanted.quantisation is None:
        return list(names)
    found = [name for name in names if has_quantisation(name, wanted.quantisation)]
    # A draft model in a folder below may have the same.
    return sorted(found, key=lambda name: (name.count("/"), name))[:1]


def _chosen(wanted: HubName, sizes: Mapping[str, int], say: Callable[[str], None] | None) -> str:
    if wanted.quantisation is not None:
        return next(iter(sizes))
    try:
        name, reason = best_fit(sizes, *free_bytes())
    except Error as error:
        raise Error(f"hf:{wanted.repository}: {error}, as in hf:{wanted.repository}:QUANT") from None
    if say is not None:
        kind = quantisation_in(name) or name
        say(f"hf:{wanted.repository}: taking {kind}, {format_bytes(sizes[name])}: {reason}")
    return name


def _download(wanted: HubName, first: str) -> Path:
    """Download all parts of a model; return the first."""
    files = [_downloaded(wanted, part) for part in parts_of(first)]
    return files[0]


def _downloaded(wanted: HubName, file: str) -> Path:
    hub = _client()
    cached = hub.try_to_load_from_cache(wanted.repository, file, revision=wanted.revision)
    if not isinstance(cached, str):
        # The client would try again for half a minute; this asks once.
        _check_reachable(wanted, file)
    with _explained(wanted, file), _bars_on_terminals():
        return Path(hub.hf_hub_download(wanted.repository, file, revision=wanted.revision))


def _check_reachable(wanted: HubName, file: str) -> None:
    try:
        _model_info(wanted)
    except Exception as error:
        # What else is wrong, the download itself says better.
        if _is_unreachable(error):
            reason = f"cannot be reached, and {file} is not in the cache ({_first_line(error)})"
            raise Error(f"hf:{wanted.repository} {reason}") from None


def _files_on_hub(wanted: HubName) -> dict[str, int]:
    """Return the bytes of each file of a repository, by its name."""
    with _explained(wanted, ""):
        try:
            return _model_info(wanted)
        except Exception as error:
            if not _is_unreachable(error):
                raise
            reason = _first_line(error)
    kind = f" {wanted.quantisation}" if wanted.quantisation else ""
    raise Error(f"hf:{wanted.repository} cannot be reached, and no{kind} model of it is in the cache ({reason})")


def _model_info(wanted: HubName) -> dict[str, int]:
    hub = _client()
    info = hub.HfApi().model_info(
        wanted.repository,
        revision=wanted.revision,
        files_metadata=True,
        timeout=hub.constants.HF_HUB_ETAG_TIMEOUT,
    )
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _is_unreachable(error: Exception) -> bool:
    errors = _client().errors
    if isinstance(error, errors.HfHubHTTPError):
        response = getattr(error, "response", None)
        return response is not None and response.status_code >= 500
    return not isinstance(error, ValueError | errors.EntryNotFoundError)  # a ValueError is about the name


@contextmanager
def _explained(wanted: HubName, file: str) -> Iterator[None]:
    """Turn the client's errors into one line that says what to do."""
    errors = _client().errors
    try:
        yield
    except Error:
        raise
    except errors.GatedRepoError:
        reason = "is gated: accept its terms on the hub, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "does not exist, or is private: check the name, or log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {wanted.revision}"
    except errors.LocalEntryNotFoundError as error:
        reason = f"cannot be reached, and {file} is not in the cache ({_first_line(error)})"
    except errors.EntryNotFoundError:
        reason = f"has no file {file}; {_models_of(wanted)}"
    except errors.HFValidationError as error:
        reason = f"is no name of a repository ({_first_line(error)})"
    except Exception as error:
        # The transport below the hub's client raises errors of its own.
        reason = f"could not be read ({_first_line(error)}); what was downloaded is kept, so try again"
    else:
        return
    raise Error(f"hf:{wanted.repository} {reason}")


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Leave the client its progress bars only where a terminal shows them."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _models_of(wanted: HubName) -> str:
    try:
        files = _model_info(wanted)
    except Exception:
        # The list only helps: the error to report is the one before.
        return "check its name"
    models = [parts[0] for parts in models_among(files)]
    return "it has " + ", ".join(models) if models else "it has no GGUF files"


def _client() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise Error("models on the hub need the package huggingface-hub: pip install 'overspill[hub]'") from None
    return huggingface_hub
