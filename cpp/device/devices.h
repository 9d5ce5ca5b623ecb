// The devices that llama.cpp computes on, and the functions that the CPU's backend has besides.
#pragma once

#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace overspill {

// After an assertion has failed in what a device computed: whether that can be freed. CUDA's destructors find its
// memory in use, and fail as well.
bool can_be_freed_half_done(ggml_backend_dev_t device);

struct DeviceMemory {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
};

// Drivers and connections do not outlive a fork: in a process that was forked, only the CPU can be used. Throws Error
// for others there.
void check_usable_after_fork(ggml_backend_dev_t device);

// What the device has; zeros if its RPC server does not answer, or for what a fork has made unusable.
DeviceMemory device_memory(ggml_backend_dev_t device);

struct DeviceDescription {
    std::string name;  // as placements name it, such as "CUDA0"
    std::string description;
    std::string kind;     // cpu, gpu, integrated_gpu, accelerator
    std::string backend;  // as llama.cpp names it, such as "CUDA"
    DeviceMemory memory;
    bool registers_host_memory;  // copies from memory that others own can be as fast as from its own pinned memory
};

// All that llama.cpp knows now.
std::vector<DeviceDescription> list_devices();

// Throws std::invalid_argument, which names the known ones.
ggml_backend_dev_t device_named(const std::string & name);

// Whose memory that is: what the CPU reads counts as the CPU's, whoever pinned it.
std::string device_of(ggml_backend_buffer_type_t type);

// Makes the backends in the folder known, in builds that have them as plugins, and has their drivers take memory that
// others own. Call before other threads run: it changes the environment.
void load_backends(const std::string & folder);

// Throws Error if the installation has none.
ggml_backend_dev_t cpu_device();

// A function of the CPU backend, asked for by name since that may be a plugin; null if it has none.
template <typename Function>
Function cpu_function(const char * name) {
    return reinterpret_cast<Function>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), name));
}

// What the CPU backend does with a type. Throws Error if a plugin does not say.
const ggml_type_traits_cpu & cpu_type_traits(ggml_type type);
// Quantizes to it.
ggml_from_float_t cpu_quantize(ggml_type type);

// What the CPU backend was built for and found, such as AVX2 and AVX512.
std::vector<std::string> cpu_features();

}  // namespace overspill
