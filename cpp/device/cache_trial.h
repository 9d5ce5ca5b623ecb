// Whether decoding is faster with a cache of experts than without.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace overspill {

// Found once, with a few tokens in turns. It is worth having if a token takes less than a share of its time without.
class CacheTrial {
  public:
    CacheTrial(bool is_over, double worth) : worth_(worth), is_over_(is_over) {}
    bool uses_cache() const { return uses_; }
    bool is_over() const { return is_over_; }
    // And was none from the beginning.
    bool has_measured() const { return is_over_ && !with_.empty(); }
    // A token was decoded, with a cache that is full.
    void note(double seconds) {
        if (is_over_) {
            return;
        }
        // The first one of a turn finds other weights in the CPU's caches than those that follow.
        if (++n_of_turn_ > 1) {
            (uses_ ? with_ : without_).push_back(seconds);
        }
        if (n_of_turn_ < n_in_turn) {
            return;
        }
        n_of_turn_ = 0;
        if (uses_) {
            uses_ = false;
            return;
        }
        const double with = middle(with_), limit = worth_ * middle(without_);
        is_over_ = with < clearly * limit || limit < clearly * with || with_.size() >= most_turns * (n_in_turn - 1);
        uses_ = !is_over_ || with <= limit;
    }

  private:
    static constexpr size_t most_turns = 4, n_in_turn = 5;
    static constexpr double clearly = 0.9;

    static double middle(std::vector<double> & values) {
        const auto at = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
        std::nth_element(values.begin(), at, values.end());
        return *at;
    }

    const double worth_;
    bool uses_ = true, is_over_;
    size_t n_of_turn_ = 0;
    std::vector<double> with_, without_;
};

}  // namespace overspill
