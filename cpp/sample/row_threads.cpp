#include "sample/row_threads.h"

#include "base/stopwatch.h"

namespace overspill {

namespace {

constexpr size_t fewest_logits = 32768;  // of fewer, a pass takes no longer than to ask a thread
constexpr uint32_t n_trial_draws = 16;   // half of them with help
constexpr uint32_t n_draws_until_next_trial = 1024;
constexpr double worth_it = 0.9;  // of the time, since others may want the cores

}  // namespace

void RowThreads::begin(size_t n_logits) {
    const bool on_trial = n_draws_ < n_trial_draws;
    // Not every other one: a grammar draws twice for a token, and the second draw is another.
    const bool in_turn = ((n_draws_ + 1) / 2) % 2 == 1;
    helped_ = n_logits >= fewest_logits && (on_trial ? in_turn : help_);
    seconds_ = 0;
}

void RowThreads::pass(const Pass & pass) {
    const Stopwatch watch;
    if (helped_) {
        run(pass);
    } else {
        pass(0, 1);
    }
    seconds_ += watch.seconds();
}

void RowThreads::end() {
    if (n_draws_ < n_trial_draws) {
        (helped_ ? together_s_ : alone_s_) += seconds_;
    }
    ++n_draws_;
    if (n_draws_ == n_trial_draws) {
        help_ = together_s_ > 0 && together_s_ < worth_it * alone_s_;
        alone_s_ = together_s_ = 0;
    } else if (n_draws_ == n_draws_until_next_trial) {
        n_draws_ = 0;
    }
}

}  // namespace overspill
