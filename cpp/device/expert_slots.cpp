#include "device/expert_slots.h"

#include "base/log.h"

#include <algorithm>
#include <iterator>
#include <string>

namespace overspill {

namespace {

bool is_bias(size_t part) {
    return part == gate_bias || part == up_bias || part == down_bias;
}

// Of one expert.
size_t bytes_of(const ggml_tensor & tensor, size_t part) {
    return is_bias(part) ? tensor.nb[1] : tensor.nb[2];
}

ggml_tensor * rows(ggml_context * context, ggml_tensor * y, int64_t first, int64_t n) {
    return ggml_view_3d(context, y, n, y->ne[1], y->ne[2], y->nb[1], y->nb[2], static_cast<size_t>(first) * y->nb[0]);
}

}  // namespace

ExpertParts expert_parts_of(const FeedForwardNodes & nodes) {
    ExpertParts parts = {};
    parts[gate] = nodes.gate.node->src[0];
    parts[gate_bias] = nodes.gate.bias;
    if (nodes.up.node != nullptr && nodes.up.node != nodes.gate.node) {
        parts[up] = nodes.up.node->src[0];
        parts[up_bias] = nodes.up.bias;
    }
    parts[down] = nodes.down.node->src[0];
    parts[down_bias] = nodes.down.bias;
    return parts;
}

size_t bytes_of(const ExpertParts & parts) {
    size_t n = 0;
    for (size_t part = 0; part < n_expert_parts; ++part) {
        n += parts[part] != nullptr ? bytes_of(*parts[part], part) : 0;
    }
    return n;
}

ExpertForm ExpertForm::of(const FeedForwardNodes & nodes) {
    ExpertForm form = {};
    const ExpertParts parts = expert_parts_of(nodes);
    for (size_t part = 0; part < n_expert_parts; ++part) {
        if (parts[part] != nullptr) {
            form.types[part] = parts[part]->type;
            form.shapes[part] = {parts[part]->ne[0], parts[part]->ne[1]};
        } else {
            form.types[part] = GGML_TYPE_COUNT;
        }
        if (is_bias(part)) {
            form.shapes[part][1] = 0;  // the number of experts
        }
    }
    form.first_rows = {nodes.gate.first_row, nodes.up.first_row};
    form.is_merged = nodes.up.node == nodes.gate.node;
    const ggml_tensor * activation = nodes.activated;
    form.is_squared = activation->op == GGML_OP_SQR;
    activation = form.is_squared ? activation->src[0] : activation;
    form.op = activation->op;
    std::copy(std::begin(activation->op_params), std::end(activation->op_params), form.op_params.begin());
    form.is_split = activation->op == GGML_OP_GLU && activation->src[1] != nullptr;
    form.n_used = static_cast<size_t>(nodes.ids->ne[0]);
    return form;
}

bool ExpertForm::operator==(const ExpertForm & other) const {
    return types == other.types && shapes == other.shapes && first_rows == other.first_rows &&
           is_merged == other.is_merged && op == other.op && op_params == other.op_params &&
           is_split == other.is_split && is_squared == other.is_squared && n_used == other.n_used;
}

bool ExpertSlots::place(ggml_backend_buffer_t buffer, size_t & used_bytes, const ExpertParts & like) {
    ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(buffer);
    const size_t alignment = ggml_backend_buft_get_alignment(type);
    context_.reset(ggml_init({ggml_tensor_overhead() * n_expert_parts, nullptr, true}));
    for (size_t part = 0; part < n_expert_parts; ++part) {
        const ggml_tensor * of = like[part];
        if (of == nullptr) {
            continue;
        }
        const auto n = static_cast<int64_t>(n_slots_);
        ggml_tensor * tensor = is_bias(part) ? ggml_new_tensor_2d(context_.get(), of->type, of->ne[0], n)
                                             : ggml_new_tensor_3d(context_.get(), of->type, of->ne[0], of->ne[1], n);
        const size_t n_bytes = ggml_backend_buft_get_alloc_size(type, tensor);
        if (used_bytes + n_bytes > ggml_backend_buffer_get_size(buffer) ||
            ggml_backend_tensor_alloc(buffer, tensor,
                                      static_cast<char *>(ggml_backend_buffer_get_base(buffer)) + used_bytes) !=
                GGML_STATUS_SUCCESS) {
            return false;
        }
        used_bytes += (n_bytes + alignment - 1) / alignment * alignment;
        tensors_[part] = tensor;
    }
    return true;
}

bool ExpertSlots::build(ggml_backend_dev_t device, const ggml_tensor & input) {
    constexpr size_t most_nodes = 32;
    const int64_t n_embd = form_.n_embd();
    for (size_t n = 1; n <= form_.n_used; ++n) {
        ExpertLaunch & launch = launches_.emplace_back();
        launch.context.reset(ggml_init(
            {ggml_tensor_overhead() * most_nodes + ggml_graph_overhead_custom(most_nodes, false), nullptr, true}));
        ggml_context * context = launch.context.get();
        const auto at = [&](ggml_tensor * tensor, size_t offset) {
            return ggml_backend_tensor_alloc(input.buffer, tensor, static_cast<char *>(input.data) + offset) ==
                   GGML_STATUS_SUCCESS;
        };
        ggml_tensor * x = ggml_new_tensor_3d(context, GGML_TYPE_F32, n_embd, 1, 1);
        ggml_tensor * ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, static_cast<int64_t>(n), 1);
        if (!at(x, 0) || !at(ids, static_cast<size_t>(n_embd) * sizeof(float))) {
            return false;
        }
        launch.result = project(context, down, activation(context, x, ids), ids);
        ggml_set_output(launch.result);
        launch.graph = ggml_new_graph_custom(context, most_nodes, false);
        ggml_build_forward_expand(launch.graph, launch.result);
        for (int i = 0; i < ggml_graph_n_nodes(launch.graph); ++i) {
            if (!ggml_backend_dev_supports_op(device, ggml_graph_node(launch.graph, i))) {
                add_to_log(LogLevel::warning, std::string(ggml_backend_dev_name(device)) +
                                                  " cannot compute these experts: none are cached there");
                return false;
            }
        }
        launch.memory.reset(ggml_gallocr_new(ggml_backend_dev_buffer_type(device)));
        if (!ggml_gallocr_alloc_graph(launch.memory.get(), launch.graph)) {
            return false;
        }
    }
    return true;
}

void ExpertSlots::copy(ggml_backend_t backend, const ExpertParts & from, size_t expert, int32_t slot) const {
    for (size_t part = 0; part < n_expert_parts; ++part) {
        if (from[part] != nullptr) {
            const size_t n_bytes = bytes_of(*from[part], part);
            ggml_backend_tensor_set_async(backend, tensors_[part],
                                          static_cast<const char *>(from[part]->data) + expert * n_bytes,
                                          static_cast<size_t>(slot) * n_bytes, n_bytes);
        }
    }
}

// A projection of the activations with the matrices in slots.
ggml_tensor * ExpertSlots::project(ggml_context * context, ExpertPart weights, ggml_tensor * x,
                                   ggml_tensor * ids) const {
    ggml_tensor * y = ggml_mul_mat_id(context, tensors_[weights], x, ids);
    ggml_tensor * bias = tensors_[weights + 1];
    return bias != nullptr ? ggml_add_id(context, y, bias, ids) : y;
}

// As the layer's own graph has it.
ggml_tensor * ExpertSlots::activation(ggml_context * context, ggml_tensor * x, ggml_tensor * ids) const {
    ggml_tensor * of_gate = project(context, gate, x, ids);
    ggml_tensor * activated = nullptr;
    if (form_.op != GGML_OP_GLU) {
        activated = ggml_unary(context, of_gate, static_cast<ggml_unary_op>(form_.op_params[0]));
        return form_.is_squared ? ggml_sqr(context, activated) : activated;
    }
    const auto op = static_cast<ggml_glu_op>(form_.op_params[0]);
    if (form_.is_split) {
        ggml_tensor * of_up = form_.is_merged ? of_gate : project(context, up, x, ids);
        const auto part = [&](ggml_tensor * y, int64_t first) {
            return y->ne[0] == form_.n_ff() ? y : rows(context, y, first, form_.n_ff());
        };
        activated = ggml_glu_split(context, part(of_gate, form_.first_rows[0]), part(of_up, form_.first_rows[1]), op);
    } else {
        activated = ggml_glu(context, of_gate, op, form_.op_params[1] != 0);
    }
    std::copy(form_.op_params.begin(), form_.op_params.end(), std::begin(activated->op_params));
    return activated;
}

}  // namespace overspill
