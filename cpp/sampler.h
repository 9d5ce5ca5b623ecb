// Logits in, one token out.
#pragma once

#include <llama.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace overspill {

// Defaults are llama.cpp's. Ranges are checked by Sampler's constructor.
struct SamplingOptions {
    float temperature = 0.8F;           // 0: always the most likely token
    int32_t top_k = 40;                 // 0: all
    float top_p = 0.95F;                // 0 to 1; 1: all
    float min_p = 0.05F;                // 0 to 1; 0: all
    float repeat_penalty = 1.0F;        // over 0; 1: off
    float frequency_penalty = 0.0F;     // 0: off
    float presence_penalty = 0.0F;      // 0: off
    int32_t repeat_last_n = 64;         // tokens; 0: none, -1: the whole context
    std::optional<uint32_t> seed = {};  // none: another one each time
};

// Draws tokens from rows of logits. Owns everything it needs: a draw allocates nothing.
class Sampler {
  public:
    // Throws std::invalid_argument for an option out of range. `n_ctx` is what repeat_last_n = -1 means.
    Sampler(const SamplingOptions & options, int32_t n_vocab, int32_t n_ctx);

    // The token chosen from `logits` (n_vocab of them, not changed).
    // Throws Error if they are not numbers.
    int32_t sample(const float * logits);

    // Tells the penalties that `token` is part of the text now.
    void accept(int32_t token);

  private:
    struct ChainDeleter {
        void operator()(llama_sampler * chain) const { llama_sampler_free(chain); }
    };

    size_t n_vocab_;
    bool greedy_;
    std::unique_ptr<llama_sampler, ChainDeleter> chain_;
    std::vector<llama_token_data> candidates_;
};

// The first index of the largest of `n` logits, n at least 1.
size_t argmax(const float * logits, size_t n);

// The natural logarithm of the token's probability under softmax(logits).
float log_probability(const float * logits, size_t n, int32_t token);

}  // namespace overspill
