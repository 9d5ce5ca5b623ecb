"""The operations of a step of llama.cpp, and what they take: weights, caches and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

__all__ = ["STAYING", "VIEW", "GraphInputs", "GraphLayer", "Node", "Step", "Weight"]

VIEW = "view"
STAYING = frozenset(("weight", "cache", "table"))
"""What has a place that llama.cpp does not choose."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_rows(self) -> int:
        """Of a matrix; one where the file leaves out the last ones of a shape."""
        return self.shape[1] if len(self.shape) > 1 else 1


@dataclass(frozen=True, slots=True, eq=False)
class GraphLayer:
    """A layer: its weights, and what they do not tell."""

    weights: Mapping[str, Weight]
    """By what follows ``blk.N.`` in their names."""
    key_width: int
    """Of one head, as in :attr:`value_width`."""
    value_width: int
    n_heads_kv: int
    key_bytes: int
    """Of the cache of a layer, as in :attr:`value_bytes`, which counts what is read of the keys if there are no
    values."""
    value_bytes: int
    window: bool
    n_used: int
    """Experts that a token passes through."""
    router: str
    """``"softmax of the chosen"``, ``"normalised"`` or ``"plain"``."""
    device: int
    """Of the layer's cache. Only layers with a table of rotary frequencies depend on it, so that one may stand for all
    devices without."""


class Node:
    """An operation, or a weight, a cache or an input that operations take."""

    __slots__ = (
        *("base", "device", "forced", "held", "n_bytes", "n_uses", "op", "place", "reads", "shape", "sources"),
        *("staying", "strided", "weight"),
    )

    def __init__(
        self,
        op: str,
        shape: tuple[int, ...],
        sources: Sequence[Node] = (),
        *,
        n_bytes: int | None = None,
        base: Node | None = None,
        strided: bool = False,
        place: int = 0,
    ) -> None:
        """Make one; a view has a ``base``, whose memory it shares, and ``place`` counts the layers of a step."""
        self.op, self.shape, self.sources, self.place = op, shape, sources, place
        self.base, self.strided = base, strided
        self.n_bytes = 4 * prod(shape) if n_bytes is None else n_bytes
        self.weight: Weight | None = None
        self.forced = False  # whether llama.cpp insists on the device of the layer
        # Of the sources what llama.cpp does not move, and the first weight: set when it is added to a step.
        self.staying: Sequence[Node] = ()
        self.reads: Node | None = None
        self.device: int | None = None
        # While memory is laid out: how often it is still to be used, and the offset, size and device of its memory.
        self.n_uses = 0
        self.held: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """What a step is given besides tokens."""

    n_cells: int
    """Of the KV caches of layers without a window."""
    n_cells_window: int | None
    """Of those with one, None if there are none."""
    turn_k: int = 0
    """Width of the matrix by which keys and queries are turned, as llama.cpp does before it quantises them; or 0."""
    turn_v: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """The operations of one step in their order, without views, and what they take."""

    nodes: list[Node]
    leaves: list[Node]
