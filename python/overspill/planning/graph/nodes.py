"""The operations of a step of llama.cpp, and what they take: weights, caches and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

__all__ = ["VIEW", "GraphInputs", "LayerShape", "LayerWeights", "Node", "Step", "Weight"]


VIEW = "view"


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    n_bytes: int


LayerWeights = Mapping[str, Weight]
"""The weights of a layer by what follows ``blk.N.`` in their names."""


class Node:
    """An operation, or a weight, a cache or an input that operations take."""

    __slots__ = ("base", "device", "forced", "n_bytes", "op", "shape", "sources", "strided", "weight")

    def __init__(
        self,
        op: str,
        shape: tuple[int, ...],
        sources: Sequence[Node] = (),
        *,
        n_bytes: int | None = None,
        base: Node | None = None,
        strided: bool = False,
    ) -> None:
        """Make one; a view has the ``base`` in whose memory it lies."""
        self.op, self.shape, self.sources, self.strided = op, shape, sources, strided
        self.n_bytes = 4 * prod(shape) if n_bytes is None else n_bytes
        self.base = base
        self.weight: str | int | None = None  # a weight's name, or the layer of a cache
        self.forced: int | None = None  # the layer on whose device llama.cpp insists
        self.device: int | None = None


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


@dataclass
class Step:
    """The operations of one step in their order."""

    n_tokens: int
    nodes: list[Node] = field(default_factory=list)
    leaves: list[Node] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def expand(self, node: Node) -> None:
        """Add what ``node`` needs, from left to right, then itself, as ggml_build_forward_expand() does."""
        if id(node) in self.seen:
            return
        self.seen.add(id(node))
        for source in node.sources:
            self.expand(source)
        (self.nodes if node.sources else self.leaves).append(node)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the weights of a layer do not tell."""

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
    """Where the layer's cache lies."""
