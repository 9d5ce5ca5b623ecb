"""llama.cpp's graph of one step, in outline: which operation uses which weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from overspill.planning.graph.layer import Surroundings, build_layer, norms_after_sum
from overspill.planning.graph.nodes import STAYING, VIEW, GraphInputs, GraphLayer, Node, Step, Weight

__all__ = ["StepBuilder"]


class _Block:
    """The operations that a layer adds to a step, or what comes before the first layer or after the last."""

    def __init__(self, before: _Block | None) -> None:
        self.nodes: list[Node] = []
        self.leaves: list[Node] = []
        self.output = Node("nothing", ())
        # What was built to follow it, by layer and whether that is trimmed.
        self.after: dict[tuple[GraphLayer | None, bool], _Block] = {}
        self._seen = set[Node]() if before is None else set(before.nodes)

    def expand(self, node: Node) -> None:
        """Add what ``node`` needs, from left to right, then itself, as ggml_build_forward_expand() does."""
        if node in self._seen:
            return
        self._seen.add(node)
        for source in node.sources:
            if source not in self._seen:
                self.expand(source)
        if not node.sources:
            self.leaves.append(node)
        elif node.op != VIEW:
            self.nodes.append(node)
            node.staying = [source for source in node.sources if source.op in STAYING]
            node.reads = next((source for source in node.staying if source.op == "weight"), None)


class StepBuilder:
    """Builds steps over chosen layers of a model; what several of them begin with is built once.

    Parameters
    ----------
    n_tokens
        Tokens that are processed at once: 1 in decoding, ``n_ubatch`` in the worst case. The logits of one are wanted.
    head
        The weights ``token_embd``, ``output_norm``, ``output`` and ``rope_freqs``; any may be missing.
    inputs
        Sizes of what else a step is given.
    scales_embedding
        Whether the model multiplies the embedding of a token by a number.
    """

    def __init__(
        self, n_tokens: int, head: Mapping[str, Weight], inputs: GraphInputs, *, scales_embedding: bool = False
    ) -> None:
        """Prepare the inputs."""
        self.n_tokens, self._head, self._scales_embedding = n_tokens, head, scales_embedding
        self._first: dict[GraphLayer | None, _Block] = {}
        rows = {"tokens": 4, "positions": 4, "k_indices": 8, "v_indices": 8, "mask": 2 * inputs.n_cells}
        if inputs.n_cells_window is not None:
            rows |= {"k_indices_window": 8, "v_indices_window": 8, "mask_window": 2 * inputs.n_cells_window}
        nodes = {name: Node("input", (n_tokens,), n_bytes=size * n_tokens) for name, size in rows.items()}
        nodes["out_ids"] = Node("input", (1,), n_bytes=4)
        for part, width in (("k", inputs.turn_k), ("v", inputs.turn_v)):
            for suffix in ("", "_window")[: 1 if inputs.n_cells_window is None else 2]:
                if width:
                    nodes[f"turn_{part}{suffix}"] = Node("input", (width, width))
        self._around = Surroundings(nodes, head.get("rope_freqs"), {})

    def step(self, layers: Sequence[GraphLayer]) -> Step:
        """Return the step over some layers, of which one may come several times."""
        has_output = "output" in self._head
        blocks = [block := self._beginning(layers[0])]
        for place, layer in enumerate(layers):
            trim = has_output and place == len(layers) - 1 and not norms_after_sum(layer.weights)
            if (layer, trim) not in block.after:
                block.after[layer, trim] = self._layer(block, layer, place, trim=trim)
            blocks.append(block := block.after[layer, trim])
        if has_output:
            if (None, False) not in block.after:
                block.after[None, False] = self._ending(block)
            blocks.append(block.after[None, False])
        leaves = dict.fromkeys(leaf for block in blocks for leaf in block.leaves)
        return Step([node for block in blocks for node in block.nodes], list(leaves))

    def _beginning(self, layer: GraphLayer) -> _Block:
        embedding = self._head.get("token_embd")
        key = layer if embedding is None else None
        if key in self._first:
            return self._first[key]
        block = self._first[key] = _Block(None)
        if embedding is None:
            norms = (weight for name, weight in layer.weights.items() if name.endswith("norm.weight"))
            width = next((weight.shape[0] for weight in norms), 1)
            block.output = Node("input", (width, self.n_tokens))
            return block
        shape = (embedding.shape[0], self.n_tokens)
        block.output = Node("get_rows", shape, (self._head_weight("token_embd"), self._around.inputs["tokens"]))
        block.expand(block.output)
        # Given instead of tokens, it is reserved all the same.
        block.expand(Node("input", shape))
        if self._scales_embedding:
            block.output = Node("scale", shape, (block.output,))
        return block

    def _layer(self, before: _Block, layer: GraphLayer, place: int, *, trim: bool) -> _Block:
        block = _Block(before)
        block.output = build_layer(layer, place, before.output, self._around, block.expand, trim=trim)
        block.expand(block.output)
        return block

    def _ending(self, before: _Block) -> _Block:
        block, node = _Block(before), before.output
        if node.shape[-1] != 1:
            node = Node("get_rows", (node.shape[0], 1), (node, self._around.inputs["out_ids"]))
        if "output_norm" in self._head:
            node = Node("rms_norm", node.shape, (node,))
            node = Node("mul", node.shape, (node, self._head_weight("output_norm")))
        block.output = Node("mul_mat", (self._head["output"].n_rows, 1), (self._head_weight("output"), node))
        block.expand(block.output)
        return block

    def _head_weight(self, name: str) -> Node:
        weight = self._head[name]
        node = Node("weight", weight.shape, n_bytes=weight.n_bytes, place=-1)
        node.weight = weight
        return node
