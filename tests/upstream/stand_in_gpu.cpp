// A device of type GPU that is none: its memory is this machine's RAM, of a size that can be chosen, it
// computes with the CPU backend, and what goes over its link takes as long as one wishes. It behaves as CUDA
// does where that decides the placement: memory of its own that the host cannot read, pinned memory for
// what stays on the host or registered with its driver, and large batches that are taken over from the CPU.
// It does without CUDA's asynchronous copies, hence without pipeline parallelism on several devices; but for those of a
// backend that only passes the time of experts.
#include "stand_in_gpu.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <ggml-backend.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t alignment = 128;  // CUDA's

struct Device {
    std::string name;
    StandInOptions options;
    std::atomic<uint64_t> used_bytes{0};
    std::string host_name;
    ggml_backend_buffer_type memory_type;
    ggml_backend_buffer_type host_type;
    ggml_backend_device device;

    double link_bytes_per_s(bool pinned) const {
        return pinned && options.pinned_bytes_per_s > 0 ? options.pinned_bytes_per_s : options.link_bytes_per_s;
    }
    void wait(Clock::time_point start, size_t n_bytes, bool pinned) const {
        overspend(start, n_bytes, link_bytes_per_s(pinned), options.latency_s);
    }
    static void overspend(Clock::time_point start, size_t n_bytes, double bytes_per_s, double latency_s) {
        const double due_s = latency_s + (bytes_per_s > 0 ? static_cast<double>(n_bytes) / bytes_per_s : 0);
        while (std::chrono::duration<double>(Clock::now() - start).count() < due_s) {  // sleeping is too coarse
        }
    }
};

std::vector<std::unique_ptr<Device>> & devices() {
    static std::vector<std::unique_ptr<Device>> all;
    return all;
}

Device & of(ggml_backend_dev_t device) {
    return *static_cast<Device *>(device->context);
}

ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// --- Host memory that the driver knows -----------------------------------------

struct HostMemory {
    enum class Known { not_at_all, in_part, all };

    std::mutex mutex;
    std::map<uintptr_t, size_t> pinned;      // of the host buffer type
    std::map<uintptr_t, size_t> registered;  // by whoever has it
    uint64_t registered_bytes = 0;

    static Known covered_by(const std::map<uintptr_t, size_t> & ranges, uintptr_t from, size_t n_bytes) {
        auto next = ranges.upper_bound(from);
        if (next != ranges.begin()) {
            const auto & [start, size] = *std::prev(next);
            if (from + n_bytes <= start + size) {
                return Known::all;
            }
            if (from < start + size) {
                return Known::in_part;
            }
        }
        return next != ranges.end() && next->first < from + n_bytes ? Known::in_part : Known::not_at_all;
    }
};

HostMemory & host_memory() {
    static HostMemory all;
    return all;
}

std::atomic<uint64_t> to_device_bytes{0};
std::atomic<uint64_t> n_copies{0};
std::atomic<uint64_t> n_partly_copies{0};

bool is_pinned(const void * data, size_t n_bytes) {
    HostMemory & host = host_memory();
    const std::lock_guard lock(host.mutex);
    const auto from = reinterpret_cast<uintptr_t>(data);
    const auto known = HostMemory::covered_by(host.registered, from, n_bytes);
    n_partly_copies += known == HostMemory::Known::in_part ? 1 : 0;
    return known == HostMemory::Known::all ||
           HostMemory::covered_by(host.pinned, from, n_bytes) == HostMemory::Known::all;
}

// As ggml-cuda's, which look at the environment each time.
bool register_host_buffer(void * buffer, size_t n_bytes) {
    if (std::getenv("GGML_CUDA_REGISTER_HOST") == nullptr || devices().empty()) {
        return false;
    }
    const StandInOptions & options = devices().front()->options;
    Device::overspend(Clock::now(), n_bytes, options.register_bytes_per_s, 0);
    HostMemory & host = host_memory();
    const std::lock_guard lock(host.mutex);
    const auto from = reinterpret_cast<uintptr_t>(buffer);
    const char * refused = nullptr;
    if (HostMemory::covered_by(host.registered, from, n_bytes) != HostMemory::Known::not_at_all) {
        refused = "part or all of the requested memory range is already mapped";
    } else if (options.register_limit_bytes > 0 && host.registered_bytes + n_bytes > options.register_limit_bytes) {
        refused = "out of memory";
    }
    if (refused != nullptr) {
        GGML_LOG_DEBUG("%s: failed to register %.2f MiB of pinned memory: %s\n", __func__,
                       static_cast<double>(n_bytes) / 1024.0 / 1024.0, refused);
        return false;
    }
    host.registered[from] = n_bytes;
    host.registered_bytes += n_bytes;
    return true;
}

void unregister_host_buffer(void * buffer) {
    if (std::getenv("GGML_CUDA_REGISTER_HOST") == nullptr) {
        return;
    }
    HostMemory & host = host_memory();
    const std::lock_guard lock(host.mutex);
    const auto found = host.registered.find(reinterpret_cast<uintptr_t>(buffer));
    if (found != host.registered.end()) {
        host.registered_bytes -= found->second;
        host.registered.erase(found);
    }
}

// --- Memory ------------------------------------------------------------------

struct Free {
    void operator()(void * memory) const { std::free(memory); }
};

struct Buffer {
    Device & device;
    std::unique_ptr<void, Free> memory;
    size_t n_bytes;

    Buffer(Device & owner, void * taken, size_t n) : device(owner), memory(taken), n_bytes(n) {}
    ~Buffer() { device.used_bytes -= n_bytes; }
    Buffer(const Buffer &) = delete;
    Buffer & operator=(const Buffer &) = delete;
};

Buffer & of(ggml_backend_buffer_t buffer) {
    return *static_cast<Buffer *>(buffer->context);
}

void copy(Device & device, void * to, const void * from, size_t n_bytes, bool to_device) {
    const auto start = Clock::now();
    ++n_copies;
    to_device_bytes += to_device ? n_bytes : 0;
    const bool pinned = is_pinned(to_device ? from : to, n_bytes);
    std::memcpy(to, from, n_bytes);
    device.wait(start, n_bytes, pinned);
}

constexpr ggml_backend_buffer_i buffer_functions = {
    /*.free_buffer   =*/[](ggml_backend_buffer_t buffer) { std::unique_ptr<Buffer>(&of(buffer)).reset(); },
    /*.get_base      =*/[](ggml_backend_buffer_t buffer) { return of(buffer).memory.get(); },
    /*.init_tensor   =*/nullptr,
    /*.memset_tensor =*/
    [](ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t n_bytes) {
        std::memset(static_cast<char *>(tensor->data) + offset, value, n_bytes);
    },
    /*.set_tensor    =*/
    [](ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t n_bytes) {
        copy(of(buffer).device, static_cast<char *>(tensor->data) + offset, data, n_bytes, true);
    },
    /*.get_tensor    =*/
    [](ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t n_bytes) {
        copy(of(buffer).device, data, static_cast<const char *>(tensor->data) + offset, n_bytes, false);
    },
    /*.set_tensor_2d =*/nullptr,
    /*.get_tensor_2d =*/nullptr,
    /*.cpy_tensor    =*/nullptr,
    /*.clear         =*/
    [](ggml_backend_buffer_t buffer, uint8_t value) {
        std::memset(of(buffer).memory.get(), value, of(buffer).n_bytes);
    },
    /*.reset         =*/nullptr,
};

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t n_bytes) {
    Device & device = of(type->device);
    const uint64_t limit = device.options.refuse_bytes > 0 ? device.options.refuse_bytes : device.options.memory_bytes;
    const size_t rounded = (n_bytes + alignment - 1) / alignment * alignment;
    if (device.used_bytes + rounded > limit) {
        return nullptr;
    }
    void * memory = std::aligned_alloc(alignment, rounded);
    if (memory == nullptr) {
        return nullptr;
    }
    device.used_bytes += rounded;
    auto buffer = std::make_unique<Buffer>(device, memory, rounded);
    return ggml_backend_buffer_init(type, buffer_functions, buffer.release(), n_bytes);
}

// --- Computing ---------------------------------------------------------------

struct Computer {
    Device & device;
    std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)> cpu;
    Clock::time_point busy_until = {};  // with what passes beside the CPU

    void take(size_t n_bytes, double bytes_per_s) {
        const double seconds =
            device.options.latency_s + (bytes_per_s > 0 ? static_cast<double>(n_bytes) / bytes_per_s : 0);
        busy_until = std::max(busy_until, Clock::now()) +
                     std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    }
    void wait() const {
        while (Clock::now() < busy_until) {
        }
    }
};

Computer & of(ggml_backend_t backend) {
    return *static_cast<Computer *>(backend->context);
}

thread_local bool is_computing_as_host = false;

bool is_passed_over(const ggml_tensor & node) {
    constexpr int64_t few = 32;
    return node.op == GGML_OP_MUL_MAT_ID && node.ne[2] < few;
}

// Computes all but experts, for which time passes.
ggml_status compute_without_experts(Computer & computer, ggml_cgraph * graph) {
    size_t n_bytes = 0;
    ggml_status status = GGML_STATUS_SUCCESS;
    int first = 0;
    const auto compute_until = [&](int end) {
        if (first < end && status == GGML_STATUS_SUCCESS) {
            ggml_cgraph part = ggml_graph_view(graph, first, end);
            status = ggml_backend_graph_compute(computer.cpu.get(), &part);
        }
        first = end + 1;
    };
    for (int i = 0; i < graph->n_nodes; ++i) {
        const ggml_tensor & node = *graph->nodes[i];
        if (is_passed_over(node)) {
            if (!is_passed_over(*graph->nodes[0])) {
                compute_until(i);
            }
            std::memset(node.data, 0, ggml_nbytes(&node));
            n_bytes += node.src[0]->nb[2] * static_cast<size_t>(ggml_nelements(node.src[2]));
        }
    }
    if (is_passed_over(*graph->nodes[0])) {  // experts and nothing else, biases and activations among them
        const ggml_tensor & result = *graph->nodes[graph->n_nodes - 1];
        std::memset(result.data, 0, ggml_nbytes(&result));
    } else {
        compute_until(graph->n_nodes);
    }
    computer.take(n_bytes, computer.device.options.expert_bytes_per_s);
    return status;
}

ggml_guid guid = {0x73, 0x74, 0x61, 0x6e, 0x64, 0x2d, 0x69, 0x6e, 0x2d, 0x67, 0x70, 0x75, 0x2d, 0x31, 0x2e, 0x30};

void set_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t n_bytes) {
    Computer & computer = of(backend);
    constexpr size_t large = 1 << 20;  // matrices, not biases
    if (ggml_backend_buffer_get_usage(tensor->buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS || n_bytes < large) {
        std::memcpy(static_cast<char *>(tensor->data) + offset, data, n_bytes);
    }
    ++n_copies;
    to_device_bytes += n_bytes;
    computer.take(n_bytes, computer.device.link_bytes_per_s(is_pinned(data, n_bytes)));
}

void get_async(ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset, size_t n_bytes) {
    Computer & computer = of(backend);
    std::memcpy(data, static_cast<const char *>(tensor->data) + offset, n_bytes);
    ++n_copies;
    computer.take(n_bytes, computer.device.link_bytes_per_s(is_pinned(data, n_bytes)));
}

// When what was to be done before an event is done.
Clock::time_point & time_of(ggml_backend_event_t event) {
    return *static_cast<Clock::time_point *>(event->context);
}

ggml_backend_event_t new_event(ggml_backend_dev_t device) {
    if (of(device).options.expert_bytes_per_s <= 0) {
        return nullptr;
    }
    auto time = std::make_unique<Clock::time_point>();
    return std::make_unique<ggml_backend_event>(ggml_backend_event{device, time.release()}).release();
}

void free_event(ggml_backend_dev_t, ggml_backend_event_t event) {
    std::unique_ptr<Clock::time_point>(&time_of(event)).reset();
    std::unique_ptr<ggml_backend_event>(event).reset();
}

constexpr ggml_backend_i backend_functions = {
    /*.get_name            =*/[](ggml_backend_t backend) { return ggml_backend_dev_name(backend->device); },
    /*.free                =*/
    [](ggml_backend_t backend) {
        std::unique_ptr<Computer>(&of(backend)).reset();
        std::unique_ptr<ggml_backend>(backend).reset();
    },
    /*.set_tensor_async    =*/nullptr,
    /*.get_tensor_async    =*/nullptr,
    /*.set_tensor_2d_async =*/nullptr,
    /*.get_tensor_2d_async =*/nullptr,
    /*.cpy_tensor_async    =*/nullptr,
    /*.synchronize         =*/nullptr,
    /*.graph_plan_create   =*/nullptr,
    /*.graph_plan_free     =*/nullptr,
    /*.graph_plan_update   =*/nullptr,
    /*.graph_plan_compute  =*/nullptr,
    /*.graph_compute       =*/
    [](ggml_backend_t backend, ggml_cgraph * graph) {
        Computer & computer = of(backend);
        if (computer.device.options.expert_bytes_per_s > 0) {
            return compute_without_experts(computer, graph);
        }
        computer.device.wait(Clock::now(), 0, false);
        is_computing_as_host = computer.device.options.computes_as_host != 0;
        const ggml_status status = ggml_backend_graph_compute(computer.cpu.get(), graph);
        is_computing_as_host = false;
        return status;
    },
    /*.event_record        =*/nullptr,
    /*.event_wait          =*/nullptr,
    /*.graph_optimize      =*/nullptr,
};

ggml_backend_t start(ggml_backend_dev_t device, const char *) {
    auto computer =
        std::make_unique<Computer>(Computer{of(device), {ggml_backend_dev_init(cpu(), nullptr), ggml_backend_free}});
    const auto set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()), "ggml_backend_set_n_threads"));
    if (computer->cpu == nullptr || set_n_threads == nullptr) {
        return nullptr;
    }
    set_n_threads(computer->cpu.get(), of(device).options.n_threads);
    ggml_backend_i functions = backend_functions;
    if (of(device).options.expert_bytes_per_s > 0) {
        functions.set_tensor_async = set_async;
        functions.get_tensor_async = get_async;
        functions.synchronize = [](ggml_backend_t backend) { of(backend).wait(); };
        functions.event_record = [](ggml_backend_t backend, ggml_backend_event_t event) {
            time_of(event) = of(backend).busy_until;
        };
        functions.event_wait = [](ggml_backend_t backend, ggml_backend_event_t event) {
            of(backend).busy_until = std::max(of(backend).busy_until, time_of(event));
        };
    }
    return std::make_unique<ggml_backend>(ggml_backend{&guid, functions, device, computer.release()}).release();
}

bool supports_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    for (const ggml_tensor * source : op->src) {
        if (source != nullptr && source->buffer != nullptr && !ggml_backend_buffer_is_host(source->buffer) &&
            source->buffer->buft->device != device) {
            return false;  // weights that the CPU has repacked for itself
        }
    }
    return ggml_backend_dev_supports_op(cpu(), op);
}

// CUDA's rule.
bool offload_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    int64_t batch = 0;
    switch (op->op) {
        case GGML_OP_GET_ROWS: break;
        case GGML_OP_MUL_MAT: batch = op->ne[1]; break;
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ROPE:
        case GGML_OP_ROPE_BACK: batch = op->ne[2]; break;
        default: batch = ggml_nrows(op);
    }
    const int32_t least = of(device).options.offload_min_batch;
    return least > 0 && batch >= least;
}

// --- The device ----------------------------------------------------------------

void get_memory(ggml_backend_dev_t device, size_t * free, size_t * total) {
    *total = of(device).options.memory_bytes;
    *free = *total - std::min<size_t>(*total, of(device).used_bytes);
}

constexpr ggml_backend_device_i device_functions = {
    /*.get_name             =*/[](ggml_backend_dev_t device) { return of(device).name.c_str(); },
    /*.get_description      =*/[](ggml_backend_dev_t) { return "Stand-in for a GPU"; },
    /*.get_memory           =*/get_memory,
    /*.get_type             =*/[](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; },
    /*.get_props            =*/
    [](ggml_backend_dev_t device, ggml_backend_dev_props * properties) {
        properties->name = of(device).name.c_str();
        properties->description = ggml_backend_dev_description(device);
        properties->type = GGML_BACKEND_DEVICE_TYPE_GPU;
        properties->device_id = nullptr;
        get_memory(device, &properties->memory_free, &properties->memory_total);
        properties->caps = {};
        properties->caps.host_buffer = true;
    },
    /*.init_backend         =*/start,
    /*.get_buffer_type      =*/[](ggml_backend_dev_t device) { return &of(device).memory_type; },
    /*.get_host_buffer_type =*/[](ggml_backend_dev_t device) { return &of(device).host_type; },
    /*.buffer_from_host_ptr =*/nullptr,
    /*.supports_op          =*/supports_op,
    /*.supports_buft        =*/
    [](ggml_backend_dev_t device, ggml_backend_buffer_type_t type) { return type == &of(device).memory_type; },
    /*.offload_op           =*/offload_op,
    /*.event_new            =*/new_event,
    /*.event_free           =*/free_event,
    /*.event_synchronize    =*/
    [](ggml_backend_dev_t, ggml_backend_event_t event) {
        while (Clock::now() < time_of(event)) {
        }
    },
};

ggml_backend_reg backend_type = {
    GGML_BACKEND_API_VERSION,
    {
        /*.get_name         =*/[](ggml_backend_reg_t) { return "StandIn"; },
        /*.get_device_count =*/[](ggml_backend_reg_t) { return devices().size(); },
        /*.get_device       =*/[](ggml_backend_reg_t, size_t index) { return &devices().at(index)->device; },
        /*.get_proc_address =*/
        [](ggml_backend_reg_t, const char * name) -> void * {
            if (std::strcmp(name, "ggml_backend_register_host_buffer") == 0) {
                return reinterpret_cast<void *>(&register_host_buffer);
            }
            if (std::strcmp(name, "ggml_backend_unregister_host_buffer") == 0) {
                return reinterpret_cast<void *>(&unregister_host_buffer);
            }
            return nullptr;
        },
    },
    nullptr,
};

// The CPU's buffer, which the driver knows as long as it is there.
ggml_backend_buffer_t allocate_pinned(ggml_backend_buffer_type_t type, size_t n_bytes) {
    static void (*free_buffer)(ggml_backend_buffer_t) = nullptr;
    const ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), n_bytes);
    if (buffer == nullptr || buffer->context == nullptr) {
        return buffer;
    }
    HostMemory & host = host_memory();
    const std::lock_guard lock(host.mutex);
    free_buffer = buffer->iface.free_buffer;
    buffer->buft = type;
    buffer->iface.free_buffer = [](ggml_backend_buffer_t freed) {
        HostMemory & memory = host_memory();
        {
            const std::lock_guard freeing(memory.mutex);
            memory.pinned.erase(reinterpret_cast<uintptr_t>(freed->context));
        }
        free_buffer(freed);
    };
    host.pinned[reinterpret_cast<uintptr_t>(buffer->context)] = n_bytes;
    return buffer;
}

}  // namespace

void stand_in_gpu(const char * name, const StandInOptions * options) {
    for (auto & device : devices()) {
        if (device->name == name) {
            device->options = *options;
            return;
        }
    }
    if (ggml_backend_reg_count() == 0) {
        ggml_backend_load_all();
    }
    auto device = std::make_unique<Device>();
    device->name = name;
    device->host_name = device->name + "_Host";
    device->options = *options;
    device->device = {device_functions, &backend_type, device.get()};
    device->memory_type = {
        {
            /*.get_name       =*/[](ggml_backend_buffer_type_t type) { return of(type->device).name.c_str(); },
            /*.alloc_buffer   =*/allocate,
            /*.get_alignment  =*/[](ggml_backend_buffer_type_t) { return alignment; },
            /*.get_max_size   =*/nullptr,
            /*.get_alloc_size =*/nullptr,
            /*.is_host        =*/[](ggml_backend_buffer_type_t) { return is_computing_as_host; },
        },
        &device->device,
        nullptr,
    };
    device->host_type = *ggml_backend_cpu_buffer_type();
    device->host_type.device = &device->device;
    device->host_type.iface.get_name = [](ggml_backend_buffer_type_t type) {
        return of(type->device).host_name.c_str();
    };
    device->host_type.iface.alloc_buffer = allocate_pinned;
    devices().push_back(std::move(device));
    ggml_backend_device_register(&devices().back()->device);
}

StandInCounts stand_in_counts() {
    HostMemory & host = host_memory();
    const std::lock_guard lock(host.mutex);
    return {to_device_bytes, n_copies, n_partly_copies, host.registered_bytes};
}
