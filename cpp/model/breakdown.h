#pragma once

#include <cstdint>

namespace overspill {

// Where the time of tokens went, and what was seen on the way.
struct Breakdown {
    double wait_s = 0;    // until other streams had their turn
    double decode_s = 0;  // llama_decode: on a CPU all of the computation, on a GPU the launch of it
    double sync_s = 0;    // waiting for devices
    double logits_s = 0;  // finding the row
    double sample_s = 0;
    double python_s = 0;  // in functions of the caller that choose
    double text_s = 0;    // token to text, stop strings
    double caller_s = 0;  // between a token and the question for the next
    int64_t n_graphs_reused = 0;
    int64_t n_threads_left_out = 0;   // summed over steps, for other programs
    int64_t n_major_page_faults = 0;  // of the whole process meanwhile; -1 where the system does not tell
    int32_t n_graph_splits = 0;

    // Adds the times of a step, its reuse of the graph, and the threads that it left out.
    void add(const Breakdown & step);
};

}  // namespace overspill
