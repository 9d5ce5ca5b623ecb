// What the threads of the CPU backend compute in place of a graph's products: stages, with a barrier after each.
#pragma once

#include "product/expert_device.h"
#include "product/expert_recorder.h"
#include "product/feed_forward.h"
#include "product/products.h"

#include <ggml-cpu.h>
#include <ggml.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace overspill {

// Tokens times experts of a token; products with more are llama.cpp's.
constexpr size_t most_routes = 4096;
// Those of a feed-forward in one piece.
constexpr int64_t most_routes_of_feed_forward = 256;

struct AlignedDelete {
    void operator()(uint8_t * p) const { ::operator delete[](p, std::align_val_t{activation_alignment}); }
};

// Memory for activations in order, used by one product after the other.
struct Scratch {
    size_t n_bytes = 0;
    int last_use = -1;
    std::unique_ptr<uint8_t[], AlignedDelete> bytes;
};

// Columns of activations, quantized and put in order for products of one type.
struct Ordered {
    const Products * products;
    ggml_from_float_t quantize;
    size_t column_bytes;
    Scratch * scratch = nullptr;

    uint8_t * column(int64_t c) const { return scratch->bytes.get() + static_cast<size_t>(c) * column_bytes; }
    // Writes activations of a column from `first` on, a multiple of every type's groups, and so many of them at most.
    void write(const float * x, int64_t n, int64_t c, int64_t first) const;
};

struct Ordering {
    const ggml_tensor * x;
    Ordered ordered;
    float * copy = nullptr;  // of x as it is, for another device; null: none
    int last_use;            // by the number of the node
    std::atomic<int64_t> next_part{0};
};

struct Product {
    const Products * products;
    const ggml_tensor * weights;
    const ggml_tensor * ids;  // null: one product for all columns
    Ordering * x;
    std::atomic<int64_t> next_part{0};
};

struct FeedForward {
    FeedForwardNodes nodes;
    Ordering * x;
    Ordered activated;
    void (*activate)(const ActivationRow & row) = nullptr;
    // Copies, since the result may be written where they are.
    std::vector<int32_t> experts;
    std::vector<float> routing_weights;
    // Of each group of activations of an expert, how many parts are computed: who computes the last quantizes them.
    size_t n_groups;
    std::unique_ptr<std::atomic<int64_t>[]> parts_done;
    std::atomic<int64_t> next_part{0};
    std::atomic<int64_t> next_part_down{0};
    // Of experts on another device, if some may be there.
    ExpertDevice * device = nullptr;
    int32_t layer = -1;            // as the device numbers them
    bool is_of_one_token = false;  // the others' experts are only noted
    enum class Arrival { awaited, claimed, arrived, failed };
    std::atomic<Arrival> arrival{Arrival::awaited};
    const float * results = nullptr;  // when they have arrived
};

struct Recording {
    ExpertRecorder * recorder;
    size_t layer;
    const ggml_tensor * ids;
};

// To be called when all but the copies and counts is there.
void prepare(FeedForward & feed_forward);

// Before a graph is computed.
void start(Ordering & ordering);
void start(Product & product);
void start(FeedForward & feed_forward);

// The stages. The data of a custom operation are an Ordering, a Product, twice a FeedForward, and a Recording.
void order_stage(ggml_tensor * out, int ith, int nth, void * data);
void multiply_stage(ggml_tensor * out, int ith, int nth, void * data);
void activate_stage(ggml_tensor * out, int ith, int nth, void * data);
void project_down_stage(ggml_tensor * out, int ith, int nth, void * data);
void record_stage(ggml_tensor * out, int ith, int nth, void * data);

// llama.cpp's barriers are between what threads do here, and between that and whoever computes the graph.
// ThreadSanitizer does not see them, and is told.
void before_stage();
void after_stage();

}  // namespace overspill
