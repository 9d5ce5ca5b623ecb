"""The memory that a step takes on each device besides weights and caches, laid out as ggml-alloc.c does."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from overspill.planning.graph.nodes import VIEW, Node, Step
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


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def compute_bytes(step: Step, n_devices: int) -> list[int]:
    """Return the bytes that an assigned step needs on each device besides weights and caches."""
    memories = [_Memory() for _ in range(n_devices)]
    # Offset, size and device of what has memory of its own.
    held: dict[int, tuple[int, int, int]] = {}
    children: dict[int, int] = {}
    views: dict[int, int] = {}
    replaced: dict[tuple[int, int], Node] = {}
    order: list[tuple[Node, int, list[Node]]] = []
    external = {id(leaf) for leaf in step.leaves if leaf.op in ("weight", "cache", "table")}
    for piece in pieces(step):
        for source in piece.copied:
            copy = Node("copy", source.shape, n_bytes=source.n_bytes or 4 * prod(source.shape), strided=source.strided)
            replaced[id(source), piece.device] = copy
            # Keeps the original until it is copied.
            order.append((Node("keep", (0,), n_bytes=0, base=source), 0, [source]))
            order.append((copy, piece.device, []))
        for node in piece.nodes:
            if node.op == VIEW:
                order.append((node, piece.device, list(node.sources)))
            else:
                sources = [replaced.get((id(source), piece.device), source) for source in node.sources]
                order.append((node, piece.device, sources))

    def allocate(node: Node, device: int, sources: Iterable[Node]) -> None:
        if id(node) in held or id(node) in external or node.base is not None:
            return
        size = _padded(node.n_bytes)
        if node.op in _IN_PLACE:
            for source in sources:
                # What is seen through a view is not used again.
                if (
                    id(source) in held
                    and source.shape == node.shape
                    and not (source.strided or node.strided)
                    and children.get(id(source)) == 1
                    and not views.get(id(source), 0)
                ):
                    offset, old_size, place = held.pop(id(source))
                    held[id(node)] = (offset, size, place)
                    memories[place].give(offset + size, old_size - size)
                    return
        held[id(node)] = (memories[device].take(size), size, device)

    for leaf in step.leaves:
        allocate(leaf, n_devices - 1, ())
    for node, _, sources in order:
        if node.base is not None and node.op != "keep":
            views[id(node.base)] = views.get(id(node.base), 0) + 1
        for source in sources:
            children[id(source)] = children.get(id(source), 0) + 1
    last = order[-1][0]
    for node, device, sources in order:
        allocate(node, device, sources)
        for source in sources:
            children[id(source)] -= 1
            if children[id(source)] or views.get(id(source), 0):
                continue
            owner = source
            if source.base is not None:
                owner = source.base
                views[id(owner)] -= 1
                if views[id(owner)] or children.get(id(owner), 0):
                    continue
            if id(owner) in held and owner is not last:
                offset, size, place = held.pop(id(owner))
                memories[place].give(offset, size)
    return [memory.highest for memory in memories]
