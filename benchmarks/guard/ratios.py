"""Ratios that a change must not make worse. Both sides take turns in one run: what slows the machine, slows both.

``limits.toml`` has the limits. A ratio that is over its limit is measured twice more, and the best counts: noise
passes, a slow-down stays.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from overspill.base.tables import plain_table
from quantities import sampler
from quantities.batch import sixteen_prompts
from quantities.first_token import first_token, second_turn
from quantities.load import loading, planning
from quantities.logits import logits_to_text, view
from quantities.measuring import Models, Quantity, in_own_process, measure
from quantities.stream import GREEDY, token, token_beside_experts_on_the_cpu

LIMITS: dict[str, dict[str, float]] = tomllib.loads((Path(__file__).parent / "limits.toml").read_text())


@dataclass(frozen=True)
class Bench:
    """What ratios are measured with."""

    models: Models
    tools: Path
    slower: Mapping[str, Any] = field(default_factory=dict)
    """Options of :meth:`Model.stream` that make it slower: the guard's own test."""


def _token(bench: Bench, path: Path, *, n_tokens: int, rounds: int, loads: int) -> float:
    quantity = partial(token, path, bench.tools, n_tokens=n_tokens, sampling={**GREEDY, **bench.slower})
    return measure(quantity, rounds=rounds, loads=loads).median.ratio


def _token_beside_experts_on_the_cpu(bench: Bench) -> float:
    quantity = partial(token_beside_experts_on_the_cpu, bench.models.tiny_gpt_oss, bench.tools, n_tokens=128)
    return measure(quantity, rounds=4, loads=2).median.ratio


def _logits_to_text(bench: Bench) -> float:
    found = measure(partial(logits_to_text, bench.models.gemma, bench.slower), rounds=8, warm_up=False)
    # What else runs makes some of the draws longer, and none shorter.
    return found.best.ours / float(np.quantile([timed.seconds for timed in found.rival], 0.25))


def _best(quantity: Quantity, rounds: int, *, warm_up: bool = True) -> float:
    return measure(quantity, rounds=rounds, warm_up=warm_up).best.ratio


def _draw(rival: sampler.Rival, **sampling: Any) -> float:
    quantity = partial(sampler.draw, {**sampler.PLAIN, **sampling}, sampler.normal_logits(), rival)
    return measure(quantity, rounds=5, warm_up=False).median.ratio


_CHAIN = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}
RATIOS: dict[str, Callable[[Bench], float]] = {
    "stream / minimal loop, tiny gpt-oss": lambda bench: _token(
        bench, bench.models.tiny_gpt_oss, n_tokens=256, rounds=4, loads=3
    ),
    "stream / minimal loop, Gemma": lambda bench: _token(bench, bench.models.gemma, n_tokens=48, rounds=3, loads=2),
    "logits to text / a greedy draw, Gemma": _logits_to_text,
    "first token / minimal loop, Gemma": lambda bench: _best(
        partial(first_token, bench.models.gemma, bench.tools, n_prompt=256), 6
    ),
    "second turn / first, Gemma": lambda bench: _best(
        partial(second_turn, bench.models.gemma, n_first=400, n_new=8), 4, warm_up=False
    ),
    "16 prompts together / one by one, Gemma": lambda bench: _best(
        partial(sixteen_prompts, bench.models.gemma, n_alone=4), 3, warm_up=False
    ),
    "view / copy of logits, Gemma": lambda bench: measure(partial(view, bench.models.gemma), rounds=1).median.ratio,
    "greedy / one scan": lambda bench: _draw(sampler.scan, temperature=0.0),
    "top-k 40, top-p, min-p / one scan": lambda bench: _draw(sampler.scan, **_CHAIN),
    "temperature / one scan": lambda bench: _draw(sampler.scan),
    "top-p 0.95 / one scan": lambda bench: _draw(sampler.scan, top_p=0.95),
    "top-k 40, top-p, min-p / llama.cpp's": lambda bench: _draw(sampler.llama_cpp_chain(bench.tools), **_CHAIN),
    "temperature / llama.cpp's": lambda bench: _draw(sampler.llama_cpp_chain(bench.tools)),
    "top-p 0.95 / llama.cpp's": lambda bench: _draw(sampler.llama_cpp_chain(bench.tools), top_p=0.95),
    "loading / minimal loop, Gemma": lambda bench: _best(partial(loading, bench.models.gemma, bench.tools), 4),
    "plan / llama.cpp's fit, gpt-oss-120b": lambda bench: _best(
        partial(planning, bench.models.gpt_oss_120b_header, bench.tools, vram_gib=24), 1, warm_up=False
    ),
    "stream / minimal loop, experts on the CPU": lambda bench: in_own_process(_token_beside_experts_on_the_cpu, bench),
}
assert RATIOS.keys() == LIMITS.keys(), RATIOS.keys() ^ LIMITS.keys()


@dataclass
class Guarded:
    """A ratio that was measured."""

    name: str
    value: float
    attempts: list[float]

    @property
    def most(self) -> float:
        """Its limit."""
        return LIMITS[self.name]["most"]

    @property
    def is_over(self) -> bool:
        """Whether it is over its limit."""
        return self.value > self.most


def measure_ratios(bench: Bench, names: Sequence[str] | None = None, *, attempts: int = 3) -> Iterator[Guarded]:
    """Yield ratios as they are measured; one that is over its limit is measured again."""
    for name in names or RATIOS:
        values: list[float] = []
        while len(values) < attempts and (not values or min(values) > LIMITS[name]["most"]):
            values.append(RATIOS[name](bench))
        yield Guarded(name, min(values), values)


def as_table(found: Sequence[Guarded]) -> Table:
    """Return what was measured against what is allowed."""
    shown = plain_table("ratio", "measured", "usual", "at most", "")
    for one in found:
        usual = LIMITS[one.name]["usual"]
        verdict = f"SLOWER by {one.value / usual - 1:.0%}, in {len(one.attempts)} attempts" if one.is_over else "ok"
        style = "bold red" if one.is_over else None
        shown.add_row(one.name, f"{one.value:.4g}", f"{usual:.4g}", f"{one.most:.4g}", verdict, style=style)
    return shown
