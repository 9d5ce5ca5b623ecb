#include "device/weights.h"

#include "device/devices.h"
#include "product/products.h"

#include <ggml-cpp.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace overspill {

namespace {

// In which buffers llama.cpp looks for room for weights on a device, the preferred one first, each with the device
// that has to support the operation.
std::vector<std::pair<ggml_backend_dev_t, ggml_backend_buffer_type_t>> weight_buffer_types(
    ggml_backend_dev_t device, const std::vector<ggml_backend_dev_t> & gpus, bool host_buffers, bool extra_buffers) {
    // llama-model.cpp: make_cpu_buft_list and make_gpu_buft_list.
    const bool is_cpu = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
    std::vector<std::pair<ggml_backend_dev_t, ggml_backend_buffer_type_t>> found;
    const auto add_extra = [&] {
        const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
        for (auto * types = extra != nullptr ? extra(device) : nullptr; types != nullptr && *types != nullptr;
             ++types) {
            found.emplace_back(device, *types);
        }
    };
    if (!is_cpu) {
        found.emplace_back(device, ggml_backend_dev_buffer_type(device));
        add_extra();
        return found;
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t other = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(other) == GGML_BACKEND_DEVICE_TYPE_ACCEL &&
            ggml_backend_dev_buffer_type(other) != ggml_backend_dev_buffer_type(device)) {
            found.emplace_back(other, ggml_backend_dev_buffer_type(other));
        }
    }
    for (size_t i = 0; host_buffers && i < gpus.size(); ++i) {
        if (ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(gpus[i]); pinned != nullptr) {
            found.emplace_back(gpus[i], pinned);
            break;
        }
    }
    if (extra_buffers) {
        add_extra();
    }
    found.emplace_back(device, ggml_backend_dev_buffer_type(device));
    return found;
}

}  // namespace

ggml_type type_named(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name(static_cast<ggml_type>(i));
        if (known != nullptr && name == known) {
            return static_cast<ggml_type>(i);
        }
    }
    return GGML_TYPE_COUNT;
}

ggml_type weight_type(const std::string & name) {
    const ggml_type type = type_named(name);
    // What cannot be read as floats are integers, or the types of intermediate results.
    if (type == GGML_TYPE_COUNT || (type != GGML_TYPE_F32 && ggml_get_type_traits(type)->to_float == nullptr)) {
        throw std::invalid_argument("type must be one that weights have, such as f16, q8_0 or mxfp4, not " + name);
    }
    return type;
}

ggml_tensor * WeightUse::weights(ggml_context * context) const {
    return n_experts == 0 ? ggml_new_tensor_2d(context, type, n_in, n_out)
                          : ggml_new_tensor_3d(context, type, n_in, n_out, n_experts);
}

ggml_tensor * WeightUse::input(ggml_context * context, int64_t n_tokens) const {
    return n_experts == 0 ? ggml_new_tensor_2d(context, GGML_TYPE_F32, n_in, n_tokens)
                          : ggml_new_tensor_3d(context, GGML_TYPE_F32, n_in, 1, n_tokens);
}

ggml_tensor * WeightUse::experts(ggml_context * context, int64_t n_tokens) const {
    return n_experts == 0 ? nullptr : ggml_new_tensor_2d(context, GGML_TYPE_I32, n_used, n_tokens);
}

ggml_tensor * WeightUse::product(ggml_context * context, ggml_tensor * weights, ggml_tensor * input,
                                 ggml_tensor * experts) {
    return experts == nullptr ? ggml_mul_mat(context, weights, input)
                              : ggml_mul_mat_id(context, weights, input, experts);
}

bool wants_extra_buffers(bool has_our_products) {
    const std::vector<std::string> features = cpu_features();
    return !has_our_products || std::find(features.begin(), features.end(), "AMX_INT8") != features.end();
}

std::vector<ggml_type> types_of_our_products() {
    std::vector<ggml_type> types;
    const ProductSet * set = product_set();
    for (size_t i = 0; set != nullptr && i < set->n_products; ++i) {
        const WeightUse use{set->products[i].weights, 256, 64};
        ggml_backend_buffer_type_t buffer_type =
            weight_buffer_type(use, cpu_device(), {}, /*host_buffers =*/true, wants_extra_buffers(true));
        // Of layouts for AMX, llama.cpp's are the products.
        if (buffer_type != nullptr && ggml_backend_buft_is_host(buffer_type)) {
            types.push_back(use.type);
        }
    }
    return types;
}

ggml_backend_buffer_type_t weight_buffer_type(const WeightUse & use, ggml_backend_dev_t device,
                                              const std::vector<ggml_backend_dev_t> & gpus, bool host_buffers,
                                              bool extra_buffers) {
    constexpr int64_t n_tokens = 512;  // llama-model-loader.cpp: weight_buft_supported
    for (const auto & [judge, buffer_type] : weight_buffer_types(device, gpus, host_buffers, extra_buffers)) {
        const ggml_context_ptr context(ggml_init({ggml_tensor_overhead() * 8, nullptr, /*no_alloc =*/true}));
        ggml_tensor * weights = use.weights(context.get());
        ggml_tensor * product = WeightUse::product(context.get(), weights, use.input(context.get(), n_tokens),
                                                   use.experts(context.get(), n_tokens));
        // Empty, since the answer depends on the type of the buffer only.
        const ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(buffer_type, 0));
        weights->buffer = empty.get();
        if (ggml_backend_dev_supports_op(judge, product)) {
            return buffer_type;
        }
    }
    return nullptr;
}

}  // namespace overspill
