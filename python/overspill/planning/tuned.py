"""What :func:`overspill.tune` found, kept in a file for each model and machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from overspill._core import LLAMA_CPP_COMMIT, Error
from overspill.base.checks import as_integer, as_real, check_choice
from overspill.base.files import cache_folder, read_json, replace_json
from overspill.base.host import logical_cpus, physical_cores
from overspill.base.values import CacheType, Kernels, LoadMode, Switch
from overspill.header.info import ModelInfo
from overspill.machine.devices import devices
from overspill.placement.placement import Placement

__all__ = ["SETTINGS", "kept_file", "load_tuned", "machine", "save_tuned", "tuned_options", "tuned_speed"]

logger = logging.getLogger("overspill")

SETTINGS = (
    *("n_ctx", "n_ubatch", "n_threads", "type_k", "type_v", "flash_attention", "repack", "load_mode"),
    "kernels",
    "offload_min_batch",
)
"""The keywords of :class:`overspill.Model` that are kept, besides the placement."""

_CHOICES = {
    **dict.fromkeys(("type_k", "type_v"), get_args(CacheType)),
    **dict.fromkeys(("flash_attention", "repack"), get_args(Switch)),
    "kernels": get_args(Kernels),
    "load_mode": get_args(LoadMode),
}
_LARGEST = {"n_ctx": 2**31 - 1, "n_ubatch": 65536, "offload_min_batch": 65536}

_FORMAT = 3


def machine() -> str:
    """Return what a result holds for: the devices, RPC servers that were added among them, and this llama.cpp."""
    listed = [f"{device.name}, {device.description}" for device in devices()]
    return "; ".join([*listed, f"{physical_cores()} cores", f"llama.cpp {LLAMA_CPP_COMMIT}"])


def kept_file(info: ModelInfo, folder: str) -> Path:
    """Return the file for what is kept of a model on this machine; it may not exist yet."""
    replaced = f"\n{sorted(info.overrides.items())}" if info.overrides else ""
    key = f"{Placement.cpu(info).fingerprint}\n{machine()}{replaced}"
    return cache_folder() / folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def save_tuned(info: ModelInfo, placement: Placement, settings: Mapping[str, Any], tokens_per_s: float) -> Path:
    """Keep a result in place of an earlier one; return its file.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    file = kept_file(info, "tuned")
    data = {
        "format": _FORMAT,
        "machine": machine(),
        "tokens_per_s": tokens_per_s,
        "settings": {name: settings[name] for name in SETTINGS},
        "placement": placement.to_dict(),
    }
    replace_json(file, data)
    return file


def _checked(name: str, value: Any) -> Any:
    """Return a setting that :class:`overspill.Model` takes, or raise an error."""
    if name in _CHOICES:
        check_choice(name, value, _CHOICES[name])
        return value
    # More threads than processors wait for each other by spinning, for seconds a token.
    most = logical_cpus() if name == "n_threads" else _LARGEST[name]
    return None if value is None and name == "offload_min_batch" else as_integer(name, value, 1, most)


def _read(info: ModelInfo) -> tuple[Placement, dict[str, Any], float] | None:
    file = kept_file(info, "tuned")
    try:
        if not file.exists():
            return None
        data = read_json(file)
        if data["format"] != _FORMAT or data["machine"] != machine():
            return None
        settings = {name: _checked(name, data["settings"][name]) for name in SETTINGS}
        speed = as_real("tokens_per_s", data["tokens_per_s"])
        return Placement.from_dict(data["placement"], info), settings, speed
    except (Error, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is not readable, so it counts as not there: %r", file, error)
        return None


def load_tuned(info: ModelInfo) -> tuple[Placement, dict[str, Any]] | None:
    """Return the placement and the settings that were kept for this model on this machine, or None."""
    found = _read(info)
    return None if found is None else found[:2]


def tuned_speed(info: ModelInfo) -> float:
    """Return the tokens per second that were measured with them, or 0."""
    found = _read(info)
    return 0.0 if found is None else found[2]


def tuned_options(info: ModelInfo) -> dict[str, Any]:
    """Return keywords for :class:`overspill.Model`: the placement as ``offload``, and the settings.

    Raises
    ------
    Error
        Nothing was kept for this model on this machine.
    """
    found = load_tuned(info)
    if found is None:
        raise Error(
            f"nothing is tuned for this model on this machine: run overspill tune {info.files[0]}, "
            "with the same RPC servers if there are any"
        )
    placement, settings = found
    return {"offload": placement, **settings}
