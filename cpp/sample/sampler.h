// Logits in, one token out.
//
// The chain is llama.cpp's, in its order: logit bias, penalties, DRY (logit_edits.h), top-n-sigma, top-k, typical,
// top-p, min-p, XTC (truncation.h), temperature, draw (draw.h). It works on the row of logits in place
// (row.h): biases and penalties are kept beside the row, truncation moves a cut, and only what little is left of the
// vocabulary after it is ever listed (candidates.h).
#pragma once

#include "base/interrupt.h"
#include "sample/candidates.h"
#include "sample/kernels.h"
#include "sample/logit_edits.h"
#include "sample/logprobs.h"
#include "sample/random.h"
#include "sample/row_threads.h"
#include "sample/sampling_options.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace overspill {

struct TokenProbability {
    int32_t id;
    float probability;
};

// All that makes a sampler draw differently from a new one with the same options.
struct SamplerState {
    uint32_t seed = 0;
    uint64_t n_draws = 0;
    std::vector<int32_t> history = {};  // as much of it as penalties and DRY look at
    float mirostat_mu = 0;
};

// Draws tokens from rows of logits. A draw allocates nothing once it has seen a row of that size.
// Copies draw alike, independently of each other. Used by two threads at once, it throws Error.
class Sampler {
  public:
    // Throws std::invalid_argument for an option out of range.
    explicit Sampler(SamplingOptions options);

    // The token chosen from logits, at least one, which are not changed. Tokens without a bit in
    // `allowed`, of which there are n_words, are as good as not there; null allows all. With
    // `logprobs`, the chosen token's and those of the logprobs->top.size() most likely ones.
    // Throws Error if a logit is NaN or +inf, or nothing is left that could be drawn.
    int32_t sample(const LogitsRow & row, TokenBits allowed = nullptr, size_t n_words = 0,
                   Logprobs * logprobs = nullptr);

    // Fills in those of a token that was chosen elsewhere, and of the logprobs.top.size() most likely ones.
    void measure_logprobs(const LogitsRow & row, int32_t chosen, Logprobs & logprobs);

    // What the next sample() would draw from, the most likely first. Changes nothing.
    std::vector<TokenProbability> distribution(const LogitsRow & row, TokenBits allowed = nullptr,
                                               size_t n_words = 0) const;

    // Tells penalties and DRY that `token` is part of the text now. Throws std::invalid_argument for one that no
    // vocabulary has.
    void accept(int32_t token);

    // Back to the state after construction, with the same seed.
    void reset();

    // Another one that draws alike, and independently.
    std::shared_ptr<Sampler> clone() const;

    SamplerState state() const;
    // Throws std::invalid_argument for tokens that no vocabulary has, or for more than 2^32 draws.
    void restore(const SamplerState & state, const Interrupt::Poll & poll = {});

    const SamplingOptions & options() const { return options_; }

  private:
    // Says that somebody is at work, and is not copied.
    class Busy {
      public:
        Busy() = default;
        Busy(const Busy & /*other*/) {}
        Busy & operator=(const Busy & /*other*/) { return *this; }
        void enter();  // throws Error
        void leave() { flag_.clear(std::memory_order_release); }

      private:
        std::atomic_flag flag_ = ATOMIC_FLAG_INIT;
    };
    class Working {
      public:
        explicit Working(Busy & busy) : busy_(busy) { busy_.enter(); }
        ~Working() { busy_.leave(); }
        Working(const Working &) = delete;
        Working & operator=(const Working &) = delete;

      private:
        Busy & busy_;
    };
    void take(const LogitsRow & row, TokenBits allowed, size_t n_words);

    SamplingOptions options_;
    bool greedy_;      // whether the answer depends on nothing but the logits and the options
    bool only_top_p_;  // of the truncations

    mutable Busy busy_;
    // --- state ---
    Random random_;
    float mirostat_mu_ = 0;
    LogitEdits logit_edits_;

    Candidates candidates_;  // of the row in hand
};

}  // namespace overspill
