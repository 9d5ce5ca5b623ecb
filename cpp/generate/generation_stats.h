#pragma once

#include "generate/stop_reason.h"
#include "model/breakdown.h"

#include <cstddef>
#include <cstdint>
#include <optional>

namespace overspill {

struct GenerationStats {
    size_t n_prompt_tokens = 0;
    size_t n_cached_tokens = 0;   // of the prompt, not decoded again
    size_t n_dropped_tokens = 0;  // to make room
    int64_t n_tokens = 0;
    double prefill_s = 0;
    double decode_s = 0;
    std::optional<double> time_to_first_token_s;
    StopReason stop_reason = StopReason::none;
    Breakdown breakdown = {};  // of decode_s, and of the caller's time meanwhile
};

}  // namespace overspill
