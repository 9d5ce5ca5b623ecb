"""What reading a prompt costs: weights that are copied or read, arithmetic, and attention to what came before.

A prompt is read in batches. For each batch, a GPU either takes over what has weights in RAM, for which it copies them,
or leaves that to the CPU.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import TypeAlias

from overspill.header.kv_cache import padded_context
from overspill.planning.graph.nodes import Node
from overspill.planning.graph.schedule import OFFLOAD_TOKENS
from overspill.planning.layer_kinds import LayerKind
from overspill.planning.settings import prompt_length
from overspill.planning.workload import PAGE_FAULT_BYTES_PER_S, Arrangement, Use, Workload

__all__ = ["NEVER_TAKEN_OVER", "PromptUse", "Prompts"]

_Terms: TypeAlias = dict[tuple[int, str], float]
_THRESHOLDS = (2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
NEVER_TAKEN_OVER = 65536
"""An ``offload_min_batch`` that no batch reaches."""


@dataclass(frozen=True, slots=True)
class PromptUse:
    """The seconds of a prompt, and what they are spent on."""

    seconds: float
    terms: _Terms
    """By device and part: ``"copies"`` of weights, ``"arithmetic"``, ``"attention"``, ``"operations"``, ``"hops"``,
    ``"page faults"``."""
    longest_piece_s: float
    """Of a GPU's work that cannot be interrupted."""


@dataclass(frozen=True, slots=True)
class _LayerCost:
    """One layer of one batch."""

    terms: tuple[tuple[tuple[int, str], float], ...]
    once: tuple[tuple[tuple[int, str], float], ...]
    """Of all batches of this size together: attention, and in the last batch the token whose logits are wanted."""
    each_s: float
    """Of one batch, without attention."""
    all_s: float
    """Of all batches of this size."""
    pieces: tuple[tuple[int, float, bool], ...]
    """Device, seconds of the longest, and whether weights are copied for it."""
    read_bytes: int
    """Of weights in RAM, read or copied."""
    mask: tuple[int, int | None] | None
    """The GPU that attends, and its window: it gets a mask, which layers alike share."""


class Prompts:
    """The prompts of one workload."""

    def __init__(self, work: Workload) -> None:
        """Prepare."""
        self.work, self.settings = work, work.settings
        self._costs: dict[tuple[object, ...], _LayerCost] = {}
        self._batches = _batches(prompt_length(self.settings), self.settings.n_ubatch)
        self._sizes = Counter(n for _, n in self._batches)
        self._masks_bytes: dict[int, dict[tuple[int, int | None], int]] = {}

    def seconds(self, arranged: Arrangement, use: Use) -> float:
        """Return the seconds of the prompt of the settings; ``use`` is what a token does."""
        total = 0.0
        read_bytes = 0
        for n, count in self._sizes.items():
            costs, hops = self._batch(arranged, n)
            total += sum([cost.all_s for cost in costs]) + count * sum(hops.values())
            total += sum(self._masks_s(costs, n).values())
            read_bytes += count * sum(cost.read_bytes for cost in costs)
        return total + self._fault_s(use, read_bytes)

    def use(self, arranged: Arrangement, use: Use) -> PromptUse:
        """Return what the prompt of the settings costs, and for what; ``use`` is what a token does."""
        total: defaultdict[tuple[int, str], float] = defaultdict(float)
        longest = 0.0
        for n, count in self._sizes.items():
            costs, hops = self._batch(arranged, n)
            for cost in costs:
                for key, seconds in cost.terms:
                    total[key] += count * seconds
                for key, seconds in cost.once:
                    total[key] += seconds
                total[self.work.cpu, "page faults"] += self._fault_s(use, count * cost.read_bytes)
            for key, seconds in hops.items():
                total[key] += count * seconds
            for device, seconds in self._masks_s(costs, n).items():
                total[device, "hops"] += seconds
            longest = max(longest, self._longest(costs))
        terms = {key: seconds for key, seconds in total.items() if seconds}
        return PromptUse(sum(terms.values()), terms, longest)

    def _masks_s(self, costs: Sequence[_LayerCost], n: int) -> dict[int, float]:
        """Return the seconds for the masks of all batches of ``n`` tokens on their way to each GPU."""
        found: defaultdict[int, float] = defaultdict(float)
        for device, window in {cost.mask for cost in costs if cost.mask is not None}:
            if (device, window) not in self._masks_bytes.setdefault(n, {}):
                # In F16, for each token of the batch and each cell that may be looked at.
                cells = [padded_context(min(start, window or start) + n) for start, size in self._batches if size == n]
                self._masks_bytes[n][device, window] = 2 * n * sum(cells)
            found[device] += self._masks_bytes[n][device, window] / self.work.devices[device].link_bytes_per_s
        return found

    def _fault_s(self, use: Use, n_bytes: int) -> float:
        return n_bytes * self.work.missing_share(use.weights_bytes, use.kv_bytes) / PAGE_FAULT_BYTES_PER_S

    def least_batch(self, arranged: Arrangement) -> int:
        """Return the number of tokens from which on it is faster if a GPU takes over what has weights in RAM."""
        taker = self.work.takes_over(arranged)
        if taker is None or not self.copies(arranged, taker):
            return OFFLOAD_TOKENS
        whole = self.settings.n_ubatch
        for n in (*(n for n in _THRESHOLDS if n < whole), whole):
            if _batch_s(self._layers(arranged, n, taker)) < _batch_s(self._layers(arranged, n, None)):
                return n
        return NEVER_TAKEN_OVER

    def copies(self, arranged: Arrangement, taker: int) -> bool:
        """Return whether a GPU that takes over has any weights to copy."""
        costs, _ = self._layers(arranged, self.settings.n_ubatch, taker)
        return any(copies for cost in costs for _, _, copies in cost.pieces)

    # --- one batch

    def _batch(self, arranged: Arrangement, n: int) -> tuple[list[_LayerCost], _Terms]:
        """Return the costs of a batch; a GPU takes over in it as the settings have it, or if that is faster."""
        taker, least = self.work.takes_over(arranged), self.settings.offload_min_batch
        if taker is None or (least and n < least):
            return self._layers(arranged, n, None)
        taken = self._layers(arranged, n, taker)
        if least:
            return taken
        return min(taken, self._layers(arranged, n, None), key=_batch_s)

    def _layers(self, arranged: Arrangement, n: int, taker: int | None) -> tuple[list[_LayerCost], _Terms]:
        """Return the costs of all layers for a batch, and of the changes of the device between them."""
        work = self.work
        forces = n < OFFLOAD_TOKENS or (work.cpu not in arranged.kv and arranged.output != work.cpu)
        following = [*arranged.kv[1 : work.n_computed], arranged.output]
        costs = []
        for kind, kv, devices, after in zip(work.kinds, arranged.kv, arranged.groups, following, strict=False):
            key = (kind, kv, devices, after, n, taker, forces)
            if key not in self._costs:
                self._costs[key] = self._layer(kind, kv, devices, after, n, taker, forces=forces)
            costs.append(self._costs[key])
        hops: defaultdict[tuple[int, str], float] = defaultdict(float)
        here = arranged.embedding
        hidden_bytes = 4 * n * work.info.n_embd
        for cost in costs:
            if cost.pieces:
                if cost.pieces[0][0] != here:
                    self._move(here, cost.pieces[0][0], hidden_bytes, hops)
                here = cost.pieces[-1][0]
        return costs, hops

    def _move(self, source: int, target: int, n_bytes: int, terms: defaultdict[tuple[int, str], float]) -> None:
        """Add the time for a change of the device, and for the copy of a result."""
        devices = self.work.devices
        there, back = devices[target].link_bytes_per_s, devices[source].link_back_bytes_per_s
        back = devices[source].link_bytes_per_s if back is None else back
        terms[target, "hops"] += devices[target].hop_s + n_bytes / there + n_bytes / back

    def _layer(
        self,
        kind: LayerKind,
        kv: int,
        devices: tuple[int, ...],
        following: int,
        n: int,
        taker: int | None,
        *,
        forces: bool,
    ) -> _LayerCost:
        work = self.work
        found = work.layer_pieces(kind, kv, devices, following, n_tokens=n, forces=forces, taker=taker, least=2)
        terms: defaultdict[tuple[int, str], float] = defaultdict(float)
        once: defaultdict[tuple[int, str], float] = defaultdict(float)
        listed: list[tuple[int, float, bool]] = []
        read_bytes = 0
        mask: tuple[int, int | None] | None = None
        # A size that the prompt has no batch of is looked at for the least batch.
        count, is_last = self._sizes.get(n, 1), n == self._batches[-1][1]
        for number, piece in enumerate(found):
            own: defaultdict[tuple[int, str], float] = defaultdict(float)
            copies, longest = False, 0.0
            for source in piece.copied:
                if source.op == "weight":
                    n_bytes = self._used_bytes(kind, source, n)
                    own[piece.device, "copies"] += n_bytes / work.copy_bytes_per_s(piece.device)
                    read_bytes += n_bytes
                    copies = True
                elif number > 0 and source.op != "input":
                    # Each result once; the hidden state that comes from the layer before is counted between layers.
                    there = (source.base or source).device
                    self._move(piece.device if there is None else there, piece.device, 4 * prod(source.shape), own)
            for node, _ in piece.nodes:
                if node.op == "flash_attn":
                    each = self._attention_s(kind, node, piece.device, n)
                    once[piece.device, "attention"] += sum(each)
                    longest = max(each, default=0.0)
                    mask = (piece.device, kind.cache.window) if piece.device != work.cpu else None
                if n == 1 or node.shape[-1] != 1:
                    self._compute(kind, node, piece.device, n, own)
                elif is_last:
                    self._compute(kind, node, piece.device, 1, once)
                if node.reads is not None and node.reads.device == work.cpu == piece.device:
                    read_bytes += self._used_bytes(kind, node.reads, n)
            for key, seconds in own.items():
                terms[key] += seconds
            listed.append((piece.device, sum(own.values()) + longest, copies))
        each_s = sum(terms.values())
        all_s = count * each_s + sum(once.values())
        return _LayerCost(tuple(terms.items()), tuple(once.items()), each_s, all_s, tuple(listed), read_bytes, mask)

    def _attention_s(self, kind: LayerKind, node: Node, device: int, n: int) -> list[float]:
        """Return the seconds of attention of each batch of ``n`` tokens in a layer."""
        # Of a window, llama.cpp computes all cells that it keeps: those before the batch, and the batch's.
        width = kind.cache.key_width // max(kind.cache.n_heads_kv, 1)
        pair_s = 2.0 * (width + node.shape[0]) * node.shape[1]
        pair_s /= self.work.devices[device].batch_flops(f"{self.settings.type_k}:kv")
        window = kind.cache.window or inf
        return [n * (min(start, window) + n / 2) * pair_s for start, size in self._batches if size == n]

    def _used_bytes(self, kind: LayerKind, node: Node, n: int) -> int:
        """Return the bytes of a weight that a batch uses; of experts those that one of its tokens chose."""
        weight, info = node.weight, self.work.info
        assert weight is not None
        if kind.parts.get(weight.name) != "experts" or not info.n_experts:
            return weight.n_bytes
        # As if each token chose anew: routes that are alike use fewer.
        return int(weight.n_bytes * (1 - (1 - info.n_experts_used / info.n_experts) ** n))

    def _compute(
        self, kind: LayerKind, node: Node, device: int, n: int, terms: defaultdict[tuple[int, str], float]
    ) -> None:
        """Add the time of an operation, without the pairs of attention."""
        spec, weight = self.work.devices[device], node.reads
        terms[device, "operations"] += spec.op_s
        if weight is not None and weight.weight is not None and node.op in ("mul_mat", "mul_mat_id"):
            name = weight.weight.name
            experts = node.op == "mul_mat_id"
            _, _, rate = self.work.reading(kind, weight.weight, device, node.op)
            type_name = self.work.types[name] + (":experts" if experts else "")
            flops = 2.0 * weight.shape[0] * prod(node.shape)
            read_s = self._used_bytes(kind, weight, n) / rate
            terms[device, "arithmetic"] += max(read_s, flops / spec.batch_flops(type_name))
        elif node.op != "flash_attn":
            moved = prod(node.shape) + sum(prod(source.shape) for source in node.sources if source.op != "weight")
            terms[device, "operations"] += 4 * moved / spec.bandwidth_bytes_per_s

    def _longest(self, costs: Sequence[_LayerCost]) -> float:
        """Return the longest time that a GPU works without a look at whether to go on."""
        longest = now = 0.0
        here: int | None = None
        for cost in costs:
            for number, (device, seconds, copies) in enumerate(cost.pieces):
                goes_on = device == here and number == 0 and not copies
                now = 0.0 if device == self.work.cpu else now + seconds if goes_on else seconds
                here, longest = device, max(longest, now)
        return longest


def _batch_s(batch: tuple[list[_LayerCost], _Terms]) -> float:
    costs, hops = batch
    return sum([cost.each_s for cost in costs]) + sum(hops.values())


def _batches(n_tokens: int, n_ubatch: int) -> list[tuple[int, int]]:
    """Return the start and the size of each batch of a prompt."""
    return [(start, min(n_ubatch, n_tokens - start)) for start in range(0, max(n_tokens, 1), n_ubatch)]
