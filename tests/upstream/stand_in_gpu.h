#pragma once

#include <cstdint>

extern "C" {

struct StandInOptions {
    uint64_t memory_bytes;          // what it says it has
    uint64_t refuse_bytes;          // what it gives in truth; 0: what it says
    double link_bytes_per_s;        // 0: as fast as memory
    double latency_s;               // of each transfer and of each piece of a graph
    int32_t n_threads;              // that compute
    int32_t offload_min_batch;      // from how many tokens on it takes over what the host holds; 0: never
    double pinned_bytes_per_s;      // of the link, where the host's side is pinned or registered; 0: the same
    uint64_t register_limit_bytes;  // of host memory that may be registered; 0: any
    double register_bytes_per_s;    // how long registering takes; 0: no time
    int32_t computes_as_host;       // products of weights there are those that the CPU has for its own weights
    // How fast experts of a few tokens are read. They are not computed then, nor are weights copied: only their time
    // passes, beside what the CPU does until it waits for it. 0: they are computed like everything else.
    double expert_bytes_per_s;
};

// What was done to all of them together.
struct StandInCounts {
    uint64_t to_device_bytes;
    uint64_t n_copies;          // in either direction
    uint64_t n_partly_copies;   // whose host side was registered in part: CUDA answers with CUDA_ERROR_INVALID_VALUE
    uint64_t registered_bytes;  // now
};

// Adds the device, or changes its options: llama.cpp has no way to take a device away again.
void stand_in_gpu(const char * name, const StandInOptions * options);
StandInCounts stand_in_counts();
}
