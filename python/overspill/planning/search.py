"""Look for the arrangement with the least time that fits into the memory of every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple, TypeAlias

from overspill.planning.layer_kinds import LayerKind
from overspill.planning.prompt import Prompts
from overspill.planning.workload import Arrangement, Use, Workload

__all__ = ["Pins", "Search", "excess_bytes", "whole_layers"]

_Order: TypeAlias = Literal["last", "first", "small"]
_Consider: TypeAlias = "Callable[[_Plan], tuple[int, float] | None]"
# So many of the best are finished to the last tensor.
_N_FINISHED = 4
_N_FINISHED_FOR_PROMPTS = 2  # which is done for each size of batches
# What the CPU's attention must gain: it is slower than its bandwidth tells, and prompts take longer.
_SPILLING = 1.25
_IMPOSSIBLE = (2, 0.0)


@dataclass(frozen=True)
class Pins:
    """Decisions made before the search, in numbers of devices; the workload has the pinned tensors."""

    kv: tuple[int | None, ...]
    output: int | None = None
    embedding: int | None = None


class _Plan(NamedTuple):
    """The choices that determine an arrangement."""

    runs: tuple[tuple[int, int], ...]
    """GPUs and numbers of layers whose attention and KV cache they have, up to the last layer; the CPU has the rest."""
    output: int
    order: _Order
    """Which layers' matrices come to a GPU first."""
    spills: bool
    """Whether what is left of the GPUs is filled with matrices of the CPU's layers."""


@dataclass(eq=False)
class _Groups:
    """The groups of tensors of the layers of a kind that are not pinned, besides attention."""

    kind: LayerKind
    dense: list[int]
    dense_bytes: int
    matrices: list[int]
    matrix_bytes: int
    start: list[int]
    """Devices of all groups: those that are pinned where they must be, the others on the CPU."""

    @classmethod
    def of(cls, kind: LayerKind, cpu: int) -> _Groups:
        free = [group for group, (_, device) in enumerate(kind.groups) if device is None]
        dense = [group for group in free if kind.groups[group][0] == "dense"]
        matrices = [group for group in free if kind.is_matrix_group(group)]
        dense_bytes, matrix_bytes = (sum(kind.group_bytes[group] for group in part) for part in (dense, matrices))
        start = [cpu if device is None else device for _, device in kind.groups]
        return cls(kind, dense, dense_bytes, matrices, matrix_bytes, start)


class Search:
    """The search for one workload."""

    def __init__(self, work: Workload, pins: Pins, prompts: Prompts | None = None) -> None:
        """Prepare; ``pins`` must be ones that llama.cpp can do, see :meth:`best`.

        With ``prompts``, the time of a whole exchange counts, otherwise that of decoding alone.
        """
        self.work, self.pins, self.prompts, self.cpu = work, pins, prompts, work.cpu
        self.gpus = list(range(work.cpu))
        groups = {kind: _Groups.of(kind, work.cpu) for kind in dict.fromkeys(work.kinds)}
        self._groups = [groups[kind] for kind in work.kinds]
        self._with_attention: dict[tuple[_Groups, int], tuple[list[int], list[tuple[int, int]]]] = {}
        self._guess = [0] * len(work.devices)

    def seconds(self, arranged: Arrangement, use: Use | None = None) -> float:
        """Return what is to be least: the time of a token, with prompts that of an exchange for each of its tokens."""
        use = self.work.evaluate(arranged) if use is None else use
        if self.prompts is None:
            return use.seconds
        return use.seconds + self.prompts.seconds(arranged, use) / self.work.settings.reply_tokens

    # --- arrangements

    def _orders(self) -> tuple[_Order, ...]:
        sizes = {groups.matrix_bytes for groups in self._groups if groups.matrix_bytes}
        return ("last", "first", "small") if len(sizes) > 1 else ("last",)

    def build(
        self, plan: _Plan, compute: Sequence[int], *, anyhow: bool = False
    ) -> tuple[Arrangement | None, list[int]]:
        """Return an arrangement and what it leaves on each GPU; none if less than nothing is left."""
        work, cpu, n = self.work, self.cpu, self.work.n_layers
        kv = [cpu] * (n - sum(count for _, count in plan.runs))
        for gpu, count in plan.runs:
            kv += [gpu] * count
        if any(pin is not None and pin != device for pin, device in zip(self.pins.kv, kv, strict=True)):
            return None, []
        embedding = cpu if self.pins.embedding is None else self.pins.embedding
        arranged = Arrangement(kv, [], plan.output, embedding)
        room = [work.devices[gpu].memory_bytes - work.settings.margin_bytes - compute[gpu] for gpu in self.gpus] + [
            1 << 62
        ]
        for device, n_bytes in enumerate(work.head_bytes(arranged)):
            room[device] -= n_bytes
        groups: list[list[int]] = []
        for of_layer, device, kv_bytes in zip(self._groups, kv, work.kv_bytes, strict=True):
            devices, taken = self._decided(of_layer, device)
            groups.append([*devices])
            room[device] -= kv_bytes
            for place, n_bytes in taken:
                room[place] -= n_bytes
        used = {gpu for gpu, _ in plan.runs}.union([plan.output], *groups)
        if not anyhow and any(room[gpu] < 0 for gpu in used if gpu != cpu):
            return None, room

        def move(layer: int, wanted: Sequence[int], n_bytes: int, gpu: int) -> None:
            if 0 < n_bytes <= room[gpu]:
                room[gpu] -= n_bytes
                for group in wanted:
                    groups[layer][group] = gpu

        with_kv = [layer for layer in reversed(range(n)) if kv[layer] != cpu]
        for layer in with_kv:
            move(layer, self._groups[layer].dense, self._groups[layer].dense_bytes, kv[layer])
        for layer in self._in_order(with_kv, plan.order):
            move(layer, self._groups[layer].matrices, self._groups[layer].matrix_bytes, kv[layer])
        if plan.spills:
            nearest = [gpu for gpu, _ in plan.runs] or self.gpus
            for layer in reversed(range(n)):
                if kv[layer] == cpu:
                    one = self._groups[layer]
                    for gpu in nearest:
                        if groups[layer] == one.start:
                            move(layer, [*one.dense, *one.matrices], one.dense_bytes + one.matrix_bytes, gpu)
        arranged.groups = [tuple(devices) for devices in groups]
        return arranged, room

    def _decided(self, groups: _Groups, device: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the devices of a layer's groups, attention on one, and devices and bytes of what is decided."""
        key = (groups, device)
        if key not in self._with_attention:
            devices, taken = [*groups.start], list[tuple[int, int]]()
            for group, (name, pin) in enumerate(groups.kind.groups):
                if pin is None and name == "attention":
                    devices[group] = device
                if pin is not None or name == "attention":
                    taken.append((devices[group], groups.kind.group_bytes[group]))
            self._with_attention[key] = devices, taken
        return self._with_attention[key]

    def _in_order(self, layers: list[int], order: _Order) -> list[int]:
        if order == "first":
            return layers[::-1]
        return sorted(layers, key=lambda layer: self._groups[layer].matrix_bytes) if order == "small" else layers

    def _fill(self, arranged: Arrangement, room: list[int]) -> Arrangement:
        """Bring single matrices to the GPUs with what is left there."""
        best, seconds = arranged, self.seconds(arranged)
        for _ in range(3):
            found: tuple[Arrangement, int, int] | None = None
            for trial, gpu, need in self._single(best, room):
                if (after := self.seconds(trial)) < seconds:
                    found, seconds = (trial, gpu, need), after
            if found is None:
                break
            best = found[0]
            room[found[1]] -= found[2]
        return best

    def _single(self, arranged: Arrangement, room: Sequence[int]) -> Iterator[tuple[Arrangement, int, int]]:
        work = self.work
        tried: set[tuple[object, ...]] = set()
        for layer in reversed(range(work.n_layers)):
            gpu, devices = arranged.kv[layer], arranged.groups[layer]
            # Layers that are alike, with their like beside them, cost alike.
            alike = (id(work.kinds[layer]), gpu, devices)
            if gpu == self.cpu or alike in tried:
                continue
            tried.add(alike)
            here = [group for group in self._groups[layer].matrices if devices[group] == self.cpu]
            for n in range(1, len(here) + 1):
                for chosen in combinations(here, n):
                    need = sum(work.kinds[layer].group_bytes[group] for group in chosen)
                    if need > room[gpu]:
                        continue
                    moved = tuple(gpu if group in chosen else device for group, device in enumerate(devices))
                    groups = [*arranged.groups]
                    groups[layer] = moved
                    yield Arrangement(arranged.kv, groups, arranged.output, arranged.embedding), gpu, need

    def _routers_to_experts(self, arranged: Arrangement) -> Arrangement:
        """Keep routers on the CPU where all experts are, if that is faster: the GPU has its costs for each step."""
        groups = [*arranged.groups]
        for layer, devices in enumerate(groups):
            matrices, dense = self._groups[layer].matrices, self._groups[layer].dense
            if matrices and dense and all(devices[group] == self.cpu for group in matrices):
                groups[layer] = tuple(self.cpu if group in dense else device for group, device in enumerate(devices))
        trial = Arrangement(arranged.kv, groups, arranged.output, arranged.embedding)
        return trial if self.seconds(trial) < self.seconds(arranged) else arranged

    # --- the search

    def best(self) -> Arrangement:
        """Return the fastest arrangement that fits, or, if pins allow none, the one that comes nearest.

        Raises
        ------
        ValueError
            llama.cpp cannot do what is pinned.
        """
        plans = self._plans()
        if not plans:
            raise ValueError(
                "pins: llama.cpp can only keep the KV caches of the first layers on the CPU, and those of the others "
                "on GPUs, each of which has one run of layers; what is pinned is not of that form"
            )
        finished = []
        for plan in plans[: _N_FINISHED if self.prompts is None else _N_FINISHED_FOR_PROMPTS]:
            if (found := self._finish(plan)) is not None:
                finished.append((found[0] * self._handicap(plan), found[1]))
        if finished:
            return min(finished, key=lambda found: found[0])[1]
        nearest = [self.build(plan, self._guess, anyhow=True) for plan in plans]
        return min(
            (arranged for arranged, _ in nearest if arranged is not None),
            key=lambda arranged: excess_bytes(self.work, arranged, self.work.evaluate(arranged)),
        )

    def _plans(self) -> list[_Plan]:
        """Return what can be done, the best first as far as is known without every detail."""
        outputs = self.pins.output
        none = _Plan((), self.cpu if outputs is None else outputs, "last", False)
        if not self.gpus:
            return [none] if self._score(none) is not None else []
        self._guess = self._typical_compute()
        scores: dict[_Plan, tuple[int, float]] = {}

        def consider(plan: _Plan) -> tuple[int, float] | None:
            if plan not in scores:
                score = self._score(plan)
                if score is None:
                    return None
                scores[plan] = score
            return scores[plan]

        consider(none)
        for gpu in self.gpus:
            self._count_layers(gpu, consider)
        # The fastest last, where the output is.
        ranked = sorted(self.gpus, key=lambda gpu: self.work.devices[gpu].bandwidth_bytes_per_s)
        subsets = {tuple(ranked), *(tuple(gpu for gpu in ranked if gpu != left) for left in ranked)}
        for subset in sorted(subsets, key=len, reverse=True):
            if len(subset) > 1:
                self._climb(subset, consider)
        return sorted(scores, key=lambda plan: (scores[plan][0], scores[plan][1] * self._handicap(plan)))

    def _handicap(self, plan: _Plan) -> float:
        """Return by how much a plan must be better: if attention need not be on the CPU."""
        return _SPILLING if plan.spills and self.cpu not in self.pins.kv else 1.0

    def _count_layers(self, gpu: int, consider: _Consider) -> None:
        """Look at all numbers of layers on one GPU, and at other ways for those that are best."""
        n, pinned = self.work.n_layers, self.pins.output

        def score(count: int, output: int = gpu, order: _Order = "last", spills: bool = False) -> tuple[int, float]:
            runs = ((gpu, count),) if count else ()
            return consider(_Plan(runs, output if pinned is None else pinned, order, spills)) or _IMPOSSIBLE

        found: list[tuple[tuple[int, float], int]] = []
        for count in range(n + 1):
            found.append((score(count), count))
            if found[-1][0][0] == 1:
                break  # with more layers, even less is left
        possible = [count for (rank, _), count in found if rank == 0]
        for _, count in sorted(found)[:3]:
            score(count, self.cpu)
            for order in self._orders()[1:]:
                score(count, order=order)
        # Between few numbers, then nearer to the best of them.
        spills = {count: score(count, spills=True) for count in possible[:: max(1, len(possible) // 8)]}
        step = max(1, len(possible) // 8)
        while spills and (step := step // 2):
            best = min(spills, key=lambda count: spills[count])
            for count in (best - step, best + step):
                if count in possible and count not in spills:
                    spills[count] = score(count, spills=True)
        for count in sorted(spills, key=lambda count: spills[count])[:1]:
            score(count, self.cpu, spills=True)

    def _climb(self, subset: tuple[int, ...], consider: _Consider) -> None:
        """Shift layers between several GPUs, and the CPU, as long as it helps."""
        n = self.work.n_layers
        output = subset[-1] if self.pins.output is None else self.pins.output

        def score(counts: tuple[int, ...]) -> tuple[int, float]:
            if min(counts) < 1:
                return _IMPOSSIBLE
            runs = tuple(zip(subset, counts, strict=True))
            return consider(_Plan(runs, output, "last", False)) or _IMPOSSIBLE

        memory = [self.work.devices[gpu].memory_bytes for gpu in subset]
        even = [max(1, n * part // sum(memory)) for part in memory]
        even[-1] += n - sum(even)
        seeds = [tuple(even)]
        # As many whole layers as each can hold, the fastest first.
        full = max(
            1, max((sum(kind.group_bytes) + kv for kind, kv in zip(self.work.kinds, self.work.kv_bytes, strict=True)))
        )
        left, filled = n - len(subset), [1] * len(subset)
        for place in reversed(range(len(subset))):
            more = min(left, max(0, (memory[place] - self.work.settings.margin_bytes) // full - 1))
            filled[place] += more
            left -= more
        seeds += [tuple(filled), (filled[0] + left, *filled[1:]), (*filled[:-1], filled[-1] + left)]
        for counts in dict.fromkeys(seeds):
            best = score(counts)
            step = max(1, n // 4)
            while step:
                moves = [
                    tuple(
                        count - step * (place == source) + step * (place == target)
                        for place, count in enumerate(counts)
                    )
                    for source in range(-1, len(subset))
                    for target in range(-1, len(subset))
                    if source != target
                ]
                reached = [(score(move), move) for move in moves if sum(move) <= n]
                if reached and min(reached)[0] < best:
                    best, counts = min(reached)
                else:
                    step //= 2

    def _score(self, plan: _Plan) -> tuple[int, float] | None:
        """Return what is the less, the better the plan is; None if llama.cpp or a pin does not allow it."""
        arranged, room = self.build(plan, self._guess)
        if arranged is None:
            return (1, float(-min(room))) if room else None
        return (0, self.seconds(arranged))

    def _typical_compute(self) -> list[int]:
        """Return what computing takes on each GPU when it has attention and not all matrices."""
        return [self._compute_on(gpu, ("attention", "dense")) for gpu in self.gpus] + [0]

    def _compute_on(self, gpu: int, names: tuple[str, ...] | None) -> int:
        """Return what computing takes on a GPU that has these groups of all layers, or everything."""
        groups = [
            tuple(
                pin if pin is not None else gpu if names is None or name in names else self.cpu
                for name, pin in kind.groups
            )
            for kind in self.work.kinds
        ]
        return self.work.compute_bytes(Arrangement([gpu] * self.work.n_layers, groups, gpu, self.cpu))[gpu]

    def _finish(self, plan: _Plan) -> tuple[float, Arrangement] | None:
        """Decide on single matrices, with the true need of the computation, which depends on them."""
        # With nothing in RAM it takes the least, so perhaps nothing has to be there.
        compute = [self._compute_on(gpu, None) for gpu in self.gpus] + [0]
        best: tuple[float, Arrangement] | None = None
        for _ in range(5):
            arranged, room = self.build(plan, compute)
            if arranged is None:
                break
            arranged = self._routers_to_experts(self._fill(arranged, room))
            actual = self.work.compute_bytes(arranged)
            use = self.work.evaluate(arranged)
            seconds = self.seconds(arranged, use)
            if excess_bytes(self.work, arranged, use) <= 0 and (best is None or seconds < best[0]):
                best = (seconds, arranged)
            if all(now == before for now, before in zip(actual, compute, strict=True)):
                break
            compute = actual if best is not None else [max(pair) for pair in zip(actual, compute, strict=True)]
        return best


def whole_layers(work: Workload) -> Arrangement | None:
    """Return the largest number of whole layers that fits on the first GPU, as llama.cpp counts them, if any."""
    layers = [sum(kind.group_bytes) + kv_bytes for kind, kv_bytes in zip(work.kinds, work.kv_bytes, strict=True)]
    # All, and then as many fewer as the excess must be worth.
    count = work.n_layers if work.cpu > 0 else -1
    while count >= 0:
        kv = [work.cpu] * (work.n_layers - count) + [0] * count
        groups = [(device,) * len(kind.groups) for device, kind in zip(kv, work.kinds, strict=True)]
        arranged = Arrangement(kv, groups, 0, work.cpu)
        excess = excess_bytes(work, arranged, work.evaluate(arranged))
        if excess <= 0:
            return arranged
        count -= max(1, excess // max(1, *layers))
    return None


def excess_bytes(work: Workload, arranged: Arrangement, use: Use) -> int:
    """Return the bytes that are too many on the fullest GPU."""
    compute = work.compute_bytes(arranged)
    return max(
        (
            use.weights_bytes[gpu]
            + use.kv_bytes[gpu]
            + compute[gpu]
            + work.settings.margin_bytes
            - work.devices[gpu].memory_bytes
            for gpu in work.used(arranged)
        ),
        default=0,
    )
