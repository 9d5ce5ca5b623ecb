// Weights as a device sees them: their types, the operation that reads them, and the buffers that they are put into.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <cstdint>
#include <string>
#include <vector>

namespace overspill {

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

// Whether llama.cpp's layouts for the CPU's products, repacked or for AMX, are worth their copies: without our
// products, or with AMX, which is faster than both.
bool wants_extra_buffers(bool has_our_products);

// The types of weights that a model on the CPU alone multiplies with our products, with the settings that it has by
// default.
std::vector<ggml_type> types_of_our_products();

// The buffer in which llama.cpp's loader puts these weights of a device: the first that it looks at which supports
// the operation; null if none does. For the CPU it depends on the GPUs beside it: their pinned host memory comes
// before repacked layouts, unless `host_buffers` is off (llama.cpp's no_host). Without `extra_buffers` it has no such
// layouts.
ggml_backend_buffer_type_t weight_buffer_type(const WeightUse & use, ggml_backend_dev_t device,
                                              const std::vector<ggml_backend_dev_t> & gpus, bool host_buffers,
                                              bool extra_buffers);

}  // namespace overspill
