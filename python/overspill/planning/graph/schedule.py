"""Where each operation of a step runs, and the pieces that the graph is cut into.

Both as ggml-backend.cpp's scheduler decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from overspill.planning.graph.nodes import Node, Step, Weight

__all__ = ["OFFLOAD_TOKENS", "Piece", "assign", "pieces"]

OFFLOAD_TOKENS = 32
"""From this many rows on, a GPU that can takes over an operation whose weight is in the CPU's memory, if nothing else
is asked for."""


def assign(
    step: Step,
    cpu: int,
    device_of_weight: Callable[[Weight, int], int],
    devices_of_layers: Sequence[int],
    *,
    forces: bool,
    takes_over: int | None,
    least: int = OFFLOAD_TOKENS,
) -> None:
    """Set where each node is computed; devices are numbered as the scheduler does, the CPU last.

    Parameters
    ----------
    step
        The operations.
    cpu
        The CPU's number.
    device_of_weight
        Returns the device of a weight; the layer of the step that it belongs to comes with it, or -1.
    devices_of_layers
        The device of each layer's cache in the step.
    forces
        Whether norms are kept with their layer: in decoding, and where everything is on GPUs.
    takes_over
        The GPU that takes over large operations whose weights are in the CPU's memory.
    least
        The number of rows from which on they are large.
    """
    for leaf in step.leaves:
        if leaf.op == "weight":
            assert leaf.weight is not None
            leaf.device = device_of_weight(leaf.weight, leaf.place)
        elif leaf.op == "cache":
            leaf.device = devices_of_layers[leaf.place]
        elif leaf.op == "input":
            leaf.device = cpu
    nodes = step.nodes
    for node in nodes:
        node.device = None
        if forces and node.forced:
            node.device = devices_of_layers[node.place]
        elif node.base is not None:
            node.device = node.base.device
        elif node.reads is not None and node.op != "flash_attn":
            node.device = node.reads.device
            if takes_over is not None and node.device == cpu and _n_rows(node) >= least:
                node.device = takes_over
    # Neighbours follow: first those of GPUs, downwards and then upwards, then the rest.
    for gpus_only in (True, False):
        for direction in (nodes, reversed(nodes)):
            current: int | None = None
            for node in direction:
                if node.device is not None:
                    current = None if gpus_only and node.device == cpu else node.device
                elif current is not None and _can_compute(node, current, cpu):
                    node.device = current
    for node in nodes:
        if node.device is None:
            node.device = cpu


def _can_compute(node: Node, device: int, cpu: int) -> bool:
    """Return whether a device can; a GPU cannot with a weight on another."""
    return not node.staying or all(source.device in (device, cpu) for source in node.staying)


def _n_rows(node: Node) -> int:
    """Return what ggml-cuda.cu's get_op_batch_size() does."""
    if node.op == "get_rows":
        return 0
    if node.op == "mul_mat":
        return node.shape[1]
    if node.op in ("mul_mat_id", "rope"):
        return node.shape[2]
    return prod(node.shape[1:])


@dataclass(frozen=True, slots=True)
class Piece:
    """Operations in a row that one device computes."""

    device: int
    nodes: list[tuple[Node, list[Node]]]
    """Each with those of its sources that are on other devices."""
    copied: list[Node]
    """What has to be brought there first."""


def pieces(step: Step) -> list[Piece]:
    """Cut an assigned step where the device changes, as ggml_backend_sched_split_graph() does."""
    found: list[Piece] = []
    copies: set[tuple[Node, int]] = set()
    for node in step.nodes:
        device = node.device
        assert device is not None
        foreign = [source for source in node.sources if (source.base or source).device != device]
        # The memory of weights that were brought is used again.
        anew = foreign and found and found[-1].copied and any(source.op in ("weight", "table") for source in foreign)
        if not found or found[-1].device != device or anew:
            found.append(Piece(device, [], []))
        piece = found[-1]
        for source in foreign:
            if (source, device) not in copies:
                copies.add((source, device))
                piece.copied.append(source)
        piece.nodes.append((node, foreign))
    return found
