// How much memory a model and one context of it take, and where their tensors are.
#pragma once

#include "device/pinned_weights.h"

#include <llama.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace overspill {

struct MemoryUse {
    size_t weights_bytes = 0;
    size_t kv_bytes = 0;
    size_t compute_bytes = 0;
};

// What llama.cpp says of a model and one context of it.
struct MemoryReport {
    struct Tensor {
        std::string name;
        std::string device;
        std::string buffer_type;
        size_t n_bytes;
    };
    struct LayerCache {
        int32_t layer;
        std::string device;
        size_t n_bytes;
    };
    std::map<std::string, MemoryUse> devices = {};  // "CPU" stands for all host memory
    std::vector<Tensor> tensors = {};               // those that decoding uses; none after a dry run
    std::vector<LayerCache> kv = {};                // the same
    int32_t n_splits = 0;                           // parts of the graph of one token that run on one device
};

// `n_tokens` and `n_outputs` are those of its largest ubatch. The context must be at rest.
MemoryReport report_memory(llama_context & context, uint32_t n_tokens, uint32_t n_outputs, bool dry_run);

// Weights that are mapped from files and that operations read as a whole; what is only looked up row by row is none of
// them. The same.
std::vector<MappedTensor> mapped_weights(llama_context & context, uint32_t n_tokens, uint32_t n_outputs);

}  // namespace overspill
