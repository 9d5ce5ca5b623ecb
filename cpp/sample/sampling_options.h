// What to make of a row of logits.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace overspill {

// Defaults are llama.cpp's. Ranges are checked by Sampler's constructor.
struct SamplingOptions {
    float temperature = 0.8F;                   // 0 or more; 0: always the most likely token
    float dynamic_temperature_range = 0.0F;     // 0 or more; 0: off, else temperature - range to temperature + range
    float dynamic_temperature_exponent = 1.0F;  // how the entropy maps to that range
    int32_t top_k = 40;                         // 0 or more; 0: all
    float top_p = 0.95F;                        // 0 to 1; 1: all
    float min_p = 0.05F;                        // 0 to 1; 0: all
    float typical_p = 1.0F;                     // 0 to 1; 1: all
    float top_n_sigma = 0.0F;                   // 0 or more standard deviations; 0: all
    float xtc_probability = 0.0F;               // 0 to 1; 0: off
    float xtc_threshold = 0.1F;                 // 0 to 1; over 0.5: off
    float repeat_penalty = 1.0F;                // over 0; 1: off
    float frequency_penalty = 0.0F;             // 0: off
    float presence_penalty = 0.0F;              // 0: off
    int32_t repeat_last_n = 64;                 // tokens; 0: none, -1: all
    float dry_multiplier = 0.0F;                // 0 or more; 0: off
    float dry_base = 1.75F;                     // 1 or more
    int32_t dry_allowed_length = 2;             // tokens, 0 or more
    int32_t dry_last_n = 64;                    // tokens; 0: none, -1: all
    int32_t mirostat = 0;                       // 0: off; 2: Mirostat v2 in place of every truncation
    float mirostat_tau = 5.0F;                  // 0 or more; the surprise aimed at, in bits
    float mirostat_eta = 0.1F;                  // 0 or more; learning rate
    std::vector<std::pair<int32_t, float>> logit_bias = {};  // token and what is added to its logit; -inf bans it
    // Token sequences over which DRY sees no repetition; see dry_breakers() in model.h.
    std::vector<std::vector<int32_t>> dry_breakers = {};
    std::optional<uint32_t> seed = {};  // none: another one each time
};

// Throws std::invalid_argument for an option out of range.
void check(const SamplingOptions & options);

}  // namespace overspill
