"""What a cache of experts held when its model was closed, and whether it was worth having, by model and machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from overspill._core import Error
from overspill.base.checks import as_flag, as_integer
from overspill.base.files import read_json, replace_json
from overspill.header.info import ModelInfo
from overspill.planning.tuned import kept_file, machine

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


def load_expert_profile(info: ModelInfo) -> ExpertProfile:
    """Return what is remembered for this model on this machine, which may be nothing."""
    file = kept_file(info, "experts")
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
        replace_json(kept_file(info, "experts"), data)
    except OSError as error:
        logger.info("the profile of experts could not be kept: %s", error)
