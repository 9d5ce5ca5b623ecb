// A row of logits where llama.cpp wrote it, which is never changed: biases, penalties and masks are kept beside it.
#pragma once

#include "sample/candidate.h"
#include "sample/kernels.h"
#include "sample/logit_edits.h"
#include "sample/logprobs.h"
#include "sample/row_threads.h"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace overspill {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float lowest = std::numeric_limits<float>::lowest();
constexpr int32_t any_id = std::numeric_limits<int32_t>::max();

double total_of(const std::vector<float> & values);

// Throws Error: another thread writes to the logits.
[[noreturn]] void row_has_changed();

// Keeps its memory: from the second row of a size on, nothing is allocated.
class Row {
  public:
    Row() : kernels_(&kernels()) {}

    // Takes a row in hand. Tokens without a bit in `allowed`, of which there are n_words, are as good as not
    // there; null allows all. Throws Error if a logit is NaN or +inf, or nothing is left that could be drawn.
    void take(const LogitsRow & row, const std::vector<EditedLogit> & edits, TokenBits allowed, size_t n_words);
    // The same where only measure() is to come.
    void take_unedited(const float * logits, size_t n);
    // Hides nothing any more, and asks no threads for help.
    void let_go();

    size_t size() const { return n_; }
    float operator[](size_t id) const { return logits_[id]; }
    const float * block(size_t index) const { return logits_ + index * block_size; }
    const std::vector<float> & maxima() const { return maxima_; }  // of each block, without edited tokens
    float largest() const { return largest_; }
    // Tokens whose logit is not what stands in the row, which are hidden there.
    const std::vector<Candidate> & edits() const { return edits_; }
    bool allows(int32_t id) const {
        return allowed_ == nullptr || ((allowed_[id / 32] >> (static_cast<uint32_t>(id) % 32)) & 1U) != 0;
    }

    // The token of the largest logit, the first among equals.
    int32_t best() const;
    // Makes a token as good as not there until the row is let go.
    void hide(int32_t id);
    // After the most likely ones were hidden.
    void set_largest(float logit) { largest_ = logit; }

    // A logit that at least `k` of the row, without edited tokens, are not less than.
    float at_least(size_t k) { return at_least(maxima_, allowed_, k); }

    // Writes the candidates from `low` to below `high`, in no order.
    void list(float low, float high, std::vector<Candidate> & to);

    // Adds up exp((logit - largest) * scale) of the logits from `low` on, edited tokens left out: block by block
    // into sums().
    void add_up(float low, float scale = 1.0F);
    // The same with scale 1, and the part of it that comes from logits of at least `split`.
    void add_up_split(float low, float split);
    // The same with scale 1, and as its parts the sums of exp(x) * x, where x is the difference from the largest.
    void add_up_weighted(float low);
    const std::vector<float> & sums() const { return sums_; }
    double total() const { return total_of(sums_); }
    double total_of_parts() const { return total_of(parts_); }
    // The sum of exp(logit - largest) over the edited tokens from `low` on.
    double edited_mass(float low) const;

    // The standard deviation of all logits that are not -inf.
    double deviation();

    // exp((logit - largest) * scale), one by one; 0 if it is under 1e-37.
    void exps(const float * logits, size_t n, float largest, float scale, float * out) const {
        kernels_->exps(logits, n, largest, scale, out);
    }

    // Of the row as the model gave it. Leaves logprobs.chosen to be added to the chosen token's logit.
    void measure(Logprobs & logprobs);

  private:
    void make_room(const float * logits, size_t n);
    struct Part {
        const float * logits;
        size_t n;
        TokenBits allowed;
    };
    template <typename Pass>
    void each_part(TokenBits allowed, const Pass & pass);
    bool find_maxima(TokenBits allowed, std::vector<float> & maxima);
    float at_least(const std::vector<float> & maxima, TokenBits allowed, size_t k);
    float at_least_of_lanes(TokenBits allowed, size_t k);
    float kth_largest_group(size_t k);

    const Kernels * kernels_;
    RowThreads * threads_ = nullptr;
    const float * logits_ = nullptr;
    size_t n_ = 0;
    TokenBits allowed_ = nullptr;  // without the edited tokens
    float largest_ = 0;
    std::vector<float> maxima_;
    std::vector<uint32_t> bits_;  // what allowed_ points to, if to anything
    std::vector<Candidate> edits_;
    std::vector<float> sums_;
    std::vector<float> parts_;

    // Kept for their memory.
    std::vector<int32_t> ids_;
    std::vector<float> groups_;
    std::vector<Candidate> most_likely_;
};

}  // namespace overspill
