"""llama.cpp's graph of one step, in outline: which operation uses which weight.

Built as src/llama-graph.cpp and src/models/*.cpp build it. Operations of a model's own file that no weight tells of are
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from overspill.planning.graph.nodes import VIEW, GraphInputs, LayerShape, LayerWeights, Node, Step, Weight

__all__ = ["build_step"]


class _Builder:
    """Builds a step; the methods follow those of llm_graph_context."""

    def __init__(
        self, step: Step, inputs: GraphInputs, weight: Callable[[Weight], Node], frequencies: Weight | None
    ) -> None:
        self.step, self.n, self.weight, self.frequencies = step, step.n_tokens, weight, frequencies
        self.tables: dict[int, Node] = {}
        rows = {"tokens": 4, "positions": 4, "k_indices": 8, "v_indices": 8, "mask": 2 * inputs.n_cells}
        if inputs.n_cells_window is not None:
            rows |= {"k_indices_window": 8, "v_indices_window": 8, "mask_window": 2 * inputs.n_cells_window}
        self.inputs = {name: Node("input", (self.n,), n_bytes=size * self.n) for name, size in rows.items()}
        self.inputs["out_ids"] = Node("input", (1,), n_bytes=4)
        for part, width in (("k", inputs.turn_k), ("v", inputs.turn_v)):
            for suffix in ("", "_window")[: 1 if inputs.n_cells_window is None else 2]:
                if width:
                    self.inputs[f"turn_{part}{suffix}"] = Node("input", (width, width))
        self.layer: LayerWeights = {}
        self.shape = LayerShape(0, 0, 0, 0, 0, False, 0, "", 0)
        self.index = 0

    # --- operations

    def view(self, node: Node, *shape: int, strided: bool = False) -> Node:
        return Node(VIEW, shape, (node,), base=node.base or node, strided=strided or node.strided, n_bytes=0)

    def has(self, stem: str) -> bool:
        return f"{stem}.weight" in self.layer

    def norm(self, node: Node, stem: str, *, forced: bool = True) -> Node:
        weights = [(op, self.layer[f"{stem}.{suffix}"]) for op, suffix in (("mul", "weight"), ("add", "bias"))
                   if f"{stem}.{suffix}" in self.layer]  # fmt: skip
        if not weights:
            return node
        node = Node("rms_norm", node.shape, (node,))
        node.forced = self.index if forced else None
        for op, weight in weights:
            node = Node(op, node.shape, (node, self.weight(weight)))
        return node

    def linear(self, stem: str, node: Node) -> Node:
        weight = self.layer.get(f"{stem}.weight")
        if weight is None or len(weight.shape) < 2:  # not as in any model that is known
            return node
        node = Node("mul_mat", (weight.shape[1], *node.shape[1:]), (self.weight(weight), node))
        return self.more(stem, node, "add")

    def more(self, stem: str, node: Node, add: str, *sources: Node) -> Node:
        """Apply the scale and the bias that a matrix may come with."""
        if f"{stem}.scale" in self.layer:
            node = Node("mul", node.shape, (node, self.weight(self.layer[f"{stem}.scale"])))
        if f"{stem}.bias" in self.layer:
            node = Node(add, node.shape, (node, self.weight(self.layer[f"{stem}.bias"]), *sources))
        return node

    # --- attention

    def attention(self, node: Node) -> Node:
        n, shape = self.n, self.shape
        key_width, value_width, n_heads_kv = shape.key_width, shape.value_width, shape.n_heads_kv
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
            table = self.tables.setdefault(self.shape.device, Node("table", self.frequencies.shape))
            table.weight = self.index
            factors = [table]
        return Node("rope", node.shape, (node, self.inputs["positions"], *factors))

    def turn(self, node: Node, part: str) -> Node:
        matrix = self.inputs.get(f"turn_{part}_window" if self.shape.window else f"turn_{part}")
        if matrix is None:
            return node
        shape = (matrix.shape[0], prod(node.shape) // matrix.shape[0])
        flat = Node("cont", shape, (node,)) if node.strided else self.view(node, *shape)
        return self.view(Node("mul_mat", shape, (matrix, flat)), *node.shape)

    def attend(self, q: Node, k: Node, v: Node | None, value_width: int) -> Node:
        """Store keys and values, and attend; without ``v`` the values are the first part of the keys."""
        n, suffix = self.n, "_window" if self.shape.window else ""
        if v is not None:
            q, k, v = self.turn(q, "k"), self.turn(k, "k"), self.turn(v, "v")
        # The values come last where some layers have a window.
        for node in (q, k, v) if "mask_window" in self.inputs else (q, v, k):
            if node is not None:
                self.step.expand(node)
        cache_k, cache_v = (Node("cache", (0,), n_bytes=0) for _ in range(2))
        cache_k.weight = cache_v.weight = self.index
        stored = [(cache_k, k, "k")] + ([(cache_v, v, "v")] if v is not None else [])
        for cache, node, part in stored:
            flat = self.view(node, prod(node.shape[:2]), n)
            indices = self.inputs[f"{part}_indices{suffix}"]
            self.step.expand(Node("set_rows", (0,), (flat, indices, cache), base=cache, n_bytes=0))
        key_width, n_heads = q.shape[:2]
        query = self.view(self.view(q, key_width, n_heads, n), key_width, n, n_heads, strided=True)
        keys = self.view(self.view(cache_k, 0), 0, strided=True)
        values = self.view(self.view(cache_k if v is None else cache_v, 0), 0, strided=True)
        # As much would be copied to compute elsewhere.
        keys.n_bytes, values.n_bytes = self.shape.key_bytes, self.shape.value_bytes
        sources = [query, keys, values, self.inputs[f"mask{suffix}"]]
        if "attn_sinks.weight" in self.layer:
            sources.append(self.weight(self.layer["attn_sinks.weight"]))
        out = Node("flash_attn", (value_width, n_heads, n), sources)
        out.weight = self.index
        if self.has("attn_v_b"):
            weight = self.layer["attn_v_b.weight"]
            permuted = self.view(out, value_width, n, n_heads, strided=True)
            out = Node("mul_mat", (weight.shape[1], n, n_heads), (self.weight(weight), permuted))
            out = Node("cont", (weight.shape[1], n_heads, n), (self.view(out, 0, strided=True),))
        out = self.view(out, prod(out.shape[:2]), n)
        self.step.expand(out)
        out = self.turn(out, "v") if v is not None else out
        return self.norm(out, "attn_sub_norm")

    def latent_attention(self, node: Node) -> Node:
        """Attend over one latent head, as deepseek2 does."""
        n = self.n
        down, up = self.layer["attn_kv_a_mqa.weight"], self.layer["attn_k_b.weight"]
        rank, n_heads = up.shape[1], up.shape[2] if len(up.shape) > 2 else 1
        rope_width = down.shape[1] - rank
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
        used = [name for name in self.layer if name.startswith(("ssm_", "time_mix_", "shortconv."))]
        matrices = [name for name in used if len(self.layer[name].shape) > 1]
        cache = Node("cache", (0,), n_bytes=0)
        cache.weight = self.index
        for place, name in enumerate(used):
            if name in matrices and name == matrices[-1]:
                node = Node("set_rows", node.shape, (node, cache))
                self.step.expand(Node("set_rows", (0,), (node, self.inputs["k_indices"], cache), base=cache, n_bytes=0))
            weight = self.layer[name]
            width = weight.shape[1] if name in matrices else node.shape[0]
            node = Node("mul_mat" if name in matrices else "mul", (width, self.n), (self.weight(weight), node))
            if place == 0:
                self.step.expand(node)
        return node

    # --- feed-forward

    def feed_forward(self, node: Node, suffix: str = "") -> Node:
        hidden = up = self.linear(f"ffn_up{suffix}", node)
        if self.has(f"ffn_gate{suffix}"):
            gate = self.linear(f"ffn_gate{suffix}", node)
            hidden = Node("glu", gate.shape, (gate, up))
        elif self.layer[f"ffn_down{suffix}.weight"].shape[0] * 2 == up.shape[0]:
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
        if "exp_probs_b.bias" in self.layer:
            choice = Node("add", choice.shape, (choice, self.weight(self.layer["exp_probs_b.bias"])))
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
        self.step.expand(weights)
        spread = self.view(node, width, 1, n)

        def work(stem: str, source: Node) -> Node:
            weight = self.layer[f"{stem}.weight"]
            out = Node("mul_mat_id", (weight.shape[1], n_used, n), (self.weight(weight), source, chosen))
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
        self.step.expand(out)
        parts = [self.view(out, width, n, strided=True) for _ in range(n_used)]
        for part in parts:
            self.step.expand(part)
        total = parts[0]
        for part in parts[1:]:
            total = Node("add", (width, n), (total, part))
            self.step.expand(total)
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

    def block(self, index: int, weights: LayerWeights, shape: LayerShape, node: Node, *, trim: bool) -> Node:
        """Add a layer; ``trim`` leaves only the tokens whose logits are wanted."""
        self.index, self.layer, self.shape, before = index, weights, shape, node
        node = self.norm(node, "attn_norm")
        if self.has("attn_kv_a_mqa") and self.has("attn_k_b"):
            node = self.latent_attention(node)
        elif shape.key_width and (self.has("attn_q") or self.has("attn_qkv")):
            node = self.attention(node)
        else:
            node = self.recurrence(node)
        if self.has("attn_output"):
            node = self.linear("attn_output", node)
        gpt_oss = self.has("post_attention_norm") and not self.has("ffn_norm")
        if not gpt_oss:
            # Gemma's comes before the sum; others call the norm after the sum so.
            if trim:
                node = Node("get_rows", (node.shape[0], 1), (node, self.inputs["out_ids"]))
                before = Node("get_rows", (before.shape[0], 1), (before, self.inputs["out_ids"]))
                self.n = 1
            node = self.norm(node, "post_attention_norm")
        summed = Node("add", before.shape, (node, before))
        node = self.norm(summed, "post_attention_norm" if gpt_oss else "ffn_norm")
        node = self.feed(node, shape.n_used, shape.router)
        node = self.norm(node, "post_ffw_norm", forced=False)
        return Node("add", summed.shape, (node, summed))


def build_step(
    n_tokens: int,
    layers: Sequence[tuple[int, LayerWeights, LayerShape]],
    head: Mapping[str, Weight],
    inputs: GraphInputs,
    n_outputs: int = 1,
) -> Step:
    """Build the graph of a step over some layers.

    Parameters
    ----------
    n_tokens
        Tokens that are processed at once: 1 in decoding, ``n_ubatch`` in the worst case.
    layers
        Number, weights and shape of each.
    head
        The weights ``token_embd``, ``output_norm`` and ``output``; any may be missing.
    inputs
        Sizes of what else it is given.
    n_outputs
        Tokens whose logits are wanted.
    """
    step = Step(n_tokens)
    known: dict[str, Node] = {}

    def weight(of: Weight) -> Node:
        if of.name not in known:
            known[of.name] = node = Node("weight", of.shape, n_bytes=of.n_bytes)
            node.weight = of.name
        return known[of.name]

    build = _Builder(step, inputs, weight, head.get("rope_freqs"))
    node = None
    if "token_embd" in head:
        embedding = head["token_embd"]
        node = Node("get_rows", (embedding.shape[0], n_tokens), (weight(embedding), build.inputs["tokens"]))
        step.expand(node)
        # Given instead of tokens, it is reserved all the same.
        step.expand(Node("input", (embedding.shape[0], n_tokens)))
        if "scaled" in head:
            node = Node("scale", node.shape, (node,))
    else:
        first = layers[0][1]
        width = next((weight.shape[0] for name, weight in first.items() if name.endswith("norm.weight")), 1)
        node = Node("input", (width, n_tokens))
    for place, (index, weights, shape) in enumerate(layers):
        last = place == len(layers) - 1 and "output" in head
        gpt_oss = "post_attention_norm.weight" in weights and "ffn_norm.weight" not in weights
        node = build.block(index, weights, shape, node, trim=last and not gpt_oss)
        step.expand(node)
    if "output" in head:
        if build.n != n_outputs:
            node = Node("get_rows", (node.shape[0], n_outputs), (node, build.inputs["out_ids"]))
        build.layer = {"output_norm.weight": head["output_norm"]} if "output_norm" in head else {}
        node = build.norm(node, "output_norm", forced=False)
        node = Node("mul_mat", (head["output"].shape[1], n_outputs), (weight(head["output"]), node))
        step.expand(node)
    return step
