// A cache of experts in the memory of GPUs, beside a model whose experts are all in RAM.
//
// A GPU computes the experts of a token that are resident there, the CPU meanwhile the others, and the CPU adds them up
// in the order in which they were chosen. What is resident changes between tokens only: experts that a token missed are
// copied in the background while the next ones are computed. Unless it is trusted, a few tokens are decoded without it
// once it is full, in turn with others; if they were faster, it is not used any more. Where tokens do not come back to
// experts, it holds all experts of some layers.
#pragma once

#include "product/expert_device.h"
#include "product/products.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace overspill {

struct ExpertPool {
    std::string device;
    size_t n_bytes;
};

// The experts of each layer that were worth having, by the layer's number; of a layer the best last.
using ExpertProfile = std::map<int32_t, std::vector<uint16_t>>;

struct ExpertCacheOptions {
    std::vector<ExpertPool> pools = {};
    size_t most_insertions = 0;  // of a token; 0: as many as take a small part of its time
    ExpertProfile profile = {};  // what to begin with
    bool is_trusted = false;     // not to be compared with doing without it
    double worth = 1.0;          // otherwise it is used if a token takes less than so much of its time without
};

// Of all tokens since the model was loaded that were decoded one at a time with the cache; the bytes are those of the
// experts' weights.
struct ExpertCounts {
    uint64_t n_tokens = 0;
    uint64_t n_requests = 0;
    uint64_t n_hits = 0;
    uint64_t n_insertions = 0;  // whatever was decoded
    uint64_t hit_bytes = 0;
    uint64_t miss_bytes = 0;
    // Now.
    uint64_t n_resident = 0;
    uint64_t n_slots = 0;
    uint64_t n_experts = 0;  // of all layers
    bool is_off = false;     // decoding was measured to be faster without
    bool is_proven = false;  // or with it; both are false if it was not measured
};

// Of one model; one thread at a time decodes with it.
class ExpertCache final : public ExpertDevice {
  public:
    // Takes the memory; what is put there is known when the first token has been decoded. Layers are given to the pools
    // in their order, in proportion to their bytes. `set` is for devices that compute with the CPU. Throws
    // std::invalid_argument or OutOfMemoryError. Keeps the weights alive, from which it copies.
    ExpertCache(ExpertCacheOptions options, const ProductSet * set, std::shared_ptr<const void> weights);
    ~ExpertCache() override;
    ExpertCache(const ExpertCache &) = delete;
    ExpertCache & operator=(const ExpertCache &) = delete;

    // A batch begins, and has ended; it counts if it was computed. If the device fails at its end, nothing is resident
    // from then on.
    void start(size_t n_tokens);
    void finish(bool computed, double seconds);

    // From any thread.
    ExpertCounts counts() const;
    // What is resident. Not while a token is computed.
    ExpertProfile profile() const;

    // For tests: from the next token on, other experts are resident, as many as there is room for, whichever the
    // number stands for.
    void shuffle(uint64_t seed);

    int32_t layer_of(const FeedForwardNodes & nodes) override;
    float * input() override;
    bool has(int32_t layer, int32_t expert) const override;
    void note(int32_t layer, const int32_t * experts, size_t n_tokens, size_t n_used) override;
    void launch(int32_t layer, const int32_t * experts, size_t n_used) override;
    const float * results() override;

  private:
    struct State;
    const std::shared_ptr<const void> weights_;
    const std::unique_ptr<State> state_;  // after what it copies from, so that it goes first
};

}  // namespace overspill
