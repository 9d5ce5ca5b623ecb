"""What a cache of experts held when its model was closed, and whether it was worth having, by model and machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overspill._core import Error
from overspill.base.checks import as_flag, as_integer
from overspill.base.files import cache_folder, read_json, replace_json
from overspill.header.info import ModelInfo
from overspill.placement.placement import Placement
from overspill.planning.tuned import machine

__all__ = ["ExpertProfile", "keep_expert_profile", "load_expert_profile"]

logger = logging.getLogger("overspill")

_FORMAT = 1


@dataclass(frozen=True)
class ExpertProfile:
    """What is remembered of a cache of experts."""

    experts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """The experts that were resident, by layer; those that had been used last come last."""
    is_faster: bool | None = None
    """Whether decoding was measured to be faster with the cache than without; None: not yet."""


def _file(info: ModelInfo) -> Path:
    key = f"{Placement.cpu(info).fingerprint}\n{machine()}"
    return cache_folder() / "experts" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def load_expert_profile(info: ModelInfo) -> ExpertProfile:
    """Return what is remembered for this model on this machine, which may be nothing."""
    file = _file(info)
    try:
        if not file.exists():
            return ExpertProfile()
        data = read_json(file)
        if data["format"] != _FORMAT or data["machine"] != machine():
            return ExpertProfile()
        experts = {
            as_integer("layer", int(layer), 0, info.n_layers - 1): [
                as_integer("expert", one, 0, max(0, info.n_experts - 1)) for one in listed
            ]
            for layer, listed in data["experts"].items()
        }
        is_faster = data["is_faster"]
        return ExpertProfile(experts, None if is_faster is None else as_flag("is_faster", is_faster))
    except (Error, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is not readable, so it counts as not there: %r", file, error)
        return ExpertProfile()


def keep_expert_profile(info: ModelInfo, profile: ExpertProfile) -> None:
    """Remember a profile. What it does not say stays as it was; what cannot be written is only logged."""
    before = load_expert_profile(info)
    is_faster = before.is_faster if profile.is_faster is None else profile.is_faster
    experts = {str(layer): list(listed) for layer, listed in (profile.experts or before.experts).items()}
    data = {"format": _FORMAT, "machine": machine(), "is_faster": is_faster, "experts": experts}
    try:
        replace_json(_file(info), data)
    except OSError as error:
        logger.info("the profile of experts could not be kept: %s", error)
