#pragma once

#include "generate/step_logits.h"
#include "generate/stop_reason.h"
#include "generate/token.h"
#include "model/breakdown.h"

#include <cstddef>

namespace overspill {

// What a step of a generation came to. It counts once the caller has it.
struct Step {
    Token token = {};
    StopReason reason = StopReason::none;
    StepLogits row = {};   // where the stream's own thread is to choose the token
    bool is_full = false;  // no token has room after this one
    size_t n_cached = 0;
    size_t n_dropped = 0;
    double seconds = 0;
    Breakdown times = {};
};

}  // namespace overspill
