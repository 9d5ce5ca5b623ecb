"""The memory that a step takes on each device besides weights and caches, laid out as ggml-alloc.c does."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from overspill.planning.graph.nodes import Node, Step
from overspill.planning.graph.schedule import pieces

__all__ = ["compute_bytes"]


# ggml_op_can_inplace()
_IN_PLACE = frozenset(
    ("add", "add_id", "mul", "scale", "unary", "rope", "rms_norm", "soft_max", "clamp", "div", "fill")
)


class _Memory:
    """ggml-alloc.c's allocator of one device, which only counts."""

    def __init__(self) -> None:
        self.free: list[list[int]] = [[0, 1 << 62]]
        self.highest = 0

    def take(self, size: int) -> int:
        best = -1
        for place in range(len(self.free) - 1):
            if self.free[place][1] >= size and (best < 0 or self.free[place][1] <= self.free[best][1]):
                best = place
        block = self.free[best]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if block[1] == 0:
            del self.free[best]
        self.highest = max(self.highest, offset + size)
        return offset

    def give(self, offset: int, size: int) -> None:
        if size == 0:
            return
        for place, block in enumerate(self.free):
            if block[0] + block[1] == offset:
                block[1] += size
                if place + 1 < len(self.free) and block[0] + block[1] == self.free[place + 1][0]:
                    block[1] += self.free[place + 1][1]
                    del self.free[place + 1]
                return
            if offset + size == block[0]:
                # What could join with the one before, was found there.
                block[0] = offset
                block[1] += size
                return
            if block[0] > offset:
                self.free.insert(place, [offset, size])
                return


_ALIGNMENT = 128  # CUDA's; the CPU's is less


def compute_bytes(step: Step, n_devices: int) -> list[int]:
    """Return the bytes that an assigned step needs on each device besides weights and caches."""
    memories = [_Memory() for _ in range(n_devices)]
    order = _in_order(step)

    def place(node: Node, device: int, sources: Sequence[Node]) -> None:
        size = -(-node.n_bytes // _ALIGNMENT) * _ALIGNMENT
        if node.op in _IN_PLACE:
            for source in sources:
                # What is seen through a view is not used again.
                if (
                    source.held is not None
                    and source.n_uses == 1
                    and source.shape == node.shape
                    and not (source.strided or node.strided)
                ):
                    offset, old_size, held_on = source.held
                    source.held, node.held = None, (offset, size, held_on)
                    memories[held_on].give(offset + size, old_size - size)
                    return
        node.held = (memories[device].take(size), size, device)

    for leaf in step.leaves:
        if leaf.op == "input":
            place(leaf, n_devices - 1, ())
    last = order[-1][0]
    for node, device, sources in order:
        if node is not None and node.base is None:
            place(node, device, sources)
        for source in sources:
            owner = source.base or source
            owner.n_uses -= 1
            if not owner.n_uses and owner.held is not None and owner is not last:
                offset, size, held_on = owner.held
                memories[held_on].give(offset, size)
                owner.held = None
    return [memory.highest for memory in memories]


def _in_order(step: Step) -> list[tuple[Node | None, int, Sequence[Node]]]:
    """Return the operations of an assigned step and the copies between devices, with their devices and sources.

    No operation, with a source, stands for what keeps the source until it is copied. Uses are counted on the way.
    """
    order: list[tuple[Node | None, int, Sequence[Node]]] = []
    copies: dict[tuple[Node, int], Node] = {}
    for leaf in step.leaves:
        leaf.held, leaf.n_uses = None, 0
    for piece in pieces(step):
        device = piece.device
        for source in piece.copied:
            (source.base or source).n_uses += 1
            n_bytes = source.n_bytes or 4 * prod(source.shape)
            copies[source, device] = copy = Node("copy", source.shape, n_bytes=n_bytes, strided=source.strided)
            order += [(None, 0, (source,)), (copy, device, ())]
        for node, foreign in piece.nodes:
            node.held, node.n_uses = None, 0
            sources = node.sources
            if foreign:
                sources = [copies[source, device] if source in foreign else source for source in sources]
            for source in sources:
                (source.base or source).n_uses += 1
            order.append((node, device, sources))
    return order
