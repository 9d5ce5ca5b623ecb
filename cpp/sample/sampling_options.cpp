#include "sample/sampling_options.h"

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace overspill {

namespace {

// The conditions below are written as `!(in range)`, so that NaN is out of range too.
template <typename T>
[[noreturn]] void out_of_range(const char * name, const char * range, T value) {
    std::ostringstream message;
    message << name << " must be " << range << ", not " << value;
    throw std::invalid_argument(message.str());
}

void check_not_negative(const char * name, float value) {
    if (!(value >= 0 && std::isfinite(value))) {
        out_of_range(name, "0 or more and finite", value);
    }
}

void check_share(const char * name, float value) {
    if (!(value >= 0 && value <= 1)) {
        out_of_range(name, "0 to 1", value);
    }
}

void check_finite(const char * name, float value) {
    if (!std::isfinite(value)) {
        out_of_range(name, "finite", value);
    }
}

void check_at_least(const char * name, int32_t value, int32_t least) {
    if (value < least) {
        out_of_range(name, ("at least " + std::to_string(least)).c_str(), value);
    }
}

}  // namespace

void check(const SamplingOptions & o) {
    check_not_negative("temperature", o.temperature);
    check_not_negative("dynamic_temperature_range", o.dynamic_temperature_range);
    check_finite("dynamic_temperature_exponent", o.dynamic_temperature_exponent);
    check_at_least("top_k", o.top_k, 0);
    check_share("top_p", o.top_p);
    check_share("min_p", o.min_p);
    check_share("typical_p", o.typical_p);
    check_not_negative("top_n_sigma", o.top_n_sigma);
    check_share("xtc_probability", o.xtc_probability);
    check_share("xtc_threshold", o.xtc_threshold);
    if (!(o.repeat_penalty > 0 && std::isfinite(o.repeat_penalty))) {
        out_of_range("repeat_penalty", "over 0 and finite", o.repeat_penalty);
    }
    check_finite("frequency_penalty", o.frequency_penalty);
    check_finite("presence_penalty", o.presence_penalty);
    check_at_least("repeat_last_n", o.repeat_last_n, -1);
    check_not_negative("dry_multiplier", o.dry_multiplier);
    if (!(o.dry_base >= 1 && std::isfinite(o.dry_base))) {
        out_of_range("dry_base", "1 or more and finite", o.dry_base);
    }
    check_at_least("dry_allowed_length", o.dry_allowed_length, 0);
    check_at_least("dry_last_n", o.dry_last_n, -1);
    if (o.mirostat != 0 && o.mirostat != 2) {
        out_of_range("mirostat", "0 or 2 (version 1 is not supported)", o.mirostat);
    }
    check_not_negative("mirostat_tau", o.mirostat_tau);
    check_not_negative("mirostat_eta", o.mirostat_eta);
    for (const auto & [token, bias] : o.logit_bias) {
        check_at_least("logit_bias: a token", token, 0);
        if (std::isnan(bias) || (std::isinf(bias) && bias > 0)) {
            out_of_range("logit_bias: a value", "finite or -inf", bias);
        }
    }
    for (const auto & breaker : o.dry_breakers) {
        if (breaker.empty()) {
            throw std::invalid_argument("dry_breakers must not contain an empty sequence");
        }
    }
    if (o.seed == std::numeric_limits<uint32_t>::max()) {
        out_of_range("seed", "0 to 4294967294", *o.seed);
    }
}

}  // namespace overspill
