#include "sample/logit_edits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace overspill {

namespace {

size_t window(int32_t last_n) {
    return last_n < 0 ? std::numeric_limits<size_t>::max() : static_cast<size_t>(last_n);
}

}  // namespace

LogitEdits::LogitEdits(const SamplingOptions & options)
    : options_(options),
      penalties_(options.repeat_last_n != 0 && (options.repeat_penalty != 1.0F || options.frequency_penalty != 0.0F ||
                                                options.presence_penalty != 0.0F)),
      dry_(options.dry_multiplier > 0 && options.dry_last_n != 0) {
    if (!dry_) {
        return;
    }
    for (const auto & breaker : options.dry_breakers) {
        if (breaker.size() == 1) {
            breaking_tokens_.push_back(breaker.front());
        }
        if (!breaker.empty()) {
            reversed_breakers_.emplace_back(breaker.rbegin(), breaker.rend());
        }
    }
    std::sort(breaking_tokens_.begin(), breaking_tokens_.end());
    std::sort(reversed_breakers_.begin(), reversed_breakers_.end());
    reversed_breakers_.erase(std::unique(reversed_breakers_.begin(), reversed_breakers_.end()),
                             reversed_breakers_.end());
}

void LogitEdits::accept(int32_t token) {
    if (!penalties_ && !dry_) {
        return;
    }
    history_.push_back(token);
    if (dry_) {
        note_breaker();
    }
    if (!penalties_) {
        return;
    }
    const auto at = static_cast<size_t>(token);
    if (at >= counts_.size()) {
        counts_.resize(at + 1, 0);
        touched_at_.resize(at + 1, 0);
    }
    if (counts_[at]++ == 0) {
        touched_at_[at] = static_cast<uint32_t>(touched_.size());
        touched_.push_back(token);
    }
    const size_t n = window(options_.repeat_last_n);
    if (history_.size() > n) {
        const auto old = static_cast<size_t>(history_[history_.size() - n - 1]);
        if (--counts_[old] == 0) {
            const int32_t moved = touched_.back();
            touched_[touched_at_[old]] = moved;
            touched_at_[static_cast<size_t>(moved)] = touched_at_[old];
            touched_.pop_back();
        }
    }
}

// Whether breakers end with the latest token: those that agree with the end of the history in one token more each time,
// until none is left. The history is not looked through for each token, since it may be long.
void LogitEdits::note_breaker() {
    auto first = reversed_breakers_.cbegin();
    auto last = reversed_breakers_.cend();
    for (size_t length = 1; length <= history_.size() && first != last; ++length) {
        const int32_t token = history_[history_.size() - length];
        first = std::lower_bound(first, last, token, [&](const auto & one, int32_t t) { return one[length - 1] < t; });
        last = std::upper_bound(first, last, token, [&](int32_t t, const auto & one) { return t < one[length - 1]; });
        if (first == last || first->size() != length) {
            continue;
        }
        ++first;  // it ends here, and sorts before those that go on
        const size_t begin = history_.size() - length;
        if (breaker_length_ == 0 || begin >= breaker_begin_) {
            breaker_begin_ = begin;
            breaker_length_ = length;
        }
    }
}

void LogitEdits::forget() {
    history_.clear();
    breaker_begin_ = 0;
    breaker_length_ = 0;
    for (const int32_t token : touched_) {
        counts_[static_cast<size_t>(token)] = 0;
    }
    touched_.clear();
}

std::vector<int32_t> LogitEdits::history() const {
    size_t n = 0;
    if (penalties_) {
        n = std::max(n, window(options_.repeat_last_n));
    }
    if (dry_) {
        n = std::max(n, window(options_.dry_last_n));
    }
    n = std::min(n, history_.size());
    return {history_.end() - static_cast<std::ptrdiff_t>(n), history_.end()};
}

// DRY (github.com/oobabooga/text-generation-webui, pull request 5677): which tokens would continue a repetition
// of what was said before, and how long that repetition is already.
void LogitEdits::note_repetitions() {
    repetitions_.clear();
    const size_t n = std::min(history_.size(), window(options_.dry_last_n));
    const auto shortest = static_cast<size_t>(options_.dry_allowed_length);
    if (n <= shortest) {
        return;
    }
    // The history from its end.
    const auto back = [this](size_t i) { return history_[history_.size() - 1 - i]; };

    // No repetition reaches over the latest breaker. Of those that begin there, the longest counts.
    const bool is_broken = breaker_length_ > 0 && breaker_begin_ >= history_.size() - n;
    const size_t longest_allowed = is_broken ? history_.size() - breaker_begin_ - breaker_length_ : n;
    if (longest_allowed < shortest) {
        return;
    }

    // For each i, how many tokens before it are as at the end: the Z-function of the reversed history
    // (Gusfield 1997, chapter 1), linear in its length.
    suffix_lengths_.assign(n, 0);
    size_t box_begin = 0;
    size_t box_end = 0;
    for (size_t i = 1; i < n; ++i) {
        size_t length = 0;
        if (i < box_end) {
            length = std::min(static_cast<size_t>(suffix_lengths_[i - box_begin]), box_end - i);
        }
        while (i + length < n && back(length) == back(i + length)) {
            ++length;
        }
        suffix_lengths_[i] = static_cast<int32_t>(length);
        if (i + length > box_end) {
            box_begin = i;
            box_end = i + length;
        }
        const size_t repeated = std::min(length, longest_allowed);
        if (repeated >= shortest) {
            repetitions_.emplace_back(back(i - 1), static_cast<int32_t>(repeated));
        }
    }
    // The longest per token.
    std::sort(repetitions_.begin(), repetitions_.end(), [](const auto & a, const auto & b) {
        return a.first < b.first || (a.first == b.first && a.second > b.second);
    });
    repetitions_.erase(std::unique(repetitions_.begin(), repetitions_.end(),
                                   [](const auto & a, const auto & b) { return a.first == b.first; }),
                       repetitions_.end());
    const auto is_breaker = [this](const auto & repetition) {
        return std::binary_search(breaking_tokens_.begin(), breaking_tokens_.end(), repetition.first);
    };
    repetitions_.erase(std::remove_if(repetitions_.begin(), repetitions_.end(), is_breaker), repetitions_.end());
}

const std::vector<EditedLogit> & LogitEdits::of(const float * logits, size_t n) {
    edits_.clear();
    const auto touch = [&](int32_t token) {
        if (static_cast<size_t>(token) < n) {
            edits_.push_back({token, logits[token]});
        }
    };
    for (const auto & [token, bias] : options_.logit_bias) {
        if (static_cast<size_t>(token) >= n) {
            throw std::invalid_argument("logit_bias: a token must be less than the number of logits, " +
                                        std::to_string(n) + ", not " + std::to_string(token));
        }
        touch(token);
    }
    if (penalties_) {
        std::for_each(touched_.begin(), touched_.end(), touch);
    }
    if (dry_) {
        note_repetitions();
        std::for_each(repetitions_.begin(), repetitions_.end(), [&](const auto & one) { touch(one.first); });
    }
    if (edits_.empty()) {
        return edits_;
    }
    std::sort(edits_.begin(), edits_.end(), [](const EditedLogit & a, const EditedLogit & b) { return a.id < b.id; });
    edits_.erase(std::unique(edits_.begin(), edits_.end(),
                             [](const EditedLogit & a, const EditedLogit & b) { return a.id == b.id; }),
                 edits_.end());

    // All three are in the order of ids.
    auto bias = options_.logit_bias.begin();
    auto repetition = repetitions_.begin();
    const int32_t most = options_.dry_base > 1.000001F
                             // ln of the largest float: the power must not overflow
                             ? static_cast<int32_t>(88.7228391F / std::log(options_.dry_base))
                             : 0;
    for (EditedLogit & one : edits_) {
        for (; bias != options_.logit_bias.end() && bias->first <= one.id; ++bias) {
            one.logit += bias->first == one.id ? bias->second : 0.0F;
        }
        const int32_t count =
            penalties_ && static_cast<size_t>(one.id) < counts_.size() ? counts_[static_cast<size_t>(one.id)] : 0;
        if (count > 0) {
            // A negative logit is multiplied: dividing it would make the token more likely.
            one.logit = one.logit <= 0 ? one.logit * options_.repeat_penalty : one.logit / options_.repeat_penalty;
            one.logit -= static_cast<float>(count) * options_.frequency_penalty + options_.presence_penalty;
        }
        for (; dry_ && repetition != repetitions_.end() && repetition->first <= one.id; ++repetition) {
            if (repetition->first == one.id) {
                const int32_t over = repetition->second - options_.dry_allowed_length;
                const int32_t power = most > 0 ? std::min(over, most) : over;
                one.logit -= static_cast<float>(options_.dry_multiplier * std::pow(options_.dry_base, power));
            }
        }
    }
    return edits_;
}

}  // namespace overspill
