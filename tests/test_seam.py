"""What crosses between Python and the core, by name."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, get_args

import pytest

from overspill import StopReason, _core
from overspill.base.values import CacheType, LoadMode, Switch
from overspill.engine.template import ToolChoice
from overspill.studies.experts.trace import POLICIES


@pytest.mark.parametrize(
    ("choices", "native"),
    [
        (get_args(CacheType), _core.CacheType),
        (get_args(LoadMode), _core.LoadMode),
        (get_args(Switch), _core.Switch),
        (get_args(ToolChoice), _core.ToolChoice),
        ([reason.value for reason in StopReason], _core.StopReason),
        (POLICIES, _core.CachePolicy),
    ],
    ids=["CacheType", "LoadMode", "Switch", "ToolChoice", "StopReason", "CachePolicy"],
)
def test_each_choice_is_one_of_the_core(choices: Sequence[str], native: type[Enum]) -> None:
    """And the core has no other."""
    assert [choice.replace("+", "_").replace("-", "_") for choice in choices] == [member.name for member in native]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(_core.ModelOptions, "n_ctx"), (_core.Placement, "n_gpu_layers"), (_core.GenerationOptions, "max_tokens")],
)
def test_options_have_the_fields_of_the_core_alone(kind: Callable[[], Any], name: str) -> None:
    """What is misspelt is an error, and so is another type."""
    options = kind()
    with pytest.raises(AttributeError, match="n_context"):
        options.n_context = 1
    with pytest.raises(TypeError):
        setattr(options, name, "many")
