// The feed-forward of a layer in a graph of llama.cpp: its products and all that is computed between and after them.
#pragma once

#include "product/products.h"

#include <ggml.h>

#include <cstdint>
#include <functional>
#include <optional>

namespace overspill {

// Products with rows of weights from `first_row` on, plus a bias for each row.
struct Projection {
    const ggml_tensor * node = nullptr;  // the product's; null: there is none
    const ggml_tensor * bias = nullptr;  // null: none
    int64_t first_row = 0;
    const Products * products = nullptr;
};

// down(activation(gate(x)) * up(x)), of one network for all tokens or of the experts that each token chose; then, with
// experts, their sum with the routing weights.
struct FeedForwardNodes {
    // Of its nodes, by number: all that are computed from the first to the last belong to it, and nothing else reads
    // what they give but the last one's.
    int first, last;
    Projection gate;  // what the activation is of
    Projection up;    // what it is multiplied with, if there is one
    Projection down;
    Activation activation;
    float alpha, limit;                   // of the activation
    const ggml_tensor * activated;        // (n_ff, experts of a token, tokens) or (n_ff, tokens)
    const ggml_tensor * ids;              // of the experts (of a token, tokens); null: one network
    const ggml_tensor * routing_weights;  // (1, experts of a token, tokens); null: none
    int64_t n_summed;                     // experts of a token; 0: no sum
    const ggml_tensor * out;
};

// The feed-forward whose last product is the node with that number. `products` says what computes a node's product,
// null: not ours. Nothing if the nodes around it are in another form.
std::optional<FeedForwardNodes> feed_forward_around(const ggml_cgraph & graph, int down,
                                                    const std::function<const Products *(int node)> & products);

bool is_product(const ggml_tensor & node);

// Whether it is in memory that the CPU can read.
bool is_in_ram(const ggml_tensor & tensor);
// Whether these are weights there.
bool are_weights_in_ram(const ggml_tensor & tensor);

}  // namespace overspill
