// The devices that llama.cpp computes on, and where it puts weights for them.
#pragma once

#include "base/error.h"

#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace overspill {

// Throws std::invalid_argument, which names the known ones.
ggml_backend_dev_t device_named(const std::string & name);

// Throws Error if the installation has none.
ggml_backend_dev_t cpu_device();

// A function of the CPU backend, asked for by name since that may be a plugin; null if it has none.
template <typename Function>
Function cpu_function(const char * name) {
    return reinterpret_cast<Function>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), name));
}

std::shared_ptr<ggml_threadpool> make_threadpool(int32_t n_threads);

// A type by its name in files; GGML_TYPE_COUNT if there is none.
ggml_type type_named(const std::string & name);

// The type of weights by its name, such as "q8_0". Throws std::invalid_argument for what no weights have.
ggml_type weight_type(const std::string & name);

// Weights and the operation that reads them: a product with one matrix, or with n_used of n_experts matrices.
struct WeightUse {
    ggml_type type;
    int64_t n_in;
    int64_t n_out;
    int64_t n_experts = 0;  // 0: one matrix for every token
    int64_t n_used = 0;

    ggml_tensor * weights(ggml_context * context) const;
    // What they are multiplied by, for `n_tokens`; and the numbers of the experts, null without experts.
    ggml_tensor * input(ggml_context * context, int64_t n_tokens) const;
    ggml_tensor * experts(ggml_context * context, int64_t n_tokens) const;
    static ggml_tensor * product(ggml_context * context, ggml_tensor * weights, ggml_tensor * input,
                                 ggml_tensor * experts);
};

// In which buffers llama.cpp looks for room for weights on a device, the preferred one first, each with the device
// that has to support the operation. For the CPU it depends on the GPUs beside it: their pinned host memory comes
// before repacked layouts, unless `host_buffers` is off (llama.cpp's no_host).
std::vector<std::pair<ggml_backend_dev_t, ggml_backend_buffer_type_t>> weight_buffer_types(
    ggml_backend_dev_t device, const std::vector<ggml_backend_dev_t> & gpus, bool host_buffers);

// The first of those that supports the operation, as llama.cpp's loader chooses; null if none does.
ggml_backend_buffer_type_t weight_buffer_type(const WeightUse & use, ggml_backend_dev_t device,
                                              const std::vector<ggml_backend_dev_t> & gpus, bool host_buffers);

}  // namespace overspill
