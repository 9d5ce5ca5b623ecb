// Experts in slots of a device's memory, and the graphs that compute them there.
#pragma once

#include "product/feed_forward.h"

#include <ggml-cpp.h>
#include <ggml.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace overspill {

// The matrices and biases of a layer's experts, in the order in which they are in a slot; null: there is none.
enum ExpertPart : size_t { gate, gate_bias, up, up_bias, down, down_bias, n_expert_parts };
using ExpertParts = std::array<const ggml_tensor *, n_expert_parts>;

ExpertParts expert_parts_of(const FeedForwardNodes & nodes);
// Of one expert.
size_t bytes_of(const ExpertParts & parts);

// What decides whether experts of two layers can be in the same slots, and be computed by the same graph.
struct ExpertForm {
    std::array<ggml_type, n_expert_parts> types;
    std::array<std::array<int64_t, 2>, n_expert_parts> shapes;
    std::array<int64_t, 2> first_rows;  // of gate and up
    bool is_merged;
    ggml_op op;
    std::array<int32_t, GGML_MAX_OP_PARAMS / sizeof(int32_t)> op_params;
    bool is_split;  // a gated activation of two tensors
    bool is_squared;
    size_t n_used;

    static ExpertForm of(const FeedForwardNodes & nodes);
    bool operator==(const ExpertForm & other) const;

    int64_t n_embd() const { return shapes[gate][0]; }
    int64_t n_ff() const { return shapes[down][0]; }
    int64_t n_out() const { return shapes[down][1]; }
};

// A graph that computes so many experts of a token.
struct ExpertLaunch {
    ggml_context_ptr context;
    ggml_cgraph * graph = nullptr;
    ggml_gallocr_ptr memory;
    ggml_tensor * result = nullptr;  // (n_out, experts)
};

// Slots for experts of one form.
class ExpertSlots {
  public:
    ExpertSlots(const ExpertForm & form, size_t n_slots) : form_(form), n_slots_(n_slots) {}

    size_t n_slots() const { return n_slots_; }
    // Takes memory of the buffer from `used_bytes` on, which it moves; `like` are a layer's. False if there is too
    // little.
    bool place(ggml_backend_buffer_t buffer, size_t & used_bytes, const ExpertParts & like);
    // Makes the graphs, which read the activations of a token and then the numbers of slots from a tensor. False if the
    // device has not got what it takes.
    bool build(ggml_backend_dev_t device, const ggml_tensor & input);
    // Of 1 expert, 2, ...
    const ExpertLaunch & launch(size_t n) const { return launches_[n - 1]; }
    // Copies an expert of a layer into a slot, with a backend of the device.
    void copy(ggml_backend_t backend, const ExpertParts & from, size_t expert, int32_t slot) const;

  private:
    ggml_tensor * project(ggml_context * context, ExpertPart weights, ggml_tensor * x, ggml_tensor * ids) const;
    ggml_tensor * activation(ggml_context * context, ggml_tensor * x, ggml_tensor * ids) const;

    const ExpertForm form_;
    const size_t n_slots_;
    ggml_context_ptr context_;
    std::array<ggml_tensor *, n_expert_parts> tensors_ = {};  // the last dimension is the slot
    std::vector<ExpertLaunch> launches_;
};

}  // namespace overspill
