#include "generate/batch_sizes.h"

#include <algorithm>

namespace overspill {

namespace {

// The mean is that of about so many steps.
constexpr double window = 8;
constexpr uint32_t n_steps_of_trial = 3;
// Between trials, as multiples of what the last one took; longer each time that one brought nothing.
constexpr double pause_per_trial = 20;
constexpr double most_pause_per_trial = 200;
constexpr double pause_growth = 1.5;
// Groups of another size have to be faster by more than chance.
constexpr double worth_it = 1.03;
constexpr size_t n_candidates = 4;

size_t size_of(uint32_t n) {
    size_t size = 0;
    while (size + 1 < n_batch_sizes && (uint32_t{2} << size) <= n) {
        ++size;
    }
    return size;
}

}  // namespace

bool GroupSize::is_better(size_t one, size_t other) const {
    return rates_[one].tokens_per_s > worth_it * rates_[other].tokens_per_s;
}

uint32_t GroupSize::of(uint32_t n) {
    top_ = size_of(n);
    if (top_ > largest_top_) {
        largest_top_ = top_;
        until_trial_s_ = 0;
    }
    const size_t size = n_trial_ > 0 && trying_ <= top_ ? trying_ : std::min(limit_, top_);
    return size == top_ ? n : uint32_t{1} << size;
}

void GroupSize::took(uint32_t n, double seconds) {
    const size_t size = size_of(n);
    Rate & rate = rates_[size];
    ++rate.n_steps;
    rate.tokens_per_s += (n / std::max(seconds, 1e-9) - rate.tokens_per_s) / std::min<double>(rate.n_steps, window);
    if (top_ == 0) {
        return;
    }
    const size_t at = std::min(limit_, top_);
    if (n_trial_ > 0 && size == trying_) {
        trial_s_ += seconds;
        if (--n_trial_ > 0) {
            return;
        }
        if (is_better(trying_, at)) {
            const bool is_largest = std::all_of(rates_.begin() + static_cast<ptrdiff_t>(trying_) + 1, rates_.end(),
                                                [](const Rate & larger) { return larger.n_steps == 0; });
            limit_ = is_largest ? n_batch_sizes : trying_;
            pause_s_ = 0;
        }
        pause_s_ = std::clamp(pause_growth * pause_s_, pause_per_trial * trial_s_, most_pause_per_trial * trial_s_);
        until_trial_s_ = pause_s_;
        return;
    }
    if (size != at) {
        return;
    }
    until_trial_s_ -= seconds;
    if (rate.n_steps < n_steps_of_trial || until_trial_s_ > 0) {
        return;
    }
    // Neighbours, and one stream at a time: between neighbours the difference may be too small to see.
    const std::array<size_t, n_candidates> candidates{at > 0 ? at - 1 : at + 1, 0, at + 1, top_};
    while (candidates[n_tried_ % n_candidates] == at || candidates[n_tried_ % n_candidates] > top_) {
        ++n_tried_;
    }
    trying_ = candidates[n_tried_++ % n_candidates];
    trial_s_ = 0;
    rates_[trying_].n_steps = 0;  // what was measured before was of other depths
    n_trial_ = n_steps_of_trial;
}

uint32_t PieceSize::within(double limit_s, uint32_t n_most) const {
    // A part of the limit: steps differ, and later tokens of a prompt take longer.
    const double enough_s = 0.7 * limit_s;
    constexpr size_t first = 4;
    size_t best = first;
    for (size_t size = 0; size < n_batch_sizes; ++size) {
        const bool is_known = seconds_[size] > 0;
        // Twice as many tokens may take twice as long.
        const bool could_be = size > 0 && seconds_[size - 1] > 0 && 2 * seconds_[size - 1] <= enough_s;
        if (is_known ? seconds_[size] <= enough_s : could_be) {
            best = size;
        } else if (is_known && size <= first) {
            best = std::min(best, size > 0 ? size - 1 : size);
        }
    }
    return std::clamp(uint32_t{1} << best, uint32_t{1}, std::max(n_most, uint32_t{1}));
}

void PieceSize::took(uint32_t n, double seconds) {
    double & mean = seconds_[size_of(n)];
    // Slower ones count at once, so that the next are shorter.
    mean = mean == 0 || seconds > mean ? seconds : mean + (seconds - mean) / 4;
    // What was slow once, from a cold disk say, may be as fast by now as this lets expect.
    const size_t next = size_of(n) + 1;
    if (next < n_batch_sizes && seconds_[next] > 2 * mean) {
        seconds_[next] = std::max(2 * mean, 0.95 * seconds_[next]);
    }
}

double PieceSize::seconds_per_token() const {
    double least = 0;
    for (size_t size = 0; size < n_batch_sizes; ++size) {
        const double mean = seconds_[size] / static_cast<double>(uint32_t{1} << size);
        least = mean > 0 && (least == 0 || mean < least) ? mean : least;
    }
    return least;
}

}  // namespace overspill
