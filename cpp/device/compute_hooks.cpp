#include "device/compute_hooks.h"

// A backend's functions are members of structs that only this header defines; no function of llama.cpp's replaces them.
#include <ggml-backend-impl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <utility>

namespace overspill {

namespace {

thread_local const ComputeScope * scope = nullptr;

// A device's own functions. Written before others can see the entry, or, graph_compute, before its backend is given
// out.
struct Original {
    ggml_backend_dev_t device = nullptr;
    decltype(ggml_backend_device_i::init_backend) init_backend = nullptr;
    decltype(ggml_backend_device_i::offload_op) offload_op = nullptr;
    std::atomic<decltype(ggml_backend_i::graph_compute)> graph_compute{nullptr};
};

// Only appended to, so that reading needs no lock. Devices are never taken away.
struct Originals {
    static constexpr size_t most = 256;  // devices beyond that do without

    std::mutex mutex;  // of those who append
    std::array<Original, most> entries;
    std::atomic<size_t> n{0};

    Original * find(ggml_backend_dev_t device) {
        const size_t n_now = n.load(std::memory_order_acquire);
        for (size_t i = 0; i < n_now; ++i) {
            if (entries[i].device == device) {
                return &entries[i];
            }
        }
        return nullptr;
    }
};

Originals & originals() {
    // Never destroyed: backends may compute until the process is gone.
    static auto * instance = new Originals;
    return *instance;
}

ggml_status compute_piece(ggml_backend_t backend, ggml_cgraph * graph) {
    if (scope != nullptr && scope->should_stop()) {
        return GGML_STATUS_ABORTED;
    }
    return originals().find(backend->device)->graph_compute.load(std::memory_order_relaxed)(backend, graph);
}

// The CPU asks a callback of its own whether to stop.
ggml_status compute_on_cpu(ggml_backend_t backend, ggml_cgraph * graph) {
    auto * const compute = originals().find(backend->device)->graph_compute.load(std::memory_order_relaxed);
    if (scope == nullptr || scope->products() == nullptr || !scope->products()->is_of_use()) {
        return compute(backend, graph);
    }
    const ggml_status status = compute(backend, scope->products()->replace(graph));
    ProductGraphs::computed();
    return status;
}

ggml_backend_t make_backend(ggml_backend_dev_t device, const char * params) {
    Original & original = *originals().find(device);
    ggml_backend_t backend = original.init_backend(device, params);
    if (backend == nullptr || backend->device != device || backend->iface.graph_compute == nullptr) {
        return backend;
    }
    decltype(ggml_backend_i::graph_compute) known = nullptr;
    auto * const compute = backend->iface.graph_compute;
    // All backends of a device compute alike; one that does not is left alone.
    if (original.graph_compute.compare_exchange_strong(known, compute) || known == compute) {
        backend->iface.graph_compute =
            ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU ? compute_on_cpu : compute_piece;
    }
    return backend;
}

// Whether an operation with weights in RAM is of a batch of so many tokens. ggml-cuda.cu's get_op_batch_size() counts
// rows for all but the first three: with experts there are several for each token, with heads dozens.
bool has_tokens(const ggml_tensor & operation, int32_t least) {
    constexpr int32_t llama_cpps_least = 32;
    switch (operation.op) {
        case GGML_OP_GET_ROWS: return false;
        case GGML_OP_MUL_MAT: return operation.ne[1] >= least;
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ADD_ID: return operation.ne[2] >= least;
        default: {
            const int64_t n_rows = operation.ne[2] > 1 ? operation.ne[2] * operation.ne[3] : operation.ne[1];
            return n_rows >= std::max(least, llama_cpps_least);
        }
    }
}

bool wants_operation(ggml_backend_dev_t device, const ggml_tensor * operation) {
    if (scope != nullptr && scope->offload_min_batch() > 0) {
        return has_tokens(*operation, scope->offload_min_batch());
    }
    return originals().find(device)->offload_op(device, operation);
}

}  // namespace

void hook_devices() {
    Originals & known = originals();
    const std::lock_guard lock(known.mutex);
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        const size_t n = known.n.load(std::memory_order_relaxed);
        if (n == Originals::most || known.find(device) != nullptr) {
            continue;
        }
        Original & original = known.entries[n];
        original.device = device;
        original.init_backend = device->iface.init_backend;
        original.offload_op = device->iface.offload_op;
        known.n.store(n + 1, std::memory_order_release);
        device->iface.init_backend = make_backend;
        if (original.offload_op != nullptr) {
            device->iface.offload_op = wants_operation;
        }
    }
}

std::mutex & hooking_mutex() noexcept {
    return originals().mutex;
}

ComputeScope::ComputeScope(int32_t offload_min_batch, ProductGraphs * products, Interrupt * interrupt,
                           const Interrupt::Poll * poll)
    : offload_min_batch_(offload_min_batch),
      products_(products),
      interrupt_(interrupt),
      poll_(poll),
      outer_(std::exchange(scope, this)) {}

ComputeScope::~ComputeScope() {
    scope = outer_;
}

}  // namespace overspill
