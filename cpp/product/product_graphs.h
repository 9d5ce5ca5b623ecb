// Graphs of llama.cpp in which our products take the place of the CPU backend's.
//
// The CPU backend computes them, with its threads, like any other, as custom operations. One puts activations in order,
// for all products of them. Then there is one for a product, or two for a whole feed-forward: the first has its gate,
// its activation and what the last product's weights need of them; the second has that product and the sum over
// experts. Where experts are recorded, one more copies their numbers, whoever computes their products.
#pragma once

#include "product/expert_device.h"
#include "product/expert_recorder.h"
#include "product/products.h"

#include <ggml-cpu.h>
#include <ggml.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace overspill {

// Of one context, which computes one graph at a time.
class ProductGraphs {
  public:
    // How the CPU backend quantizes activations to a type.
    using Quantize = ggml_from_float_t (*)(ggml_type type);

    // Without a set all products are llama.cpp's.
    ProductGraphs(const ProductSet * set, Quantize quantize);
    ~ProductGraphs();
    ProductGraphs(const ProductGraphs &) = delete;
    ProductGraphs & operator=(const ProductGraphs &) = delete;

    // From the next graph on; null: nowhere. Not while one is computed.
    void record(ExpertRecorder * recorder) { recorder_ = recorder; }

    // A device that has some of the experts; null: none. Before the first graph.
    void share(ExpertDevice * device) { device_ = device; }

    // Whether graphs are changed at all.
    bool is_of_use() const { return set_ != nullptr || recorder_ != nullptr; }

    // What is to be computed in place of the graph: the graph itself if nothing is replaced. It is valid until the next
    // call. The results that others read are where they were, and written in the same order.
    ggml_cgraph * replace(ggml_cgraph * graph);

    // To be called when it has been computed.
    static void computed();

  private:
    class Graph;
    struct Scratches;
    // What takes the place of nodes of a graph.
    struct Tally {
        int n_feed_forwards, n_products;
        // Products of experts whose feed-forward has another form, and those that are left to llama.cpp.
        int n_routed, n_left;

        bool operator==(const Tally & other) const {
            return n_feed_forwards == other.n_feed_forwards && n_products == other.n_products &&
                   n_routed == other.n_routed && n_left == other.n_left;
        }
    };

    void log(const Tally & tally);

    const ProductSet * const set_;
    const Quantize quantize_;
    const std::unique_ptr<Scratches> scratch_;
    ExpertRecorder * recorder_ = nullptr;
    ExpertDevice * device_ = nullptr;
    // llama.cpp keeps the graph of a piece at the same address, with another number for every new one.
    std::unordered_map<const ggml_cgraph *, std::unique_ptr<Graph>> graphs_;
    std::vector<Tally> logged_;
};

}  // namespace overspill
