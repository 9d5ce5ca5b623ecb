#pragma once

#include "generate/stop_reason.h"
#include "generate/token.h"
#include "model/breakdown.h"

#include <cstddef>

namespace overspill {

// What a step of a generation came to. It counts once the caller has it.
struct Step {
    Token token = {};
    StopReason reason = StopReason::none;
    size_t n_cached = 0;
    size_t n_dropped = 0;
    double prefill_s = 0;
    double seconds = 0;
    Breakdown times = {};
};

}  // namespace overspill
