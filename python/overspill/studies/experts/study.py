"""Replays of a trace for several sizes of the cache: as tables, as a picture and as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from overspill.base import html
from overspill.base.checks import as_instance, as_list, as_path, check_choice, naming
from overspill.base.tables import plain_table
from overspill.base.text import short_repr
from overspill.base.units import format_bytes, format_count
from overspill.planning.expert_cache import ExpertCachePlan
from overspill.studies.bench.plot import check_plotting
from overspill.studies.experts.plot import draw_experts
from overspill.studies.experts.trace import POLICIES, ExpertReplay, ExpertTrace, Policy, TracedTokens

__all__ = ["COMPARED_POLICIES", "RESIDENT_SHARES", "ExpertStudy", "replay_experts"]

RESIDENT_SHARES = tuple(share / 100 for share in range(5, 65, 5))
COMPARED_POLICIES: tuple[Policy, ...] = ("lru", "second-touch", "lfu", "fixed", "belady")


@dataclass(frozen=True, eq=False)
class ExpertStudy:
    """What caches of experts would have made of a trace; :func:`replay_experts` returns it."""

    trace: ExpertTrace
    tokens: TracedTokens
    """The tokens that were replayed."""
    replays: tuple[ExpertReplay, ...]
    """By the experts that are resident, then by policy."""
    cache: ExpertCachePlan | None = None
    """What to expect of such caches on some hardware."""

    def tokens_per_s(self, replay: ExpertReplay) -> float | None:
        """Return the rate of decoding that is expected of a replay's hits; None without :attr:`cache`."""
        as_instance("replay", replay, ExpertReplay)
        if self.cache is None:
            return None
        return self.cache.tokens_per_s(replay.hit_share, self._insertions(replay))

    def _insertions(self, replay: ExpertReplay) -> float:
        """Return the insertions of a token, if it uses as many experts as the model of the forecast."""
        used = self.trace.n_used if self.cache is None else self.cache.planned.info.n_experts_used
        return replay.insertions_per_token * used / self.trace.n_used

    def to_dict(self) -> dict[str, Any]:
        """Return counts, replays and forecasts as JSON can hold them; no text and no order of tokens is in it."""
        trace, tokens = self.trace, self.tokens
        repeated = trace.repeated_share(tokens)
        return {
            "format": "overspill experts 1",
            "model": trace.model,
            "n_experts": trace.n_experts,
            "n_used": trace.n_used,
            "layers": list(trace.layers),
            "requests": len(trace.requests),
            "tokens": {"prompt": len(trace.routes("prompt")), "decoded": len(trace.routes("decoded"))},
            "replayed": tokens,
            "repeated_share": None if math.isnan(repeated) else repeated,
            "counts": trace.counts(tokens).tolist(),
            "reuse_distances": trace.reuse_distances(tokens).tolist(),
            "replays": [
                {
                    "policy": one.policy,
                    "resident": one.resident,
                    "resident_share": one.resident_share,
                    "tokens": one.tokens,
                    "requests": one.requests,
                    "hits": one.hits,
                    "hit_share": one.hit_share,
                    "hits_by_layer": list(one.hits_by_layer),
                    "insertions_per_token": one.insertions_per_token,
                    "tokens_per_s": self.tokens_per_s(one),
                }
                for one in self.replays
            ],
            "hardware": None if self.cache is None else self.cache.planned.hardware.to_dict(),
        }

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw how often each layer used each expert, and the hits of the caches, into a PNG, SVG or PDF file.

        Raises
        ------
        Error
            matplotlib is not installed.
        ValueError
            The file's ending is none of matplotlib's formats.
        """
        file, trace = as_path("file", file), self.trace
        with naming("file"):
            check_plotting(file)
        n_tokens = len(trace.routes(self.tokens))
        title = f"{trace.model}: {trace.n_used} of {trace.n_experts} experts in each of {len(trace.layers)} layers"
        curves: dict[str, list[tuple[float, float]]] = {}
        for one in self.replays:
            curves.setdefault(one.policy, []).append((one.resident_share, one.hit_share))
        used = trace.counts(self.tokens) / max(1, n_tokens)
        draw_experts(file, f"{title}, {format_count(n_tokens, 'token')}", trace.layers, used, curves)

    def __rich__(self) -> Group:
        """Return tables for a terminal."""
        parts: list[Any] = [*self._heading(), "", self._table("hits", lambda one: f"{one.hit_share:.3f}")]
        if self.cache is not None:
            parts += ["", self._table("tokens/s", lambda one: f"{self.tokens_per_s(one):.1f}")]
        parts += ["", self._table("copied a token", self._copied), "", self._reuse(), "", *self._notes()]
        return Group(*parts)

    def _repr_html_(self) -> str:
        """Return the tables for a notebook."""
        return html.from_rich(self.__rich__().renderables)

    def __repr__(self) -> str:
        """Return the number of replays and the trace in brackets."""
        replays, policies = format_count(len(self.replays), "replay"), {one.policy: None for one in self.replays}
        return short_repr(self, f"of {replays}, {', '.join(policies)}: {self.trace!r}")

    def _copied(self, replay: ExpertReplay) -> str:
        n = self._insertions(replay)
        return f"{n:.1f}" if self.cache is None else format_bytes(round(n * self.cache.expert_bytes), digits=1)

    def _heading(self) -> list[Text]:
        trace = self.trace
        n_prompt, n_decoded = (len(trace.routes(part)) for part in ("prompt", "decoded"))
        counts = trace.counts(self.tokens)
        used = (counts > 0).sum(axis=1)
        repeated = trace.repeated_share(self.tokens)
        lines = [
            Text(f"{trace.model}: {trace.n_used} of {trace.n_experts} experts in {len(trace.layers)} layers", "bold"),
            Text(
                f"{format_count(len(trace.requests), 'request')}: {format_count(n_prompt, 'token')} of prompts, "
                f"{n_decoded} decoded; replayed: {self.tokens}"
            ),
            Text(f"a layer used {used.mean():.1f} of its experts, from {used.min()} to {used.max()}"),
        ]
        if not math.isnan(repeated):
            lines.append(Text(f"{repeated:.0%} of a token's experts were the previous token's"))
        return lines

    def _table(self, what: str, cell: Any) -> Table:
        policies = list(dict.fromkeys(one.policy for one in self.replays))
        memory = ["memory"] if self.cache is not None else []
        table = plain_table(what, "experts", *memory, *policies)
        by_resident: dict[int, list[ExpertReplay]] = {}
        for one in self.replays:
            by_resident.setdefault(one.resident, []).append(one)
        for resident, row in by_resident.items():
            share = resident / self.trace.n_experts
            size = []
            if self.cache is not None:
                n_bytes = self.cache.resident_bytes(share)
                size = [f"{format_bytes(n_bytes, digits=1)} {'*' if n_bytes > self.cache.room_bytes else ' '}"]
            table.add_row(f"{share:.1%} resident", str(resident), *size, *map(cell, row))
        return table

    def _reuse(self) -> Table:
        """Return the requests by the number of other experts that their layer used since their expert's last use."""
        distances = self.trace.reuse_distances(self.tokens)
        table = plain_table("reuse distance", "requests", "share", "")
        n_all = max(1, int(distances.sum()))
        edges = [0]
        while edges[-1] < self.trace.n_experts:
            edges.append(min(self.trace.n_experts, max(edges[-1] * 2, self.trace.n_used)))
        ranges = [(f"{low} to {high - 1}", distances[low:high].sum()) for low, high in pairwise(edges)]
        for name, n in [*ranges, ("first use", distances[-1])]:
            table.add_row(name, str(int(n)), f"{n / n_all:.1%}", "█" * round(30 * float(n) / n_all))
        return table

    def _notes(self) -> list[Text]:
        notes = [
            "hits: the share of requests whose expert is resident. copied a token: misses that enter the cache"
            + (", of all layers." if self.cache is None else ", of all layers, in bytes.")
        ]
        if any(one.policy == "fixed" for one in self.replays):
            notes.append("fixed is chosen by the first half of the tokens, and replayed over the second.")
        if self.cache is not None:
            notes += self._forecast_notes(self.cache)
        return [Text(note) for note in notes]

    def _forecast_notes(self, cache: ExpertCachePlan) -> list[str]:
        planned = cache.planned
        gpu, used = planned.hardware.gpus[0], planned.info.n_experts_used
        kind = {"measured": "this machine", "given": "the given hardware"}.get(
            planned.hardware.source, "hardware of which some figures are assumed"
        )
        notes = [
            f"tokens/s: forecast for {kind} ({gpu.name}, {format_bytes(gpu.memory_bytes, digits=1)}), "
            f"{cache.tokens_per_s(0):.1f} without a cache. What else is on the GPU leaves "
            f"{format_bytes(cache.room_bytes, digits=1)}; * needs more."
        ]
        if used != self.trace.n_used:
            notes.append(
                f"The trace has {self.trace.n_used} experts of a token, and the model uses {used}: "
                "the forecast takes the hits of the trace for all of them."
            )
        return notes


def replay_experts(
    trace: ExpertTrace,
    *,
    resident: Sequence[float] = RESIDENT_SHARES,
    policies: Sequence[Policy] = COMPARED_POLICIES,
    tokens: TracedTokens = "decoded",
    cache: ExpertCachePlan | None = None,
) -> ExpertStudy:
    """Return what caches of several sizes and policies would have made of a trace.

    Parameters
    ----------
    trace
        Of :func:`trace_experts`, or of a file.
    resident
        Shares of each layer's experts, over 0 and at most 1; of those that come to as many experts, one is replayed.
    policies
        See :data:`Policy`.
    tokens
        Which tokens of the trace are replayed.
    cache
        What to expect of caches on some hardware, for tokens per second; of :func:`plan_expert_cache`.

    Raises
    ------
    ValueError
        A share or a policy is out of its range, or the trace has no such tokens.
    """
    as_instance("trace", trace, ExpertTrace)
    if cache is not None:
        info = as_instance("cache", cache, ExpertCachePlan).planned.info
        shape, wanted = (len(trace.layers), trace.n_experts), (len(info.expert_layers), info.n_experts)
        if shape != wanted:
            raise ValueError(
                f"cache is for another model: the trace has {shape[0]} layers of {shape[1]} experts, "
                f"{info.name or info.architecture} {wanted[0]} of {wanted[1]}"
            )
    shares, chosen = as_list("resident", resident, "numbers"), as_list("policies", policies, "strings")
    if not shares or not chosen:
        raise ValueError("resident and policies must have at least one item each")
    for policy in chosen:
        check_choice("policies", policy, POLICIES)
    if not len(trace.routes(tokens)):
        other = "decoded" if tokens == "prompt" else "prompt"
        raise ValueError(f'tokens: the trace has none that are {tokens}; "{other}" or "all" replays the others')
    by_size: dict[int, list[ExpertReplay]] = {}
    for share in shares:
        row = [trace.replay(policy, share, tokens) for policy in dict.fromkeys(chosen)]
        by_size.setdefault(row[0].resident, row)
    return ExpertStudy(trace, tokens, tuple(one for row in by_size.values() for one in row), cache)
