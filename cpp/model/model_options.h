// How a model is to be loaded.
#pragma once

#include "device/expert_cache.h"
#include "gguf/gguf_header.h"
#include "model/placement.h"
#include "product/products.h"

#include <ggml.h>
#include <llama.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace overspill {

enum class Switch { automatic, on, off };
enum class LoadMode { mmap, read, mlock, mmap_mlock, direct_io };
enum class CpuKernels { automatic, llama_cpp };
enum class CacheType { f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl };

struct ModelOptions {
    Placement placement = {};
    uint32_t n_ctx = 0;  // tokens; 0: what the model was trained for, at most 8192
    // Streams that are decoded together, up to 256, each with a KV cache of n_ctx tokens; 0: a cache for one of them,
    // and others as streams come, where memory is free.
    uint32_t n_parallel = 0;
    size_t prompt_cache_bytes = 0;      // of RAM, for sequences that lose their places
    double max_pause_s = 0.5;           // for which a prompt that is read may hold up other streams; over 0
    uint32_t n_batch = 512;             // 1 to 65536
    uint32_t n_ubatch = 0;              // tokens that are computed at once, 1 to n_batch; 0: n_batch
    int32_t n_threads = 1;              // 1 to 512
    bool adapt_threads = true;          // fewer of them decode while other programs have their cores
    CacheType type_k = CacheType::f16;  // of the KV cache's keys
    CacheType type_v = CacheType::f16;  // of its values; quantized ones need flash attention
    Switch flash_attention = Switch::automatic;
    LoadMode load_mode = LoadMode::mmap;
    // Weights on the CPU in the order that llama.cpp's matrix products like best; automatic: not beside a GPU, which
    // reads them for large batches, nor where our kernels read them as they are.
    Switch repack = Switch::automatic;
    // What multiplies weights in RAM with a few activations: ours where this CPU has them, or llama.cpp's. The
    // environment variable OVERSPILL_KERNELS=llama.cpp has the same effect.
    CpuKernels kernels = CpuKernels::automatic;
    // From how many tokens on a GPU takes over what weights in RAM are multiplied with, 1 to 65536; 0: as its backend
    // has it.
    int32_t offload_min_batch = 0;
    // Mapped weights in RAM are registered with the driver of a GPU of the placement, in the background.
    bool pin_weights = false;
    // A cache of the experts that are in RAM, with our kernels; without pools, none.
    ExpertCacheOptions experts = {};
    // The part of progress, 0 to 1, that is for reading mapped weights in RAM after loading; 0: they come when they are
    // used. Off Linux they do anyway.
    float share_of_reading = 0;
    // What the header is to say, in place of what the file does.
    MetadataOverrides metadata = {};
    bool vocab_only = false;
    bool check_tensors = false;
    // Only find out how much memory it would take: nothing is loaded, and it cannot generate.
    bool dry_run = false;
    // Given the share that is loaded, 0 to 1; false cancels. Called on the loading thread, must not throw.
    std::function<bool(float)> progress = {};
};

// Throws std::invalid_argument for an option out of range, and fills in n_ubatch.
void check(ModelOptions & options);

// Those that the CPU multiplies with; null: llama.cpp's.
const ProductSet * product_set_of(CpuKernels kernels);

// In llama.cpp's terms.
llama_load_mode llama_load_mode_of(LoadMode mode);
llama_flash_attn_type llama_flash_attention_of(Switch flash_attention);
ggml_type ggml_type_of(CacheType type);
// The last one is empty, as llama.cpp wants it. Throws std::invalid_argument for a text that it has no room for.
std::vector<llama_model_kv_override> llama_overrides_of(const MetadataOverrides & overrides);

}  // namespace overspill
