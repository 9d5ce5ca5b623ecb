#pragma once

#include <cstdint>

extern "C" {

struct StandInOptions {
    uint64_t memory_bytes;      // what it says it has
    uint64_t refuse_bytes;      // what it gives in truth; 0: what it says
    double link_bytes_per_s;    // 0: as fast as memory
    double latency_s;           // of each transfer and of each piece of a graph
    int32_t n_threads;          // that compute
    int32_t offload_min_batch;  // from how many tokens on it takes over what the host holds; 0: never
};

// Adds the device, or changes its options: llama.cpp has no way to take a device away again.
void stand_in_gpu(const char * name, const StandInOptions * options);
}
