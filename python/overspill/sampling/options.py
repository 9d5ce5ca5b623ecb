"""The options that say how the next token is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypedDict

from overspill import _core
from overspill.base.checks import as_integer, as_real

__all__ = ["SamplingKeywords", "SamplingOptions", "merge"]

# How the GGUF's own metadata (general.sampling.*) names the options.
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
    """The options of :class:`SamplingOptions` as keyword arguments."""

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
    """What to make of a row of logits, in the order in which it is done.

    Names, order and defaults are those of llama.cpp's default chain: logit bias, penalties, DRY, top-n-sigma,
    top-k, typical, top-p, min-p, XTC, temperature, draw. Each option's default switches it off, except for
    ``top_k``, ``top_p``, ``min_p`` and ``temperature``.

    Raises
    ------
    ValueError, TypeError
        An option is out of its range, or of another type.
    """

    temperature: float = 0.8
    """Divides the logits after truncation, 0 or more; 0 always takes the most likely token that is left."""
    dynamic_temperature_range: float = 0.0
    """The temperature moves up and down by so much with the entropy of what is left; 0 is off."""
    dynamic_temperature_exponent: float = 1.0
    """How the entropy, as a share of the largest possible, maps to that range."""
    top_k: int = 40
    """Keep so many of the most likely tokens, 0 or more; 0 keeps all."""
    top_p: float = 0.95
    """Keep the fewest tokens with this much probability together, 0 to 1; 1 keeps all (Holtzman et al., 2020)."""
    min_p: float = 0.05
    """Drop tokens less likely than this share of the most likely one, 0 to 1; 0 keeps all (Nguyen et al., 2024)."""
    typical_p: float = 1.0
    """Keep tokens whose surprise is nearest to the expected one, with this much probability together, 0 to 1;
    1 keeps all (Meister et al., 2022)."""
    top_n_sigma: float = 0.0
    """Keep tokens within so many standard deviations of the logits below the largest; 0 is all (Tang et al., 2024)."""
    xtc_probability: float = 0.0
    """How often to drop all but the least likely of the tokens over ``xtc_threshold``, 0 to 1; 0 is never."""
    xtc_threshold: float = 0.1
    """The probability over which a token is a top choice for XTC; over 0.5 switches it off."""
    repeat_penalty: float = 1.0
    """Logits over 0 of the last ``repeat_last_n`` tokens are divided by this, others multiplied; over 0, 1 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from their logits for each time that they occur."""
    presence_penalty: float = 0.0
    """Subtracted from their logits once."""
    repeat_last_n: int = 64
    """How many tokens back the penalties look; 0 is not at all, -1 everything."""
    dry_multiplier: float = 0.0
    """DRY: ``multiplier * base ** (length - allowed_length)`` is subtracted from the logit of a token that would
    continue a repetition of that length; 0 is off."""
    dry_base: float = 1.75
    """1 or more."""
    dry_allowed_length: int = 2
    """Repetitions of so many tokens are let be."""
    dry_last_n: int = 64
    """How many tokens back DRY looks; 0 is not at all, -1 everything."""
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts over which DRY sees no repetition."""
    mirostat: int = 0
    """2 puts Mirostat v2 in place of all truncation (Basu et al., 2021); 0 is off."""
    mirostat_tau: float = 5.0
    """The surprise that Mirostat aims at, in bits."""
    mirostat_eta: float = 0.1
    """How fast Mirostat learns."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """What is added to the logits of tokens; ``-inf`` bans one."""
    seed: int | None = None
    """0 to 4294967294: the same seed gives the same draws, on every machine. None: other ones each time."""

    def __post_init__(self) -> None:
        """Convert numbers to their types, and check the ranges."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.type == "float":
                object.__setattr__(self, option.name, as_real(option.name, value))
            elif option.type == "int" or (option.name == "seed" and value is not None):
                # The core knows the ranges; only what it could not hold is refused here.
                largest = 2**32 - 2 if option.name == "seed" else 2**31 - 1
                least = 0 if option.name == "seed" else -(2**31)
                object.__setattr__(self, option.name, as_integer(option.name, value, least, largest))
        breakers: object = self.dry_sequence_breakers
        if isinstance(breakers, str) or not all(isinstance(text, str) for text in self.dry_sequence_breakers):
            raise TypeError(f"dry_sequence_breakers must be strings, not {self.dry_sequence_breakers!r}")
        object.__setattr__(self, "dry_sequence_breakers", tuple(self.dry_sequence_breakers))
        if not all(self.dry_sequence_breakers):
            raise ValueError("dry_sequence_breakers must not contain an empty string")
        bias = {
            as_integer("logit_bias", token, 0, 2**31 - 1): as_real("logit_bias", value)
            for token, value in self.logit_bias.items()
        }
        object.__setattr__(self, "logit_bias", bias)
        _core.check_sampling(self._native())

    @classmethod
    def from_metadata(cls, value_of: Callable[[str], Any]) -> SamplingOptions:
        """Return the defaults, with what a GGUF's metadata (``general.sampling.*``) recommends in their place.

        ``value_of`` gives the value of a key, or None or an empty string. Recommendations that are out of
        range are left out.
        """
        options = cls()
        for name, option in _METADATA_NAMES.items():
            value = value_of(f"general.sampling.{name}")
            try:
                if value not in (None, ""):
                    options = replace(options, **{option: type(getattr(options, option))(value)})
            except (TypeError, ValueError):
                continue
        return options

    def _native(self, breakers: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        """Return the options as the core takes them, which knows tokens and not texts."""
        options = asdict(self)
        del options["dry_sequence_breakers"]
        return {**options, "logit_bias": list(self.logit_bias.items()), "dry_breakers": breakers}

    def __hash__(self) -> int:
        """Return a hash of all options."""
        values = (getattr(self, option.name) for option in fields(self))
        return hash(tuple(frozenset(value.items()) if isinstance(value, Mapping) else value for value in values))

    def __str__(self) -> str:
        """Return what differs from the plainest sampling, such as ``temperature 0.8 · top_k 40``."""
        plain = {"temperature": None, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        changed = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if getattr(self, option.name) != plain.get(option.name, getattr(_DEFAULTS, option.name))
        }
        return " · ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in changed.items()
        )


def merge(options: SamplingOptions, keywords: Mapping[str, Any]) -> SamplingOptions:
    """Return ``options`` with ``keywords`` in their place; a TypeError for one that does not exist."""
    known = {option.name for option in fields(SamplingOptions)}
    for name in keywords:
        if name not in known:
            raise TypeError(f"there is no sampling option {name!r}; there are {', '.join(sorted(known))}")
    return replace(options, **keywords) if keywords else options


_DEFAULTS = SamplingOptions()
