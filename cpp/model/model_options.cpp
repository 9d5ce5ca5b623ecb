#include "model/model_options.h"

#include "base/error.h"

#include <limits>
#include <map>
#include <stdexcept>

namespace overspill {

namespace {

void check_switch(const char * argument, const std::string & value) {
    if (value != "auto" && value != "on" && value != "off") {
        throw std::invalid_argument(std::string(argument) + " must be one of auto, on, off, not " + value);
    }
}

}  // namespace

llama_load_mode load_mode_of(const ModelOptions & options) {
    static const std::map<std::string, llama_load_mode> modes = {
        {"mmap", LLAMA_LOAD_MODE_MMAP},           {"read", LLAMA_LOAD_MODE_NONE},
        {"mlock", LLAMA_LOAD_MODE_MLOCK},         {"mmap+mlock", LLAMA_LOAD_MODE_MMAP_MLOCK},
        {"direct-io", LLAMA_LOAD_MODE_DIRECT_IO},
    };
    const auto found = modes.find(options.load_mode);
    if (found == modes.end()) {
        throw std::invalid_argument("load_mode must be one of mmap, read, mlock, mmap+mlock, direct-io, not " +
                                    options.load_mode);
    }
    return found->second;
}

ggml_type cache_type_of(const char * argument, const std::string & name) {
    static const std::map<std::string, ggml_type> types = {
        {"f32", GGML_TYPE_F32},   {"f16", GGML_TYPE_F16},   {"bf16", GGML_TYPE_BF16},
        {"q8_0", GGML_TYPE_Q8_0}, {"q5_1", GGML_TYPE_Q5_1}, {"q5_0", GGML_TYPE_Q5_0},
        {"q4_1", GGML_TYPE_Q4_1}, {"q4_0", GGML_TYPE_Q4_0}, {"iq4_nl", GGML_TYPE_IQ4_NL},
    };
    const auto found = types.find(name);
    if (found == types.end()) {
        throw std::invalid_argument(std::string(argument) +
                                    " must be one of f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, not " +
                                    name);
    }
    return found->second;
}

llama_flash_attn_type flash_attention_of(const ModelOptions & options) {
    const std::string & name = options.flash_attention;
    return name == "auto" ? LLAMA_FLASH_ATTN_TYPE_AUTO
                          : (name == "on" ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED);
}

void check(ModelOptions & options) {
    check_range("n_batch", options.n_batch, uint32_t{1}, uint32_t{65536});
    check_range("n_threads", options.n_threads, int32_t{1}, int32_t{GGML_MAX_N_THREADS});
    check_range("n_gpu_layers", options.placement.n_gpu_layers, int32_t{-1}, std::numeric_limits<int32_t>::max());
    options.n_ubatch = options.n_ubatch == 0 ? options.n_batch : options.n_ubatch;
    check_range("n_ubatch", options.n_ubatch, uint32_t{1}, options.n_batch);
    load_mode_of(options);
    check_switch("flash_attention", options.flash_attention);
    check_switch("repack", options.repack);
    cache_type_of("type_k", options.type_k);
    if (ggml_is_quantized(cache_type_of("type_v", options.type_v)) && options.flash_attention == "off") {
        throw std::invalid_argument("type_v: " + options.type_v + " needs flash attention, which is off");
    }
}

}  // namespace overspill
