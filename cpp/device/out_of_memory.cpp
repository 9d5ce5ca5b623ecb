#include "device/out_of_memory.h"

#include "device/devices.h"

#include <ggml-backend.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <optional>

namespace overspill {

namespace {

// The device whose memory has this name in llama.cpp's messages.
std::string device_of_buffer(const std::string & buffer) {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (buffer == ggml_backend_buft_name(ggml_backend_dev_buffer_type(device))) {
            return ggml_backend_dev_name(device);
        }
    }
    return "CPU";  // pinned or repacked
}

#ifdef __linux__
// Of a file with one number, or none.
std::optional<size_t> number_in(const char * path) {
    std::ifstream file(path);
    size_t number = 0;
    return file >> number ? std::optional(number) : std::nullopt;
}

// Of files that were read, which the system gives up where others need the memory.
size_t cached_in_group() {
    std::ifstream file("/sys/fs/cgroup/memory.stat");
    size_t n_bytes = 0, value = 0;
    for (std::string name; file >> name >> value;) {
        n_bytes += name == "active_file" || name == "inactive_file" ? value : 0;
    }
    return n_bytes;
}
#endif

// That the process can have without swapping; no limit where the system does not tell.
size_t available_ram_bytes() {
    size_t room = std::numeric_limits<size_t>::max();
#ifdef __linux__
    std::ifstream file("/proc/meminfo");
    for (std::string line; std::getline(file, line);) {
        if (line.rfind("MemAvailable:", 0) == 0) {
            room = std::strtoull(line.c_str() + line.find(':') + 1, nullptr, 10) * 1024;
        }
    }
    const auto limit = number_in("/sys/fs/cgroup/memory.max");
    const auto used = number_in("/sys/fs/cgroup/memory.current");
    if (limit && used) {
        const size_t kept = *used - std::min(*used, cached_in_group());
        room = std::min(room, *limit - std::min(*limit, kept));
    }
#endif
    return room;
}

}  // namespace

void check_room(const std::string & device, size_t n_bytes, const std::string & what) {
    const size_t room = device == "CPU" ? available_ram_bytes() : device_memory(device_named(device)).free_bytes;
    if (n_bytes > room / 2) {
        const auto mebibytes = [](size_t bytes) { return std::to_string(bytes >> 20U) + " MiB"; };
        throw OutOfMemoryError(what + mebibytes(n_bytes) + " would be more than half of the " + mebibytes(room) +
                                   " that " + device + " has free",
                               device, n_bytes);
    }
}

OutOfMemoryError ram_refused(const std::string & what) {
    return {what +
                "this process gets no more memory: give a smaller n_ctx or n_batch, close other models, or raise its "
                "limit (ulimit -v)",
            "CPU", 0};
}

bool is_for_want_of_memory(const std::string & assertion) {
    // Of ggml.c, and of cmake/allocations.h: what was allocated is not null.
    return assertion.find("GGML_ASSERT(ctx->mem_buffer != NULL) failed") != std::string::npos ||
           assertion.find("GGML_ASSERT(memory != NULL) failed") != std::string::npos ||
           // ggml_malloc() and ggml_calloc() say no more than that.
           (assertion.find("ggml.c:") != std::string::npos && assertion.find(": fatal error") != std::string::npos);
}

void throw_if_out_of_memory(const ErrorCapture & errors, const std::string & what) {
    for (const auto & line : errors.lines()) {
        if (line.find("bad_alloc") != std::string::npos || line.find("insufficient memory") != std::string::npos ||
            is_for_want_of_memory(line)) {
            throw ram_refused(what);
        }
    }
    static const std::string mark = "failed to allocate ";
    static const std::string size_mark = " buffer of size ";
    for (const auto & line : errors.lines()) {
        const size_t at = line.find(mark);
        const size_t size_at = line.find(size_mark);
        if (at == std::string::npos || size_at == std::string::npos || size_at < at) {
            continue;
        }
        const std::string buffer = line.substr(at + mark.size(), size_at - at - mark.size());
        const auto n_bytes = static_cast<size_t>(std::strtoull(line.c_str() + size_at + size_mark.size(), nullptr, 10));
        const std::string device = device_of_buffer(buffer);
        ggml_backend_dev_t found = ggml_backend_dev_by_name(device.c_str());
        const size_t free_bytes = found == nullptr ? 0 : device_memory(found).free_bytes;
        const auto mebibytes = [](size_t bytes) { return std::to_string(bytes >> 20U) + " MiB"; };
        throw OutOfMemoryError(what + device + " refused " + mebibytes(n_bytes) + ", of " + mebibytes(free_bytes) +
                                   " that it says are free now; put less on it (a smaller n_ctx, other offload)",
                               device, n_bytes);
    }
}

}  // namespace overspill
