#include "sample/sampling_options.h"

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace overspill {

namespace range {

namespace {

template <typename T>
void require(bool holds, const char * name, const char * text, T value) {
    if (!holds) {
        std::ostringstream message;
        message << name << " must be " << text << ", not " << value;
        throw std::invalid_argument(message.str());
    }
}

}  // namespace

void not_negative(const char * name, float value) {
    require(value >= 0 && std::isfinite(value), name, "0 or more and finite", value);
}

void positive(const char * name, float value) {
    require(value > 0 && std::isfinite(value), name, "over 0 and finite", value);
}

void at_least_1(const char * name, float value) {
    require(value >= 1 && std::isfinite(value), name, "1 or more and finite", value);
}

void share(const char * name, float value) {
    require(value >= 0 && value <= 1, name, "0 to 1", value);
}

void finite(const char * name, float value) {
    require(std::isfinite(value), name, "finite", value);
}

void natural(const char * name, int32_t value) {
    require(value >= 0, name, "at least 0", value);
}

void last_n(const char * name, int32_t value) {
    require(value >= -1, name, "at least -1", value);
}

void mirostat_version(const char * name, int32_t value) {
    require(value == 0 || value == 2, name, "0 or 2 (version 1 is not supported)", value);
}

void biases(const char * /*name*/, const std::vector<std::pair<int32_t, float>> & value) {
    for (const auto & [token, bias] : value) {
        natural("logit_bias: a token", token);
        require(!std::isnan(bias) && bias < std::numeric_limits<float>::infinity(), "logit_bias: a value",
                "finite or -inf", bias);
    }
}

void breakers(const char * name, const std::vector<std::vector<int32_t>> & value) {
    for (const auto & breaker : value) {
        if (breaker.empty()) {
            throw std::invalid_argument(std::string(name) + " must not contain an empty sequence");
        }
    }
}

void seed(const char * name, const std::optional<uint32_t> & value) {
    require(value != std::numeric_limits<uint32_t>::max(), name, "0 to 4294967294", value.value_or(0));
}

}  // namespace range

void check(const SamplingOptions & options) {
    for_each_sampling_option(
        [&](const char * name, auto member, auto check_range) { check_range(name, options.*member); });
}

}  // namespace overspill
