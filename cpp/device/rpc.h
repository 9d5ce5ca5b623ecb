// Devices on other machines, which may be lost at any time.
#pragma once

#include <ggml-backend.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace overspill {

// Connects to the server at an endpoint such as "10.0.0.2:50052", whose devices are known from then on. Throws Error if
// none answers.
void add_rpc_server(const std::string & endpoint);

// Open connections to the RPC servers of a model. One that is lost stays lost while this lives: upstream
// would connect anew, to a server that may be another one and knows nothing of the model.
class RpcServers {
  public:
    // `devices` ends with a null, as for llama.cpp; null itself stands for all. Throws Error naming the server
    // that cannot be used.
    explicit RpcServers(const ggml_backend_dev_t * devices);

    // Throws Error if a server was lost since the beginning: what was computed with it is garbage. `activity`
    // completes "was lost while". Cheap as long as no server of the process is lost.
    void check(const std::string & activity) const;

  private:
    struct Deleter {
        void operator()(ggml_backend_t backend) const { ggml_backend_free(backend); }
    };

    uint64_t n_failures_before_;
    std::vector<std::unique_ptr<ggml_backend, Deleter>> connections_;
};

}  // namespace overspill
