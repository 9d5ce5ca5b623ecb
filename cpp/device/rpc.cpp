#include "device/rpc.h"

#include "base/activity.h"
#include "base/error.h"
#include "base/error_capture.h"
#include "base/log.h"
#include "base/process.h"
#include "device/devices.h"

#include <exception>

namespace overspill {

void add_rpc_server(const std::string & endpoint) {
    using AddServer = ggml_backend_reg_t (*)(const char *);
    const Activity activity("adding an RPC server");
    check_not_forked("RPC servers");
    const ErrorCapture errors;
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (rpc == nullptr) {
        throw Error("this build has no RPC backend");
    }
    const auto add = reinterpret_cast<AddServer>(ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"));
    ggml_backend_reg_t server = nullptr;
    try {
        server = add(endpoint.c_str());
        // Asked for the first time, their types of memory need the server, and later on they do not.
        for (size_t i = 0; server != nullptr && i < ggml_backend_reg_dev_count(server); ++i) {
            ggml_backend_dev_buffer_type(ggml_backend_reg_dev_get(server, i));
        }
    } catch (const std::exception & error) {
        throw Error("no RPC server answers at " + endpoint + ": " + error.what());
    }
    if (server == nullptr) {
        throw Error("no RPC server answers at " + endpoint + ": " + errors.reason("no device there"));
    }
    ggml_backend_register(server);
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
        check_usable_after_fork(*devices);
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
