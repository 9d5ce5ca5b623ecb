// Why a reply ended.
#pragma once

namespace overspill {

enum class StopReason { none, eos, stop_string, max_tokens, context_full, closed, interrupted, error };

}  // namespace overspill
