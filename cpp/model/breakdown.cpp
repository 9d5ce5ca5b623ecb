#include "model/breakdown.h"

namespace overspill {

void Breakdown::add(const Breakdown & step) {
    wait_s += step.wait_s;
    decode_s += step.decode_s;
    sync_s += step.sync_s;
    logits_s += step.logits_s;
    sample_s += step.sample_s;
    python_s += step.python_s;
    text_s += step.text_s;
    n_graphs_reused += step.n_graphs_reused;
    n_threads_left_out += step.n_threads_left_out;
}

}  // namespace overspill
