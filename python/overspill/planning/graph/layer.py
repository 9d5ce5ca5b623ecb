"""The operations of one layer, as src/llama-graph.cpp and src/models/*.cpp build them.

Operations of a model's own file that no weight tells of are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from overspill.planning.graph.nodes import VIEW, GraphLayer, Node, Weight

__all__ = ["Surroundings", "build_layer", "norms_after_sum"]


def norms_after_sum(weights: Mapping[str, Weight]) -> bool:
    """Return whether the norm after attention follows the sum with what came in, as in gpt-oss."""
    return "post_attention_norm.weight" in weights and "ffn_norm.weight" not in weights


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The nodes that the layers of a step share."""

    inputs: Mapping[str, Node]
    frequencies: Weight | None
    """The table of rotary frequencies, if there is one."""
    tables: dict[int, Node]
    """Its copies by device, which are made as they are needed."""


def build_layer(
    layer: GraphLayer, place: int, node: Node, around: Surroundings, expand: Callable[[Node], None], *, trim: bool
) -> Node:
    """Return the output of a layer.

    Parameters
    ----------
    layer, place
        The layer, and its number in the step.
    node
        The output of the layer before, or the embedding; its last dimension counts tokens.
    around
        What all layers share.
    expand
        Adds a node to the step, after what it needs.
    trim
        Whether only the token is left whose logits are wanted.
    """
    return _Builder(layer, place, node.shape[-1], around, expand).build(node, trim=trim)


class _Builder:
    """Builds a layer; the methods follow those of llm_graph_context."""

    def __init__(
        self, layer: GraphLayer, place: int, n_tokens: int, around: Surroundings, expand: Callable[[Node], None]
    ) -> None:
        self.layer, self.weights, self.place, self.n = layer, layer.weights, place, n_tokens
        self.inputs, self.tables, self.frequencies, self.expand = (
            around.inputs,
            around.tables,
            around.frequencies,
            expand,
        )
        self._known: dict[str, Node] = {}

    # --- operations

    def weight(self, weight: Weight) -> Node:
        if weight.name not in self._known:
            self._known[weight.name] = node = Node("weight", weight.shape, n_bytes=weight.n_bytes, place=self.place)
            node.weight = weight
        return self._known[weight.name]

    def view(self, node: Node, *shape: int, strided: bool = False) -> Node:
        return Node(VIEW, shape, (node,), base=node.base or node, strided=strided or node.strided, n_bytes=0)

    def has(self, stem: str) -> bool:
        return f"{stem}.weight" in self.weights

    def norm(self, node: Node, stem: str, *, forced: bool = True) -> Node:
        weights = [(op, self.weights[f"{stem}.{suffix}"]) for op, suffix in (("mul", "weight"), ("add", "bias"))
                   if f"{stem}.{suffix}" in self.weights]  # fmt: skip
        if not weights:
            return node
        node = Node("rms_norm", node.shape, (node,), place=self.place)
        node.forced = forced
        for op, weight in weights:
            node = Node(op, node.shape, (node, self.weight(weight)))
        return node

    def linear(self, stem: str, node: Node) -> Node:
        weight = self.weights.get(f"{stem}.weight")
        if weight is None or len(weight.shape) < 2:  # not as in any model that is known
            return node
        node = Node("mul_mat", (weight.n_rows, *node.shape[1:]), (self.weight(weight), node))
        return self.more(stem, node, "add")

    def more(self, stem: str, node: Node, add: str, *sources: Node) -> Node:
        """Apply the scale and the bias that a matrix may come with."""
        if f"{stem}.scale" in self.weights:
            node = Node("mul", node.shape, (node, self.weight(self.weights[f"{stem}.scale"])))
        if f"{stem}.bias" in self.weights:
            node = Node(add, node.shape, (node, self.weight(self.weights[f"{stem}.bias"]), *sources))
        return node

    # --- attention

    def attention(self, node: Node) -> Node:
        n, layer = self.n, self.layer
        key_width, value_width, n_heads_kv = layer.key_width, layer.value_width, layer.n_heads_kv
        if self.has("attn_qkv"):
            qkv = self.linear("attn_qkv", node)
            n_query = qkv.shape[0] - (key_width + value_width) * n_heads_kv
            q = self.view(qkv, key_width, n_query // key_width, n, strided=True)
            k = self.view(qkv, key_width, n_heads_kv, n, strided=True)
            v = self.view(qkv, value_width, n_heads_kv, n, strided=True)
        else:
            q = self.linear("attn_q", node)
            q = self.view(q, key_width, q.shape[0] // key_width, n)
            # Layers that share the cache of an earlier one have none of these.
            k, v = q, q
            if self.has("attn_k"):
                k = self.view(self.linear("attn_k", node), key_width, n_heads_kv, n)
                v = self.view(self.linear("attn_v", node), value_width, n_heads_kv, n) if self.has("attn_v") else k
        q = self.rope(self.norm(q, "attn_q_norm"))
        if self.has("attn_k") or self.has("attn_qkv"):
            k = self.rope(self.norm(k, "attn_k_norm"))
        return self.attend(q, k, v, value_width)

    def rope(self, node: Node) -> Node:
        factors = []
        if self.frequencies is not None:
            # There once on each device.
            table = self.tables.setdefault(self.layer.device, Node("table", self.frequencies.shape))
            table.device = self.layer.device
            factors = [table]
        return Node("rope", node.shape, (node, self.inputs["positions"], *factors))

    def turn(self, node: Node, part: str) -> Node:
        matrix = self.inputs.get(f"turn_{part}_window" if self.layer.window else f"turn_{part}")
        if matrix is None:
            return node
        shape = (matrix.shape[0], prod(node.shape) // matrix.shape[0])
        flat = Node("cont", shape, (node,)) if node.strided else self.view(node, *shape)
        return self.view(Node("mul_mat", shape, (matrix, flat)), *node.shape)

    def attend(self, q: Node, k: Node, v: Node | None, value_width: int) -> Node:
        """Store keys and values, and attend; without ``v`` the values are the first part of the keys."""
        n, suffix = self.n, "_window" if self.layer.window else ""
        if v is not None:
            q, k, v = self.turn(q, "k"), self.turn(k, "k"), self.turn(v, "v")
        # The values come last where some layers have a window.
        for node in (q, k, v) if "mask_window" in self.inputs else (q, v, k):
            if node is not None:
                self.expand(node)
        cache_k, cache_v = (Node("cache", (0,), n_bytes=0, place=self.place) for _ in range(2))
        stored = [(cache_k, k, "k")] + ([(cache_v, v, "v")] if v is not None else [])
        for cache, node, part in stored:
            flat = self.view(node, prod(node.shape[:2]), n)
            indices = self.inputs[f"{part}_indices{suffix}"]
            self.expand(Node("set_rows", (0,), (flat, indices, cache), base=cache, n_bytes=0))
        key_width, n_heads = q.shape[:2]
        query = self.view(self.view(q, key_width, n_heads, n), key_width, n, n_heads, strided=True)
        keys = self.view(self.view(cache_k, 0), 0, strided=True)
        values = self.view(self.view(cache_k if v is None else cache_v, 0), 0, strided=True)
        # As much would be copied to compute elsewhere.
        keys.n_bytes, values.n_bytes = self.layer.key_bytes, self.layer.value_bytes
        sources = [query, keys, values, self.inputs[f"mask{suffix}"]]
        if "attn_sinks.weight" in self.weights:
            sources.append(self.weight(self.weights["attn_sinks.weight"]))
        out = Node("flash_attn", (value_width, n_heads, n), sources)
        if self.has("attn_v_b"):
            weight = self.weights["attn_v_b.weight"]
            permuted = self.view(out, value_width, n, n_heads, strided=True)
            out = Node("mul_mat", (weight.n_rows, n, n_heads), (self.weight(weight), permuted))
            out = Node("cont", (weight.n_rows, n_heads, n), (self.view(out, 0, strided=True),))
        out = self.view(out, prod(out.shape[:2]), n)
        self.expand(out)
        out = self.turn(out, "v") if v is not None else out
        return self.norm(out, "attn_sub_norm")

    def latent_attention(self, node: Node) -> Node:
        """Attend over one latent head, as deepseek2 does."""
        n = self.n
        down, up = self.weights["attn_kv_a_mqa.weight"], self.weights["attn_k_b.weight"]
        rank, n_heads = up.n_rows, up.shape[2] if len(up.shape) > 2 else 1
        rope_width = down.n_rows - rank
        if self.has("attn_q_a"):
            q = self.linear("attn_q_b", self.norm(self.linear("attn_q_a", node), "attn_q_a_norm"))
        else:
            q = self.linear("attn_q", node)
        q = self.view(q, q.shape[0] // n_heads, n_heads, n)
        compressed = self.linear("attn_kv_a_mqa", node)
        k_rope = self.rope(self.view(compressed, rope_width, 1, n, strided=True))
        latent = self.norm(self.view(compressed, rank, n, strided=True), "attn_kv_a_norm")
        q_rope = self.rope(self.view(q, rope_width, n_heads, n, strided=True))
        q_plain = self.view(self.view(q, up.shape[0], n_heads, n, strided=True), up.shape[0], n, n_heads, strided=True)
        absorbed = self.view(
            Node("mul_mat", (rank, n, n_heads), (self.weight(up), q_plain)), rank, n_heads, n, strided=True
        )
        query = Node("concat", (rank + rope_width, n_heads, n), (absorbed, q_rope))
        key = Node("concat", (rank + rope_width, 1, n), (self.view(latent, rank, 1, n), k_rope))
        return self.attend(query, key, None, rank)

    def recurrence(self, node: Node) -> Node:
        """Mix tokens by a state; only roughly, since every architecture has its own way."""
        used = [name for name in self.weights if name.startswith(("ssm_", "time_mix_", "shortconv."))]
        matrices = [name for name in used if len(self.weights[name].shape) > 1]
        cache = Node("cache", (0,), n_bytes=0, place=self.place)
        for place, name in enumerate(used):
            if name in matrices and name == matrices[-1]:
                node = Node("set_rows", node.shape, (node, cache))
                self.expand(Node("set_rows", (0,), (node, self.inputs["k_indices"], cache), base=cache, n_bytes=0))
            weight = self.weights[name]
            width = weight.n_rows if name in matrices else node.shape[0]
            node = Node("mul_mat" if name in matrices else "mul", (width, self.n), (self.weight(weight), node))
            if place == 0:
                self.expand(node)
        return node

    # --- feed-forward

    def feed_forward(self, node: Node, suffix: str = "") -> Node:
        hidden = up = self.linear(f"ffn_up{suffix}", node)
        if self.has(f"ffn_gate{suffix}"):
            gate = self.linear(f"ffn_gate{suffix}", node)
            hidden = Node("glu", gate.shape, (gate, up))
        elif self.weights[f"ffn_down{suffix}.weight"].shape[0] * 2 == up.shape[0]:
            hidden = Node("glu", (up.shape[0] // 2, *up.shape[1:]), (up,))
        else:
            hidden = Node("unary", up.shape, (up,))
        return self.linear(f"ffn_down{suffix}", hidden)

    def experts(self, node: Node, n_used: int, router: str) -> Node:
        """Let the chosen experts work; the router's options differ in operations of a few numbers only."""
        n, width = self.n, node.shape[0]
        logits = self.linear("ffn_gate_inp", node)
        n_experts = logits.shape[0]
        softmax_last = router == "softmax of the chosen"
        probabilities = logits if softmax_last else Node("unary", logits.shape, (logits,))
        choice = probabilities
        if "exp_probs_b.bias" in self.weights:
            choice = Node("add", choice.shape, (choice, self.weight(self.weights["exp_probs_b.bias"])))
        sort = Node("argsort", (n_experts, n), (choice,))
        chosen = self.view(sort, n_used, n, strided=True)
        weights = Node("get_rows", (1, n_used, n), (self.view(probabilities, 1, n_experts, n), chosen))
        flat = self.view(weights, n_used, n)
        if softmax_last:
            weights = self.view(Node("soft_max", flat.shape, (flat,)), 1, n_used, n)
        elif router == "normalised":
            total = Node("clamp", (1, n), (Node("sum_rows", (1, n), (flat,)),))
            weights = self.view(Node("div", flat.shape, (flat, total)), 1, n_used, n)
            weights = Node("scale", weights.shape, (weights,))
        self.expand(weights)
        spread = self.view(node, width, 1, n)

        def work(stem: str, source: Node) -> Node:
            weight = self.weights[f"{stem}.weight"]
            out = Node("mul_mat_id", (weight.n_rows, n_used, n), (self.weight(weight), source, chosen))
            return self.more(stem, out, "add_id", chosen)

        if self.has("ffn_gate_up_exps"):
            both = work("ffn_gate_up_exps", spread)
            half = (both.shape[0] // 2, n_used, n)
            hidden = Node("glu", half, (self.view(both, *half, strided=True), self.view(both, *half, strided=True)))
        else:
            up = work("ffn_up_exps", spread)
            gate = work("ffn_gate_exps", spread) if self.has("ffn_gate_exps") else None
            hidden = Node("unary", up.shape, (up,)) if gate is None else Node("glu", gate.shape, (gate, up))
        out = work("ffn_down_exps", hidden)
        out = Node("mul", out.shape, (out, weights))
        self.expand(out)
        parts = [self.view(out, width, n, strided=True) for _ in range(n_used)]
        for part in parts:
            self.expand(part)
        total = parts[0]
        for part in parts[1:]:
            total = Node("add", (width, n), (total, part))
            self.expand(total)
        return total if n_used > 1 else Node("cont", (width, n), (total,))

    def feed(self, node: Node, n_used: int, router: str) -> Node:
        ways = [suffix for suffix in ("_shexp", "") if self.has(f"ffn_up{suffix}") and self.has(f"ffn_down{suffix}")]
        has_experts = self.has("ffn_down_exps") and (self.has("ffn_up_exps") or self.has("ffn_gate_up_exps"))
        if not (self.has("ffn_gate_inp") and has_experts):
            return self.feed_forward(node, ways[0]) if ways else node
        total = self.experts(node, max(n_used, 1), router)
        for suffix in ways[:1]:
            total = Node("add", total.shape, (total, self.feed_forward(node, suffix)))
        return total

    def build(self, node: Node, *, trim: bool) -> Node:
        """Return the output of the layer; ``trim`` leaves only the tokens whose logits are wanted."""
        before = node
        node = self.norm(node, "attn_norm")
        if self.has("attn_kv_a_mqa") and self.has("attn_k_b"):
            node = self.latent_attention(node)
        elif self.layer.key_width and (self.has("attn_q") or self.has("attn_qkv")):
            node = self.attention(node)
        else:
            node = self.recurrence(node)
        if self.has("attn_output"):
            node = self.linear("attn_output", node)
        gpt_oss = norms_after_sum(self.weights)
        if not gpt_oss:
            # Gemma's comes before the sum; others call the norm after the sum so.
            if trim:
                node = Node("get_rows", (node.shape[0], 1), (node, self.inputs["out_ids"]))
                before = Node("get_rows", (before.shape[0], 1), (before, self.inputs["out_ids"]))
                self.n = 1
            node = self.norm(node, "post_attention_norm")
        summed = Node("add", before.shape, (node, before))
        node = self.norm(summed, "post_attention_norm" if gpt_oss else "ffn_norm")
        node = self.feed(node, self.layer.n_used, self.layer.router)
        node = self.norm(node, "post_ffw_norm", forced=False)
        return Node("add", summed.shape, (node, summed))
