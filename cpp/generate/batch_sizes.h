// How much is decoded at once: of the streams that are ready for a token, and of a prompt between their tokens.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace overspill {

// Powers of two from 1.
constexpr size_t n_batch_sizes = 17;

// How many streams share a batch: the number with the most tokens per second in total, as measured. A batch reads
// dense weights once for all of them, but nearly as many experts of a mixture as there are streams.
class GroupSize {
  public:
    // At most n.
    uint32_t of(uint32_t n);
    // What a batch of n tokens took.
    void took(uint32_t n, double seconds);

  private:
    struct Rate {
        double tokens_per_s = 0;
        uint32_t n_steps = 0;
    };
    bool is_better(size_t one, size_t other) const;

    std::array<Rate, n_batch_sizes> rates_{};  // of at least so many streams, and less than twice as many
    size_t top_ = 0;  // of the batch that could be now: how many are ready changes from step to step
    size_t largest_top_ = 0;
    size_t limit_ = n_batch_sizes;  // larger groups than of that size are slower
    size_t trying_ = 0;
    uint32_t n_trial_ = 0;  // steps of the trial that are to come
    double trial_s_ = 0;
    double until_trial_s_ = 0;
    double pause_s_ = 0;
    size_t n_tried_ = 0;
};

// How many tokens of a prompt are read between the tokens of other streams, so that these wait no longer than they may.
class PieceSize {
  public:
    // At most n_most, at least 1.
    uint32_t within(double limit_s, uint32_t n_most) const;
    void took(uint32_t n, double seconds);
    // Of the fastest size; 0: not known.
    double seconds_per_token() const;

  private:
    std::array<double, n_batch_sizes> seconds_{};  // of pieces of about that size, lately; 0: not known
};

}  // namespace overspill
