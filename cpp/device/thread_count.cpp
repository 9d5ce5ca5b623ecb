#include "device/thread_count.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace overspill {

namespace {

// The mean is that of steps within about this time: some turns of the system's scheduler.
constexpr double window_s = 0.2;
constexpr double trial_s = 0.05;
// What is not clear by then, is decided by the means.
constexpr double most_trial_s = 0.3;
constexpr double most_trial_steps = 16;
constexpr double fewest_steps = 2;
constexpr uint32_t most_others = 8;
// A trial ends at once where a step takes so many times the mean.
constexpr double hopeless = 4;
// Between trials that brought nothing: longer each time, up to so many times what the last one took.
constexpr double shortest_pause_s = 0.1;
constexpr double pause_growth = 3;
constexpr double longest_pause_s = 2;
constexpr double pause_per_trial = 30;
// Where steps take so long that a trial takes seconds, this counts.
constexpr double least_pause_per_trial = 10;
// Fewer threads have to be faster by more than chance; more may be as fast, so that all of them come back.
constexpr double gain_of_fewer = 0.97;
constexpr double gain_of_more = 1.02;
// The share of the latest time that is lost on a machine that is busy, or idle; in between it is what it was.
constexpr double latest_s = 0.05;
constexpr double lost_if_busy = 0.2;
constexpr double lost_if_idle = 0.05;

}  // namespace

ThreadCount::ThreadCount(int32_t n_most) {
    for (int32_t n = n_most; n >= 1; n = n * 2 / 3) {
        rungs_.push_back(n);
    }
}

void ThreadCount::Mean::add(double took_s) {
    n += 1;
    seconds += took_s;
    squares += took_s * took_s;
}

void ThreadCount::Mean::forget_half() {
    n /= 2;
    seconds /= 2;
    squares /= 2;
}

double ThreadCount::Mean::error() const {
    return std::max(0.0, squares / n - value() * value()) / n;
}

void ThreadCount::took(double seconds, uint32_t n_tokens, double lost_s) {
    if (rungs_.size() == 1 || is_other(n_tokens)) {
        return;
    }
    since_trial_s_ += seconds;
    if (trying_) {
        // Threads that were asleep come late to the first step.
        if (!std::exchange(is_first_, false) || seconds > std::max(trial_s, hopeless * here_.value())) {
            there_.add(seconds);
        }
        judge();
        return;
    }
    lost_ += std::min(1.0, seconds / latest_s) * (std::min(1.0, lost_s / seconds) - lost_);
    const bool was_idle = std::exchange(is_idle_, lost_ < (is_idle_ ? lost_if_busy : lost_if_idle));
    if (is_idle_ != was_idle) {
        here_ = {};
        pause_s_ = std::min(pause_s_, shortest_pause_s);
    }
    if (here_.seconds > window_s && here_.n > fewest_steps) {
        here_.forget_half();
    }
    here_.add(seconds);
    if (is_idle_ && at_ == 0) {
        pause_s_ = since_trial_s_ = 0;
        return;
    }
    if (is_idle_) {
        fewer_ = false;
    }
    if (here_.n >= fewest_steps && since_trial_s_ >= pause_s_) {
        start_trial();
    }
}

// Whether a step is not like those before; when some have come, they are the ones to compare. The first steps of a
// stream read its prompt, and say little of the others.
bool ThreadCount::is_other(uint32_t n_tokens) {
    const uint32_t enough = std::min(n_steps_, most_others);
    n_steps_ = enough + 1;
    if (n_tokens == n_tokens_) {
        n_others_ = 0;
    } else if (++n_others_ >= enough) {
        n_tokens_ = n_tokens;
        here_ = there_ = {};
        trying_ = false;
    }
    return n_tokens != n_tokens_;
}

void ThreadCount::start_trial() {
    if (at_ == 0 || at_ + 1 == rungs_.size()) {
        fewer_ = at_ == 0;
    }
    // Where the machine is idle again, all at once; where a part of it is, one more.
    tried_ = fewer_ ? at_ + 1 : is_idle_ && !all_failed_ ? 0 : at_ - 1;
    trying_ = is_first_ = true;
    there_ = {};
    since_trial_s_ = 0;
}

void ThreadCount::judge() {
    if (there_.n == 0) {
        return;
    }
    const double limit_s = here_.value() * (tried_ > at_ ? gain_of_fewer : gain_of_more);
    const double excess_s = there_.value() - limit_s;
    const double error_s = std::sqrt(here_.error() + there_.error());
    const bool is_hopeless = there_.value() > hopeless * here_.value();
    const bool is_long = there_.seconds >= trial_s && there_.n >= fewest_steps;
    const bool is_clear = std::abs(excess_s) > error_s;
    const bool is_last = there_.seconds >= most_trial_s || there_.n >= most_trial_steps;
    if (is_hopeless || (is_long && is_clear) || is_last) {
        end_trial(!is_hopeless && excess_s <= 0);
    }
}

void ThreadCount::end_trial(bool is_better) {
    trying_ = false;
    const double took_s = std::exchange(since_trial_s_, 0);
    all_failed_ = tried_ == 0 && !is_better;
    if (is_better) {
        at_ = tried_;
        here_ = there_;
        pause_s_ = 0;  // farther in the same direction at once
    }
    const bool is_farthest = fewer_ ? at_ + 1 == rungs_.size() : at_ == 0;
    if (!is_better || is_farthest) {
        fewer_ = !fewer_;
        const double most_s = std::min(longest_pause_s, pause_per_trial * took_s);
        const double least_s = std::max(shortest_pause_s, least_pause_per_trial * took_s);
        pause_s_ = std::max(least_s, std::min(pause_growth * pause_s_, most_s));
    }
}

}  // namespace overspill
