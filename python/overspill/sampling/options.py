"""Sampling options: how the next token is chosen from logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from overspill._core import SamplingOptions as NativeSamplingOptions
from overspill.base.checks import as_function, as_instance, as_integer, as_list, as_real, as_text, check_keywords, shown
from overspill.base.text import short_repr

__all__ = ["SAMPLING_KEYWORDS", "SamplingKeywords", "SamplingOptions", "merge"]

# From the names in a GGUF's metadata (general.sampling.*) to ours.
_METADATA_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repeat_penalty",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}


class SamplingKeywords(TypedDict, total=False):
    """The fields of :class:`SamplingOptions` as keyword arguments."""

    temperature: float
    dynamic_temperature_range: float
    dynamic_temperature_exponent: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    repeat_last_n: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_last_n: int
    dry_sequence_breakers: Sequence[str]
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    logit_bias: Mapping[int, float]
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of the steps from a row of logits to a token.

    Names, order and defaults are those of llama.cpp's default chain: logit bias, penalties, DRY, top-n-sigma,
    top-k, typical, top-p, min-p, XTC, temperature, draw. The default of an option switches it off, except for
    ``top_k``, ``top_p``, ``min_p`` and ``temperature``.

    Raises
    ------
    ValueError, TypeError
        An option is out of its range, or of another type.
    """

    temperature: float = 0.8
    """The divisor of the logits after truncation, 0 or more; 0 takes the most likely token that is left."""
    dynamic_temperature_range: float = 0.0
    """How far the entropy of the remaining tokens moves the temperature up and down; 0 is off."""
    dynamic_temperature_exponent: float = 1.0
    """The exponent of the entropy, as a share of the largest possible, before it is mapped to that range."""
    top_k: int = 40
    """The number of most likely tokens to keep, 0 or more; 0 keeps all."""
    top_p: float = 0.95
    """The probability that the fewest tokens to keep have together, 0 to 1; 1 keeps all (Holtzman et al., 2020)."""
    min_p: float = 0.05
    """The least probability to keep, as a share of the largest, 0 to 1; 0 keeps all (Nguyen et al., 2024)."""
    typical_p: float = 1.0
    """The probability of the tokens to keep together, those whose surprise is nearest to the expected one, 0 to 1;
    1 keeps all (Meister et al., 2022)."""
    top_n_sigma: float = 0.0
    """The standard deviations below the largest logit to keep; 0 keeps all (Tang et al., 2024)."""
    xtc_probability: float = 0.0
    """The probability of dropping all tokens over ``xtc_threshold`` but the least likely, 0 to 1; 0 is off."""
    xtc_threshold: float = 0.1
    """The probability over which XTC may drop a token; over 0.5 switches XTC off."""
    repeat_penalty: float = 1.0
    """The divisor of positive logits of the last ``repeat_last_n`` tokens, and factor of others; over 0; 1 is off."""
    frequency_penalty: float = 0.0
    """The value subtracted from those tokens' logits for each occurrence."""
    presence_penalty: float = 0.0
    """The value subtracted from those tokens' logits once."""
    repeat_last_n: int = 64
    """The number of last tokens that the penalties look at; 0 is none, -1 all."""
    dry_multiplier: float = 0.0
    """DRY: ``multiplier * base ** (length - allowed_length)`` is subtracted from the logit of a token that would
    continue a repetition of that length; 0 is off."""
    dry_base: float = 1.75
    """The base of DRY's penalty, 1 or more."""
    dry_allowed_length: int = 2
    """The length of a repetition, in tokens, from which on DRY subtracts its penalty."""
    dry_last_n: int = 64
    """The number of last tokens that DRY looks at; 0 is none, -1 all."""
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts that end a repetition for DRY."""
    mirostat: int = 0
    """2: Mirostat v2 in place of all truncation (Basu et al., 2021); 0 is off."""
    mirostat_tau: float = 5.0
    """The surprise that Mirostat aims at, in bits."""
    mirostat_eta: float = 0.1
    """The learning rate of Mirostat."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """The values added to the logits of tokens, by id; ``-inf`` bans a token."""
    seed: int | None = None
    """0 to 4294967294: the same seed gives the same draws on every machine. None: a new seed each time."""

    def __post_init__(self) -> None:
        """Convert numbers to their types, and check the ranges."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.type == "float":
                object.__setattr__(self, option.name, as_real(option.name, value))
            elif option.type == "int" or (option.name == "seed" and value is not None):
                # The core checks the ranges; only values that its types cannot hold are refused here.
                largest = 2**32 - 2 if option.name == "seed" else 2**31 - 1
                least = 0 if option.name == "seed" else -(2**31)
                object.__setattr__(self, option.name, as_integer(option.name, value, least, largest))
        try:
            breakers = as_list("dry_sequence_breakers", self.dry_sequence_breakers, "strings")
        except TypeError:
            raise TypeError(f"dry_sequence_breakers must be strings, not {shown(self.dry_sequence_breakers)}") from None
        object.__setattr__(
            self, "dry_sequence_breakers", tuple(as_text("dry_sequence_breakers", text) for text in breakers)
        )
        if not all(self.dry_sequence_breakers):
            raise ValueError("dry_sequence_breakers must not contain an empty string")
        given: object = self.logit_bias
        if not isinstance(given, Mapping):
            raise TypeError(f"logit_bias must be a mapping from token ids to numbers, not {shown(given)}")
        bias = {
            as_integer("logit_bias", token, 0, 2**31 - 1): as_real("logit_bias", value)
            for token, value in given.items()
        }
        object.__setattr__(self, "logit_bias", bias)
        self._native()

    @classmethod
    def from_metadata(cls, value_of: Callable[[str], Any]) -> SamplingOptions:
        """Return the options that a GGUF's metadata (``general.sampling.*``) recommends, with defaults for others.

        ``value_of`` returns the value of a key, or None or an empty string. Recommendations that are out of
        range are left out.
        """
        as_function("value_of", value_of)
        options = cls()
        for name, option in _METADATA_NAMES.items():
            value = value_of(f"general.sampling.{name}")
            try:
                if value not in (None, ""):
                    options = replace(options, **{option: type(getattr(options, option))(value)})
            except (TypeError, ValueError, OverflowError):
                continue
        return options

    def _native(self, breakers: Sequence[Sequence[int]] = ()) -> NativeSamplingOptions:
        """Return the options as the core takes them: it checks the ranges, and knows DRY's breakers as tokens."""
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        del options["dry_sequence_breakers"]
        return NativeSamplingOptions(**{**options, "logit_bias": [*self.logit_bias.items()], "dry_breakers": breakers})

    def __hash__(self) -> int:
        """Return a hash of all options."""
        values = (getattr(self, option.name) for option in fields(self))
        return hash(tuple(frozenset(value.items()) if isinstance(value, Mapping) else value for value in values))

    def __str__(self) -> str:
        """Return the options that are on, such as ``temperature 0.8 · top_k 40``."""
        plain = {"temperature": None, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        changed = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if getattr(self, option.name) != plain.get(option.name, getattr(_DEFAULTS, option.name))
        }
        return " · ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in changed.items()
        )

    def __repr__(self) -> str:
        """Return the options that differ from the defaults, in brackets."""
        given = ((option.name, getattr(self, option.name)) for option in fields(self))
        changed = [f"{name}={shown(value)}" for name, value in given if value != getattr(_DEFAULTS, name)]
        return short_repr(self, ", ".join(changed) or "the defaults")


def merge(options: SamplingOptions, keywords: Mapping[str, Any]) -> SamplingOptions:
    """Return ``options`` with ``keywords`` in their place; an unknown option is a TypeError."""
    check_keywords(keywords, SAMPLING_KEYWORDS)
    as_instance("sampling", options, SamplingOptions)
    return replace(options, **keywords) if keywords else options


SAMPLING_KEYWORDS = frozenset(option.name for option in fields(SamplingOptions))
_DEFAULTS = SamplingOptions()
