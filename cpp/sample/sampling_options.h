// What to make of a row of logits.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace overspill {

// Defaults are llama.cpp's. Ranges are in the table below.
struct SamplingOptions {
    float temperature = 0.8F;                   // 0: always the most likely token
    float dynamic_temperature_range = 0.0F;     // 0: off, else temperature - range to temperature + range
    float dynamic_temperature_exponent = 1.0F;  // how the entropy maps to that range
    int32_t top_k = 40;                         // 0: all
    float top_p = 0.95F;                        // 1: all
    float min_p = 0.05F;                        // 0: all
    float typical_p = 1.0F;                     // 1: all
    float top_n_sigma = 0.0F;                   // standard deviations; 0: all
    float xtc_probability = 0.0F;               // 0: off
    float xtc_threshold = 0.1F;                 // over 0.5: off
    float repeat_penalty = 1.0F;                // 1: off
    float frequency_penalty = 0.0F;             // 0: off
    float presence_penalty = 0.0F;              // 0: off
    int32_t repeat_last_n = 64;                 // tokens; 0: none, -1: all
    float dry_multiplier = 0.0F;                // 0: off
    float dry_base = 1.75F;
    int32_t dry_allowed_length = 2;                          // tokens
    int32_t dry_last_n = 64;                                 // tokens; 0: none, -1: all
    int32_t mirostat = 0;                                    // 0: off; 2: Mirostat v2 in place of every truncation
    float mirostat_tau = 5.0F;                               // the surprise aimed at, in bits
    float mirostat_eta = 0.1F;                               // learning rate
    std::vector<std::pair<int32_t, float>> logit_bias = {};  // token and what is added to its logit; -inf bans it
    // Token sequences over which DRY sees no repetition; see dry_breakers.h.
    std::vector<std::vector<int32_t>> dry_breakers = {};
    std::optional<uint32_t> seed = {};  // none: another one each time
};

// Each throws std::invalid_argument, naming the option and the range, for a value out of it. NaN is in no range.
namespace range {

void not_negative(const char * name, float value);
void positive(const char * name, float value);
void at_least_1(const char * name, float value);
void share(const char * name, float value);
void finite(const char * name, float value);
void natural(const char * name, int32_t value);
void last_n(const char * name, int32_t value);
void mirostat_version(const char * name, int32_t value);
void biases(const char * name, const std::vector<std::pair<int32_t, float>> & value);
void breakers(const char * name, const std::vector<std::vector<int32_t>> & value);
void seed(const char * name, const std::optional<uint32_t> & value);

}  // namespace range

// Every option once: its name, its member and its range. Checks, and what Python sets, come from this.
template <typename Visit>
void for_each_sampling_option(Visit && visit) {
    using O = SamplingOptions;
    visit("temperature", &O::temperature, range::not_negative);
    visit("dynamic_temperature_range", &O::dynamic_temperature_range, range::not_negative);
    visit("dynamic_temperature_exponent", &O::dynamic_temperature_exponent, range::finite);
    visit("top_k", &O::top_k, range::natural);
    visit("top_p", &O::top_p, range::share);
    visit("min_p", &O::min_p, range::share);
    visit("typical_p", &O::typical_p, range::share);
    visit("top_n_sigma", &O::top_n_sigma, range::not_negative);
    visit("xtc_probability", &O::xtc_probability, range::share);
    visit("xtc_threshold", &O::xtc_threshold, range::share);
    visit("repeat_penalty", &O::repeat_penalty, range::positive);
    visit("frequency_penalty", &O::frequency_penalty, range::finite);
    visit("presence_penalty", &O::presence_penalty, range::finite);
    visit("repeat_last_n", &O::repeat_last_n, range::last_n);
    visit("dry_multiplier", &O::dry_multiplier, range::not_negative);
    visit("dry_base", &O::dry_base, range::at_least_1);
    visit("dry_allowed_length", &O::dry_allowed_length, range::natural);
    visit("dry_last_n", &O::dry_last_n, range::last_n);
    visit("mirostat", &O::mirostat, range::mirostat_version);
    visit("mirostat_tau", &O::mirostat_tau, range::not_negative);
    visit("mirostat_eta", &O::mirostat_eta, range::not_negative);
    visit("logit_bias", &O::logit_bias, range::biases);
    visit("dry_breakers", &O::dry_breakers, range::breakers);
    visit("seed", &O::seed, range::seed);
}

// Throws std::invalid_argument for an option out of range.
void check(const SamplingOptions & options);

}  // namespace overspill
