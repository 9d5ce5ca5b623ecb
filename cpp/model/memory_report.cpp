#include "model/memory_report.h"

#include "base/error.h"
#include "device/compute_hooks.h"
#include "device/devices.h"

#include <ggml-backend.h>
#include <ggml.h>
#include <llama-ext.h>

#include <limits>
#include <set>

namespace overspill {

namespace {

// Calls `visit` with each node of the graph of a token of each sequence and each tensor with memory that it reads.
template <typename Visit>
void visit_sources(llama_context & context, uint32_t n_tokens, uint32_t n_outputs, const Visit & visit) {
    // In the graph of a batch, copies stand in for weights that a GPU takes over; here none does. All of these were
    // reserved before, the batch's at last: nothing grows.
    const uint32_t n_sequences = llama_n_seq_max(&context);
    ggml_cgraph * graph = nullptr;
    {
        const ComputeScope nothing_taken_over(std::numeric_limits<int32_t>::max(), nullptr);
        graph = llama_graph_reserve(&context, n_sequences, n_sequences, n_sequences);
    }
    for (int i = 0; graph != nullptr && i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        for (const ggml_tensor * source : node->src) {
            while (source != nullptr && source->view_src != nullptr) {
                source = source->view_src;
            }
            if (source != nullptr && source->buffer != nullptr) {
                visit(*node, *source);
            }
        }
    }
    if (graph == nullptr || llama_graph_reserve(&context, n_tokens, n_sequences, n_outputs) == nullptr) {
        throw Error("llama.cpp could not build the graph of the model once more");
    }
}

}  // namespace

MemoryReport report_memory(llama_context & context, uint32_t n_tokens, uint32_t n_outputs, bool dry_run) {
    MemoryReport report;
    for (const auto & [type, bytes] : llama_get_memory_breakdown(&context)) {
        MemoryUse & device = report.devices[device_of(type)];
        device.weights_bytes += bytes.model;
        device.kv_bytes += bytes.context;
        device.compute_bytes += bytes.compute;
    }
    const auto n_vocab = static_cast<size_t>(llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(&context))));
    report.devices["CPU"].compute_bytes += n_outputs * n_vocab * sizeof(float);  // where logits are handed out
    if (dry_run) {
        return report;  // a graph would be allocated
    }
    std::set<const ggml_tensor *> seen;
    std::map<int32_t, size_t> cache_of;
    visit_sources(context, n_tokens, n_outputs, [&](const ggml_tensor &, const ggml_tensor & source) {
        if (!seen.insert(&source).second) {
            return;
        }
        ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(source.buffer);
        const size_t n_bytes = ggml_nbytes(&source);
        const std::string name = source.name;
        const size_t layer_at = name.rfind("_l");
        if (ggml_backend_buffer_get_usage(source.buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
            report.tensors.push_back({name, device_of(type), ggml_backend_buft_name(type), n_bytes});
        } else if (name.rfind("cache_", 0) == 0 && layer_at != std::string::npos) {
            // Keys and values, or the two states of a recurrent layer.
            const auto layer = static_cast<int32_t>(std::stol(name.substr(layer_at + 2)));
            const auto known = cache_of.emplace(layer, report.kv.size()).first;
            if (known->second == report.kv.size()) {
                report.kv.push_back({layer, device_of(type), 0});
            }
            report.kv[known->second].n_bytes += n_bytes;
        }
    });
    return report;
}

std::vector<MappedTensor> mapped_weights(llama_context & context, uint32_t n_tokens, uint32_t n_outputs) {
    std::set<const ggml_tensor *> seen;
    std::vector<MappedTensor> found;
    visit_sources(context, n_tokens, n_outputs, [&](const ggml_tensor & node, const ggml_tensor & source) {
        const bool only_looks = node.op == GGML_OP_NONE || node.op == GGML_OP_VIEW || node.op == GGML_OP_RESHAPE ||
                                node.op == GGML_OP_PERMUTE || node.op == GGML_OP_TRANSPOSE;
        if (only_looks || node.op == GGML_OP_GET_ROWS ||
            std::string(ggml_backend_buffer_name(source.buffer)) != "CPU_Mapped" || !seen.insert(&source).second) {
            return;
        }
        found.push_back({reinterpret_cast<uintptr_t>(source.data), ggml_nbytes(&source), source.buffer});
    });
    return found;
}

}  // namespace overspill
