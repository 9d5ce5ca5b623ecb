"""Where each operation of a step runs, and the pieces that the graph is cut into.

Both as ggml-backend.cpp's scheduler decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from overspill.planning.graph.nodes import VIEW, Node, Step

__all__ = ["OFFLOAD_TOKENS", "assign", "pieces"]


OFFLOAD_TOKENS = 32
"""From this many rows on, a GPU that can takes over an operation whose weight lies in the CPU's memory."""


def assign(
    step: Step,
    cpu: int,
    device_of_weight: Callable[[str], int],
    device_of_layer: Callable[[int], int],
    *,
    forces: bool,
    takes_over: int | None,
) -> None:
    """Set where each node is computed; devices are numbered as the scheduler does, the CPU last.

    Parameters
    ----------
    step
        The operations.
    cpu
        The CPU's number.
    device_of_weight, device_of_layer
        Where a weight lies by its name, and a layer's cache by its number.
    forces
        Whether norms are kept with their layer: in decoding, and where everything is on GPUs.
    takes_over
        The GPU that takes over large operations whose weights are in the CPU's memory.
    """
    for leaf in step.leaves:
        if leaf.op == "weight":
            leaf.device = device_of_weight(str(leaf.weight))
        elif leaf.op in ("cache", "table"):
            leaf.device = device_of_layer(int(leaf.weight or 0))
        else:
            leaf.device = cpu
    nodes = [node for node in step.nodes if node.op != VIEW]
    for node in nodes:
        node.device = None
        if forces and node.forced is not None:
            node.device = device_of_layer(node.forced)
        elif node.base is not None:
            node.device = node.base.device
        elif node.op not in ("rope", "flash_attn"):
            weight = next((source for source in node.sources if source.op == "weight"), None)
            if weight is not None:
                node.device = weight.device
                if takes_over is not None and weight.device == cpu and _n_rows(node) >= OFFLOAD_TOKENS:
                    node.device = takes_over
    # Neighbours follow: first those of GPUs, downwards and then upwards, then the rest.
    for gpus_only in (True, False):
        for direction in (nodes, nodes[::-1]):
            current: int | None = None
            for node in direction:
                if node.device is not None:
                    current = None if gpus_only and node.device == cpu else node.device
                elif current is not None and _can_compute(node, current, cpu):
                    node.device = current
    for node in nodes:
        if node.device is None:
            node.device = cpu
    for node in step.nodes:
        if node.op == VIEW:
            node.device = node.base.device if node.base is not None else None


def _can_compute(node: Node, device: int, cpu: int) -> bool:
    """Return whether a device can; a GPU cannot with a weight that lies on another."""
    return all(source.device in (device, cpu) for source in node.sources if source.op in ("weight", "table", "cache"))


def _n_rows(node: Node) -> int:
    """Return what ggml-cuda.cu's get_op_batch_size() does."""
    if node.op == "get_rows":
        return 0
    if node.op == "mul_mat":
        return node.shape[1]
    if node.op in ("mul_mat_id", "rope"):
        return node.shape[2]
    return prod(node.shape[1:])


@dataclass(frozen=True)
class Piece:
    """Operations in a row that one device computes."""

    device: int
    nodes: list[Node]
    copied: list[Node]
    """What has to be brought there first."""


def pieces(step: Step) -> list[Piece]:
    """Cut an assigned step where the device changes, as ggml_backend_sched_split_graph() does."""
    found: list[Piece] = []
    copies: set[tuple[int, int]] = set()
    for node in step.nodes:
        if node.op == VIEW:
            if found:
                found[-1].nodes.append(node)
            continue
        device = node.device
        assert device is not None
        new = not found or found[-1].device != device
        if not new and found[-1].copied:
            # The memory of weights that were brought is used again.
            new = any(source.op in ("weight", "table") and source.device != device for source in node.sources)
        if new:
            found.append(Piece(device, [], []))
        piece = found[-1]
        for source in node.sources:
            if source.device != device and (id(source), device) not in copies:
                copies.add((id(source), device))
                piece.copied.append(source)
        piece.nodes.append(node)
    return found
