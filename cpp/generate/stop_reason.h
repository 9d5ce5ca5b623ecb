// Why a reply ended.
#pragma once

#include <string>

namespace overspill {

enum class StopReason { none, eos, stop_string, max_tokens, context_full, closed, interrupted, error };
const char * stop_reason_name(StopReason reason);     // "eos", "stop_string", ...
StopReason stop_reason_of(const std::string & name);  // throws std::invalid_argument

}  // namespace overspill
