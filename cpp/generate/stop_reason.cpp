#include "generate/stop_reason.h"

#include <array>
#include <stdexcept>
#include <utility>

namespace overspill {

namespace {

constexpr std::array<std::pair<StopReason, const char *>, 7> reason_names{{
    {StopReason::eos, "eos"},
    {StopReason::stop_string, "stop_string"},
    {StopReason::max_tokens, "max_tokens"},
    {StopReason::context_full, "context_full"},
    {StopReason::closed, "closed"},
    {StopReason::interrupted, "interrupted"},
    {StopReason::error, "error"},
}};

}  // namespace

const char * stop_reason_name(StopReason reason) {
    for (const auto & [known, name] : reason_names) {
        if (known == reason) {
            return name;
        }
    }
    return "none";
}

StopReason stop_reason_of(const std::string & name) {
    for (const auto & [reason, known] : reason_names) {
        if (known == name) {
            return reason;
        }
    }
    throw std::invalid_argument("reason: " + name + " is not a stop reason");
}

}  // namespace overspill
