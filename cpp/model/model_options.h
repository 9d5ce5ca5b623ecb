// How a model is to be loaded.
#pragma once

#include "model/placement.h"

#include <ggml.h>
#include <llama.h>

#include <cstdint>
#include <functional>
#include <string>

namespace overspill {

struct ModelOptions {
    Placement placement = {};
    uint32_t n_ctx = 0;          // tokens; 0: what the model was trained for, at most 8192
    uint32_t n_batch = 512;      // 1 to 65536
    uint32_t n_ubatch = 0;       // tokens that are computed at once, 1 to n_batch; 0: n_batch
    int32_t n_threads = 1;       // 1 to 512
    std::string type_k = "f16";  // of the KV cache's keys: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl
    std::string type_v = "f16";  // of its values; quantized ones need flash attention
    std::string flash_attention = "auto";  // auto, on, off
    std::string load_mode = "mmap";        // mmap, read, mlock, mmap+mlock, direct-io
    // Weights on the CPU in the order that its matrix products like best: auto (not beside a GPU, which reads them for
    // large batches), on, off.
    std::string repack = "auto";
    bool vocab_only = false;
    bool check_tensors = false;
    // Only find out how much memory it would take: nothing is loaded, and it cannot generate.
    bool dry_run = false;
    // Given the share that is loaded, 0 to 1; false cancels. Called on the loading thread, must not throw.
    std::function<bool(float)> progress = {};
};

// Throws std::invalid_argument for an option out of range, and fills in n_ubatch.
void check(ModelOptions & options);

// In llama.cpp's terms, of options that were checked.
llama_load_mode load_mode_of(const ModelOptions & options);
llama_flash_attn_type flash_attention_of(const ModelOptions & options);
// `argument` is type_k or type_v. Throws std::invalid_argument.
ggml_type cache_type_of(const char * argument, const std::string & name);

}  // namespace overspill
