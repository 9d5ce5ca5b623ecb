"""Sampling options: values, ranges, defaults, and the recommendations of a file."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, get_type_hints

import pytest

from overspill import Sampler, SamplingOptions, _core
from overspill.sampling.options import SamplingKeywords


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be 0 or more"),
        ({"dynamic_temperature_range": math.inf}, ValueError, "dynamic_temperature_range must be 0 or more"),
        ({"dynamic_temperature_exponent": math.nan}, ValueError, "dynamic_temperature_exponent must be finite"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_k": 2**40}, ValueError, "top_k must be"),
        ({"typical_p": 1.1}, ValueError, "typical_p must be 0 to 1"),
        ({"top_n_sigma": -1}, ValueError, "top_n_sigma must be 0 or more"),
        ({"xtc_probability": 2}, ValueError, "xtc_probability must be 0 to 1"),
        ({"xtc_threshold": -1}, ValueError, "xtc_threshold must be 0 to 1"),
        ({"dry_multiplier": -1}, ValueError, "dry_multiplier must be 0 or more"),
        ({"dry_base": 0.5}, ValueError, "dry_base must be 1 or more"),
        ({"dry_allowed_length": -1}, ValueError, "dry_allowed_length must be at least 0"),
        ({"dry_last_n": -2}, ValueError, "dry_last_n must be at least -1"),
        ({"dry_sequence_breakers": "ab"}, TypeError, "dry_sequence_breakers must be strings"),
        ({"dry_sequence_breakers": [""]}, ValueError, "must not contain an empty string"),
        ({"dry_multiplier": 1}, ValueError, "need a model"),
        ({"mirostat": 1}, ValueError, "mirostat must be 0 or 2"),
        ({"mirostat_tau": -1}, ValueError, "mirostat_tau must be 0 or more"),
        ({"mirostat_eta": math.nan}, ValueError, "mirostat_eta must be 0 or more"),
        ({"logit_bias": {-1: 1.0}}, ValueError, "logit_bias must be at least 0"),
        ({"logit_bias": {1: math.nan}}, ValueError, "logit_bias: a value must be finite or -inf"),
        ({"logit_bias": {1: math.inf}}, ValueError, "logit_bias: a value must be finite or -inf"),
        ({"seed": 2**32 - 1}, ValueError, "seed must be 0 to 4294967294"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"warmth": 1}, TypeError, "no option 'warmth'"),
    ],
    ids=str,
)
def test_bad_options(keywords: dict[str, Any], error: type[Exception], text: str) -> None:
    """Each is refused with its name and its range."""
    with pytest.raises(error, match=text):
        Sampler(**keywords)


def test_options_are_values() -> None:
    """Frozen, comparable, hashable, and spelled out alike for type checkers."""
    options = SamplingOptions(temperature=1, logit_bias={3: 1})
    assert options == SamplingOptions(temperature=1.0, logit_bias={3: 1.0})
    assert hash(options) == hash(replace(options))
    assert str(options) == "temperature 1 · top_k 40 · top_p 0.95 · min_p 0.05 · logit_bias {3: 1.0}"
    with pytest.raises(FrozenInstanceError):
        options.temperature = 2  # type: ignore[misc]
    assert list(get_type_hints(SamplingKeywords)) == [field.name for field in fields(SamplingOptions)]


def test_one_set_of_defaults() -> None:
    """What the core takes for an option that is not given is what Python says."""
    assert SamplingOptions()._native() == _core.SamplingOptions()
    assert SamplingOptions(top_k=41)._native() != _core.SamplingOptions()


def test_one_set_of_names() -> None:
    """An option that only Python or only the core has is an error."""
    known = {option.name: getattr(SamplingOptions(), option.name) for option in fields(SamplingOptions)}
    del known["dry_sequence_breakers"]
    known |= {"logit_bias": [], "dry_breakers": []}
    assert _core.SamplingOptions(**known) == _core.SamplingOptions()
    with pytest.raises(TypeError, match="there is no sampling option 'warmth'"):
        _core.SamplingOptions(**known, warmth=1)
    del known["min_p"]
    with pytest.raises(TypeError, match="the sampling option min_p is not given"):
        _core.SamplingOptions(**known)


def test_recommendations_of_a_file() -> None:
    """Keys of the GGUF's metadata become options; nonsense is passed over."""
    metadata = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 64,
        "general.sampling.penalty_repeat": -3.0,
        "general.sampling.min_p": "none",
    }
    assert SamplingOptions.from_metadata(metadata.get) == SamplingOptions(temperature=0.6, top_k=64)
