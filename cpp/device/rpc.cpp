#include "device/rpc.h"

#include "base/error.h"
#include "base/log.h"

#include <exception>

namespace overspill {

DeviceMemory device_memory(ggml_backend_dev_t device) {
    DeviceMemory memory;
    try {
        ggml_backend_dev_memory(device, &memory.free_bytes, &memory.total_bytes);
    } catch (const std::exception &) {
        return {};  // see cmake/rpc_failures.h
    }
    return memory;
}

RpcServers::RpcServers(const ggml_backend_dev_t * devices) : n_failures_before_(n_rpc_failures()) {
    std::vector<ggml_backend_dev_t> all;
    if (devices == nullptr) {
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            all.push_back(ggml_backend_dev_get(i));
        }
        all.push_back(nullptr);
        devices = all.data();
    }
    for (; *devices != nullptr; ++devices) {
        if (std::string(ggml_backend_reg_name(ggml_backend_dev_backend_reg(*devices))) != "RPC") {
            continue;
        }
        const std::string endpoint = ggml_backend_dev_description(*devices);
        try {
            connections_.emplace_back(ggml_backend_dev_init(*devices, nullptr));
        } catch (const std::exception & error) {
            throw Error("no RPC server answers at " + endpoint + ", or it works for another process: " + error.what());
        }
        if (device_memory(*devices).total_bytes == 0) {
            throw Error("the RPC server at " + endpoint +
                        " was lost: before it can be used again, close the models that used it and delete arrays of "
                        "their logits");
        }
    }
}

void RpcServers::check(const std::string & activity) const {
    if (n_rpc_failures() == n_failures_before_) {
        return;
    }
    for (const auto & connection : connections_) {
        ggml_backend_dev_t device = ggml_backend_get_device(connection.get());
        if (device_memory(device).total_bytes == 0) {
            throw Error("the RPC server at " + std::string(ggml_backend_dev_description(device)) + " was lost while " +
                        activity + "; when it runs again, close the models that used it and load them anew");
        }
    }
}

}  // namespace overspill
