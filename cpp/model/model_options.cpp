#include "model/model_options.h"

#include "base/check_range.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <variant>

namespace overspill {

llama_load_mode llama_load_mode_of(LoadMode mode) {
    switch (mode) {
        case LoadMode::read: return LLAMA_LOAD_MODE_NONE;
        case LoadMode::mlock: return LLAMA_LOAD_MODE_MLOCK;
        case LoadMode::mmap_mlock: return LLAMA_LOAD_MODE_MMAP_MLOCK;
        case LoadMode::direct_io: return LLAMA_LOAD_MODE_DIRECT_IO;
        default: return LLAMA_LOAD_MODE_MMAP;
    }
}

llama_flash_attn_type llama_flash_attention_of(Switch flash_attention) {
    switch (flash_attention) {
        case Switch::on: return LLAMA_FLASH_ATTN_TYPE_ENABLED;
        case Switch::off: return LLAMA_FLASH_ATTN_TYPE_DISABLED;
        default: return LLAMA_FLASH_ATTN_TYPE_AUTO;
    }
}

ggml_type ggml_type_of(CacheType type) {
    switch (type) {
        case CacheType::f32: return GGML_TYPE_F32;
        case CacheType::bf16: return GGML_TYPE_BF16;
        case CacheType::q8_0: return GGML_TYPE_Q8_0;
        case CacheType::q5_1: return GGML_TYPE_Q5_1;
        case CacheType::q5_0: return GGML_TYPE_Q5_0;
        case CacheType::q4_1: return GGML_TYPE_Q4_1;
        case CacheType::q4_0: return GGML_TYPE_Q4_0;
        case CacheType::iq4_nl: return GGML_TYPE_IQ4_NL;
        default: return GGML_TYPE_F16;
    }
}

const ProductSet * product_set_of(CpuKernels kernels) {
    return kernels == CpuKernels::llama_cpp ? nullptr : product_set();
}

namespace {

template <size_t N>
void copy_text(char (&to)[N], const std::string & text, const std::string & what) {
    if (text.size() >= N) {
        throw std::invalid_argument("overrides: " + what + " must have at most " + std::to_string(N - 1) +
                                    " bytes, not " + std::to_string(text.size()));
    }
    text.copy(to, text.size());
}

}  // namespace

std::vector<llama_model_kv_override> llama_overrides_of(const MetadataOverrides & overrides) {
    std::vector<llama_model_kv_override> found;
    for (const auto & [key, value] : overrides) {
        llama_model_kv_override one = {};
        copy_text(one.key, key, "a key");
        if (const auto * flag = std::get_if<bool>(&value)) {
            one.tag = LLAMA_KV_OVERRIDE_TYPE_BOOL;
            one.val_bool = *flag;
        } else if (const auto * number = std::get_if<int64_t>(&value)) {
            one.tag = LLAMA_KV_OVERRIDE_TYPE_INT;
            one.val_i64 = *number;
        } else if (const auto * fraction = std::get_if<double>(&value)) {
            one.tag = LLAMA_KV_OVERRIDE_TYPE_FLOAT;
            one.val_f64 = *fraction;
        } else {
            one.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
            copy_text(one.val_str, std::get<std::string>(value), "the value of " + key);
        }
        found.push_back(one);
    }
    found.emplace_back();
    return found;
}

void check(ModelOptions & options) {
    check_range("n_batch", options.n_batch, uint32_t{1}, uint32_t{65536});
    check_range("n_parallel", options.n_parallel, uint32_t{0}, uint32_t{256});
    check_range("max_pause_s", options.max_pause_s, 0.001, 3600.0);
    check_range("n_threads", options.n_threads, int32_t{1}, int32_t{GGML_MAX_N_THREADS});
    check_range("n_gpu_layers", options.placement.n_gpu_layers, int32_t{-1}, std::numeric_limits<int32_t>::max());
    options.n_ubatch = options.n_ubatch == 0 ? options.n_batch : options.n_ubatch;
    check_range("n_ubatch", options.n_ubatch, uint32_t{1}, options.n_batch);
    check_range("offload_min_batch", options.offload_min_batch, int32_t{0}, int32_t{65536});
    const ggml_type type_v = ggml_type_of(options.type_v);
    if (ggml_is_quantized(type_v) && options.flash_attention == Switch::off) {
        throw std::invalid_argument("type_v: " + std::string(ggml_type_name(type_v)) +
                                    " needs flash attention, which is off");
    }
}

}  // namespace overspill
