// Graphs of llama.cpp in which our products take the place of the CPU backend's.
//
// The CPU backend computes them, with its threads, like any other: a product of weights in RAM is a custom operation of
// two stages there. The first puts the activations in order, once for all products of them; the second multiplies.
#pragma once

#include "product/products.h"

#include <ggml-cpu.h>
#include <ggml.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>

namespace overspill {

// Of one context, which computes one graph at a time.
class ProductGraphs {
  public:
    // How the CPU backend quantizes activations to a type.
    using Quantize = ggml_from_float_t (*)(ggml_type type);

    ProductGraphs(const ProductSet & set, Quantize quantize);
    ~ProductGraphs();
    ProductGraphs(const ProductGraphs &) = delete;
    ProductGraphs & operator=(const ProductGraphs &) = delete;

    // What is to be computed in place of the graph: the graph itself if nothing is replaced. It is valid until the next
    // call. The results that others read are where they were, and written in the same order.
    ggml_cgraph * replace(ggml_cgraph * graph);

    // To be called when it has been computed.
    static void computed();

  private:
    class Graph;
    struct Scratches;

    const ProductSet & set_;
    const Quantize quantize_;
    const std::unique_ptr<Scratches> scratch_;
    // llama.cpp keeps the graph of a piece at the same address, with another number for every new one.
    std::unordered_map<const ggml_cgraph *, std::unique_ptr<Graph>> graphs_;
};

}  // namespace overspill
