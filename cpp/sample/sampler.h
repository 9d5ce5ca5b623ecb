// Logits in, one token out.
//
// The chain is llama.cpp's, in its order: logit bias, penalties, DRY, top-n-sigma, top-k, typical,
// top-p, min-p, XTC, temperature, draw. It works on the row of logits where it lies: biases and
// penalties are kept beside the row, truncation moves a cut, and only what little is left of
// the vocabulary after it is ever listed.
#pragma once

#include "sample/kernels.h"
#include "sample/logit_edits.h"
#include "sample/sampling_options.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

namespace overspill {

struct TokenProbability {
    int32_t id;
    float probability;
};

// Natural logarithms under softmax(logits): before biases, penalties, truncation and temperature.
struct Logprobs {
    float chosen = 0;
    std::vector<std::pair<int32_t, float>> top = {};  // the most likely tokens, best first
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

    // The token chosen from `n` logits, at least 1, which are not changed. Tokens without a bit in
    // `allowed`, of which there are n_words, are as good as not there; null allows all. With
    // `logprobs`, the chosen token's and those of the logprobs->top.size() most likely ones.
    // Throws Error if a logit is NaN or +inf, or nothing is left that could be drawn.
    int32_t sample(const float * logits, size_t n, TokenBits allowed = nullptr, size_t n_words = 0,
                   Logprobs * logprobs = nullptr);

    // Fills in those of a token that was chosen elsewhere, and of the logprobs.top.size() most likely ones.
    void measure_logprobs(const float * logits, size_t n, int32_t chosen, Logprobs & logprobs);

    // What the next sample() would draw from, the most likely first. Changes nothing.
    std::vector<TokenProbability> distribution(const float * logits, size_t n, TokenBits allowed = nullptr,
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
    void restore(const SamplerState & state);

    const SamplingOptions & options() const { return options_; }
    // Whether the answer depends on nothing but the logits and the options.
    bool greedy() const { return greedy_; }

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
    struct Candidate {
        float logit;
        int32_t id;
        float weight;
    };
    // A place in the order of likelihood: by logit, and by id among equals.
    struct Place {
        float logit;
        int32_t id;
    };
    struct Chosen {
        int32_t id;
        float logit;
        double probability;
    };

    // The most likely tokens, down to a logit, and an estimate of the rest.
    struct Glance {
        float low;
        double mass;
        double rest;
        double stands_for;  // logits for each one of the sample
    };

    static bool before(const Candidate & a, const Candidate & b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    }
    bool kept(float logit, int32_t id) const { return logit > cut_.logit || (logit == cut_.logit && id <= cut_.id); }
    bool allowed(int32_t id) const {
        return allowed_ == nullptr || ((allowed_[id / 32] >> (static_cast<uint32_t>(id) % 32)) & 1U) != 0;
    }

    void take_row(const float * logits, size_t n);
    void look_at(const float * logits, size_t n, TokenBits allowed, size_t n_words, Logprobs * logprobs);
    void restore_bits();
    void measure_logprobs(Logprobs & logprobs, bool maxima_are_of_all);
    int32_t best() const;
    float kth_largest_maximum(const std::vector<float> & maxima, TokenBits allowed, size_t k);
    float kth_largest_of_lanes(TokenBits allowed, size_t k);
    float kth_largest_float(size_t k);

    // Each lowers the cut, or shortens the list.
    void truncate();
    void cut_below(float logit);
    void cut_top_n_sigma();
    void cut_top_k(size_t k);
    void cut_typical();
    void cut_top_p();
    bool cut_top_p_of_row();
    Glance glance(size_t k);
    bool cut_top_p_of_most_likely(Glance & seen);
    bool cut_top_p_by_sample(double n_deviations);
    void cut_min_p();
    void cut_xtc();
    void hide(int32_t id);
    float final_temperature();

    void list(float low, float high);
    void list_kept();
    float listed_largest() const;
    double weigh_list(float largest, float scale);
    double entropy_of_list(float largest, double total) const;
    double edited_mass(float low) const;
    template <typename Distance>
    void keep_nearest(double mass, const Distance & distance);
    void keep_most_likely(double mass);

    Chosen draw(float temperature);
    Chosen draw_from_list(float scale);
    Chosen draw_from_row(float scale);
    Chosen draw_from_sums(float scale);
    Chosen draw_truncated();
    Chosen draw_from_nucleus(const Glance & seen, float temperature);
    Chosen draw_mirostat();
    double uniform();

    SamplingOptions options_;
    const Kernels * kernels_;
    bool greedy_;
    bool only_top_p_;

    mutable Busy busy_;
    // --- state ---
    uint32_t seed_ = 0;
    uint64_t n_draws_ = 0;
    std::mt19937_64 random_;
    float mirostat_mu_ = 0;
    LogitEdits logit_edits_;

    // --- of the row in hand, kept for their memory ---
    const float * logits_ = nullptr;
    size_t n_ = 0;
    TokenBits allowed_ = nullptr;  // without the edited tokens
    float largest_ = 0;
    std::vector<float> maxima_;     // of each block
    std::vector<uint32_t> bits_;    // what allowed_ points to, if to anything
    std::vector<Candidate> edits_;  // tokens whose logit is not what stands in the row

    Place cut_{};           // what is kept: this and what comes before it
    bool listed_ = false;   // whether list_ holds what is kept
    bool sorted_ = false;   // whether it does so in order
    size_t n_nominal_ = 0;  // as llama.cpp counts candidates, with those of -inf; 0: not known
    std::vector<Candidate> list_;
    std::vector<int32_t> ids_;
    std::vector<float> floats_;
    std::vector<float> sums_;
    std::vector<float> parts_;
};

}  // namespace overspill
