#include "model/placement.h"

#include "base/error.h"
#include "device/devices.h"
#include "device/weights.h"
#include "gguf/gguf_file.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>

#include <algorithm>
#include <regex>
#include <set>
#include <tuple>

namespace overspill {

namespace {

bool is_cpu(ggml_backend_dev_t device) {
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

// Whether the device can compute with a matrix of its own memory as llama.cpp's graphs do. The loader asks the same,
// but not where an override decides.
bool can_use(ggml_backend_dev_t device, const GgufTensor & tensor) {
    if (tensor.shape.size() < 2 || (tensor.shape.size() == 2 && tensor.shape[1] == 1)) {
        return true;  // vectors are F32, which everything can add and multiply
    }
    const ggml_type type = type_named(tensor.type);
    if (type == GGML_TYPE_COUNT) {
        return true;  // the loader will say what it thinks of that
    }
    const ggml_context_ptr context(ggml_init({ggml_tensor_overhead() * 8, nullptr, /*no_alloc =*/true}));
    ggml_tensor * weights =
        ggml_new_tensor(context.get(), type, static_cast<int>(tensor.shape.size()), tensor.shape.data());
    const ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device), 0));
    weights->buffer = buffer.get();
    ggml_tensor * operation = nullptr;
    if (tensor.name.rfind("token_embd", 0) == 0) {
        operation = ggml_get_rows(context.get(), weights, ggml_new_tensor_1d(context.get(), GGML_TYPE_I32, 1));
    } else if (tensor.shape.size() == 3 && tensor.name.find("_exps") != std::string::npos) {
        operation = ggml_mul_mat_id(context.get(), weights,
                                    ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, weights->ne[0], 1, 1),
                                    ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, 1, 1));
    } else {
        operation = ggml_mul_mat(
            context.get(), weights,
            ggml_new_tensor_4d(context.get(), GGML_TYPE_F32, weights->ne[0], 1, weights->ne[2], weights->ne[3]));
    }
    return ggml_backend_dev_supports_op(device, operation);
}

}  // namespace

PlacementParams::PlacementParams(const GgufHeader & header, const Placement & placement)
    : tensor_split_(llama_max_devices()), n_gpu_layers_(placement.n_gpu_layers) {
    if (placement.tensor_split.size() > placement.devices.size() || placement.devices.size() > tensor_split_.size()) {
        throw std::invalid_argument("placement: tensor_split has " + std::to_string(placement.tensor_split.size()) +
                                    " entries for " + std::to_string(placement.devices.size()) + " devices, of which " +
                                    std::to_string(tensor_split_.size()) + " are possible");
    }
    if (placement.overrides.size() >= llama_max_tensor_buft_overrides()) {
        throw std::invalid_argument("placement: more than " + std::to_string(llama_max_tensor_buft_overrides() - 1) +
                                    " overrides");
    }
    std::copy(placement.tensor_split.begin(), placement.tensor_split.end(), tensor_split_.begin());
    for (const auto & name : placement.devices) {
        devices_.push_back(device_named(name));
        if (is_cpu(devices_.back())) {
            throw std::invalid_argument("placement: the CPU is no device to deal layers out to");
        }
    }
    devices_.push_back(nullptr);
    check_operations(header, placement);
    for (const auto & [pattern, name] : placement.overrides) {
        patterns_.push_back(pattern);
        ggml_backend_dev_t device = device_named(name);
        if (!is_cpu(device) && std::find(devices_.begin(), devices_.end(), device) == devices_.end()) {
            throw std::invalid_argument("placement: " + name + " has overrides, but is none of its devices");
        }
        // What the loader compares with is the CPU backend's own function, which may be in a plugin.
        overrides_.push_back({nullptr, ggml_backend_dev_buffer_type(device)});
    }
    for (size_t i = 0; i < patterns_.size(); ++i) {
        overrides_[i].pattern = patterns_[i].c_str();
    }
    overrides_.push_back({nullptr, nullptr});
}

void PlacementParams::check_operations(const GgufHeader & header, const Placement & placement) const {
    std::vector<std::pair<std::regex, ggml_backend_dev_t>> overrides;
    bool any_device = false;
    for (const auto & [pattern, name] : placement.overrides) {
        try {
            overrides.emplace_back(std::regex(pattern), device_named(name));
        } catch (const std::regex_error & error) {
            throw std::invalid_argument("placement: " + pattern + " is no regular expression: " + error.what());
        }
        any_device = any_device || !is_cpu(overrides.back().second);
    }
    if (!any_device) {
        return;
    }
    // Layers are alike: what was asked once need not be asked again.
    std::set<std::tuple<ggml_backend_dev_t, std::string, std::vector<int64_t>, bool>> asked;
    const GgufFile file = read_gguf(header);
    for (const auto & tensor : file.tensors) {
        const auto found = std::find_if(overrides.begin(), overrides.end(),
                                        [&](const auto & one) { return std::regex_search(tensor.name, one.first); });
        if (found == overrides.end() || is_cpu(found->second)) {
            continue;
        }
        const bool is_embedding = tensor.name.rfind("token_embd", 0) == 0;
        if (asked.emplace(found->second, tensor.type, tensor.shape, is_embedding).second &&
            !can_use(found->second, tensor)) {
            throw std::invalid_argument("placement: " + std::string(ggml_backend_dev_name(found->second)) +
                                        " cannot compute with " + tensor.name + " of type " + tensor.type +
                                        "; leave it on the CPU");
        }
    }
}

void PlacementParams::apply(llama_model_params & params) {
    params.devices = devices_.data();
    params.tensor_split = tensor_split_.data();
    params.n_gpu_layers = n_gpu_layers_;
    if (overrides_.size() > 1) {
        params.tensor_buft_overrides = overrides_.data();
    }
}

}  // namespace overspill
