#include "device/out_of_memory.h"

#include "base/error.h"
#include "device/devices.h"

#include <ggml-backend.h>

#include <cstdlib>

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

}  // namespace

void throw_if_out_of_memory(const ErrorCapture & errors, const std::string & what) {
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
