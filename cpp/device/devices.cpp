#include "device/devices.h"

#include "base/error.h"
#include "base/process.h"
#include "device/pinned_weights.h"

#include <exception>
#include <stdexcept>

#if defined(OVERSPILL_BACKENDS_ARE_PLUGINS) && !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace overspill {

namespace {

const char * kind_of(ggml_backend_dev_t device) {
    switch (ggml_backend_dev_type(device)) {
        case GGML_BACKEND_DEVICE_TYPE_GPU: return "gpu";
        case GGML_BACKEND_DEVICE_TYPE_IGPU: return "integrated_gpu";
        case GGML_BACKEND_DEVICE_TYPE_CPU: return "cpu";
        default: return "accelerator";
    }
}

}  // namespace

void check_usable_after_fork(ggml_backend_dev_t device) {
    const auto type = ggml_backend_dev_type(device);
    if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
        check_not_forked(ggml_backend_dev_name(device));
    }
}

bool can_be_freed_half_done(ggml_backend_dev_t device) {
    const std::string backend = ggml_backend_reg_name(ggml_backend_dev_backend_reg(device));
    return backend == "CPU" || backend == "RPC";
}

DeviceMemory device_memory(ggml_backend_dev_t device) {
    DeviceMemory memory;
    try {
        check_usable_after_fork(device);
        ggml_backend_dev_memory(device, &memory.free_bytes, &memory.total_bytes);
    } catch (const std::exception &) {
        return {};  // see cmake/rpc_failures.h
    }
    return memory;
}

std::vector<DeviceDescription> list_devices() {
    std::vector<DeviceDescription> devices;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        devices.push_back({ggml_backend_dev_name(device), ggml_backend_dev_description(device), kind_of(device),
                           ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), device_memory(device),
                           registers_host_memory(ggml_backend_dev_backend_reg(device))});
    }
    return devices;
}

ggml_backend_dev_t device_named(const std::string & name) {
    std::string known;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (name == ggml_backend_dev_name(device)) {
            return device;
        }
        known += (i > 0 ? ", " : "") + std::string(ggml_backend_dev_name(device));
    }
    throw std::invalid_argument("device must be one of " + known + ", not " + name);
}

std::string device_of(ggml_backend_buffer_type_t type) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    return ggml_backend_buft_is_host(type) || device == nullptr ? "CPU" : ggml_backend_dev_name(device);
}

void load_backends([[maybe_unused]] const std::string & folder) {
    allow_registering_host_memory();
#ifdef OVERSPILL_BACKENDS_ARE_PLUGINS
    ggml_backend_load_all_from_path(folder.c_str());
#endif
}

ggml_backend_dev_t cpu_device() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (cpu == nullptr) {
        throw Error("no CPU backend of llama.cpp was found: the installation is damaged, install overspill anew");
    }
    return cpu;
}

const ggml_type_traits_cpu & cpu_type_traits(ggml_type type) {
#ifdef _WIN32
    static_cast<void>(type);
    throw Error("there are no kernels of overspill on Windows");
#elif defined(OVERSPILL_BACKENDS_ARE_PLUGINS)
    // No function that the backend gives out by name, but one of its library's.
    static const auto traits = [] {
        Dl_info plugin = {};
        dladdr(cpu_function<void *>("ggml_backend_set_n_threads"), &plugin);
        void * library = dlopen(plugin.dli_fname, RTLD_NOW | RTLD_NOLOAD);
        return library == nullptr
                   ? nullptr
                   : reinterpret_cast<decltype(&ggml_get_type_traits_cpu)>(dlsym(library, "ggml_get_type_traits_cpu"));
    }();
    if (traits == nullptr) {
        throw Error("the CPU backend of llama.cpp has no ggml_get_type_traits_cpu; set OVERSPILL_KERNELS=llama.cpp");
    }
    return *traits(type);
#else
    return *ggml_get_type_traits_cpu(type);
#endif
}

ggml_from_float_t cpu_quantize(ggml_type type) {
    return cpu_type_traits(type).from_float;
}

std::vector<std::string> cpu_features() {
    const auto get = cpu_function<ggml_backend_get_features_t>("ggml_backend_get_features");
    ggml_backend_reg_t cpu = ggml_backend_dev_backend_reg(cpu_device());
    std::vector<std::string> names;
    for (const ggml_backend_feature * one = get == nullptr ? nullptr : get(cpu); one != nullptr && one->name; ++one) {
        if (one->value != std::string("0")) {
            names.emplace_back(one->name);
        }
    }
    return names;
}

}  // namespace overspill
