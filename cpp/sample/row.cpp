#include "sample/row.h"

#include "base/error.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <utility>

namespace overspill {

double total_of(const std::vector<float> & values) {
    std::array<double, 8> sums{};  // so that one addition does not wait for the other
    size_t i = 0;
    for (; i + sums.size() <= values.size(); i += sums.size()) {
        for (size_t lane = 0; lane < sums.size(); ++lane) {
            sums[lane] += static_cast<double>(values[i + lane]);
        }
    }
    double total = 0;
    for (; i < values.size(); ++i) {
        total += static_cast<double>(values[i]);
    }
    for (const double sum : sums) {
        total += sum;
    }
    return total;
}

void row_has_changed() {
    throw Error("the logits changed while a token was drawn from them: no other thread may write to them meanwhile");
}

void Row::make_room(const float * logits, size_t n) {
    logits_ = logits;
    n_ = n;
    for (std::vector<float> * per_block : {&maxima_, &sums_, &parts_}) {
        per_block->resize(block_count(n));
    }
    if (ids_.size() < n) {
        bits_.assign((n + 31) / 32, ~0U);
        ids_.resize(n);
    }
}

// Calls pass(first, of_part), where the logits of a part begin with block `first` of the row.
template <typename Pass>
void Row::each_part(TokenBits allowed, const Pass & pass) {
    const size_t n_blocks = block_count(n_);
    const auto part = [&](size_t index, size_t n_parts) {
        const size_t first = n_blocks * index / n_parts;
        const size_t begin = first * block_size;
        const size_t end = std::min(n_blocks * (index + 1) / n_parts * block_size, n_);
        if (begin < end) {
            pass(first, Part{logits_ + begin, end - begin, allowed == nullptr ? nullptr : allowed + begin / 32});
        }
    };
    if (threads_ != nullptr) {
        threads_->pass(std::ref(part));  // a reference, so that nothing is allocated
    } else {
        part(0, 1);
    }
}

// Returns whether no logit is NaN.
bool Row::find_maxima(TokenBits allowed, std::vector<float> & maxima) {
    std::atomic<bool> numbers{true};
    each_part(allowed, [&](size_t first, const Part & part) {
        if (!kernels_->block_maxima(part.logits, part.n, part.allowed, &maxima[first])) {
            numbers.store(false, std::memory_order_relaxed);
        }
    });
    return numbers.load(std::memory_order_relaxed);
}

void Row::take(const LogitsRow & row, const std::vector<EditedLogit> & edits, TokenBits allowed, size_t n_words) {
    const size_t n = row.n;
    make_room(row.logits, n);
    threads_ = row.threads;
    if (threads_ != nullptr) {
        threads_->begin(n);
    }
    edits_.clear();
    for (const EditedLogit & one : edits) {
        edits_.push_back({one.logit, one.id, 0.0F});
    }
    allowed_ = nullptr;
    if (allowed != nullptr) {
        const size_t n_known = std::min(n_words, (n + 31) / 32);
        std::copy_n(allowed, n_known, bits_.begin());
        std::fill(bits_.begin() + static_cast<std::ptrdiff_t>(n_known), bits_.end(), 0U);
    }
    if (!edits_.empty() || allowed != nullptr) {
        // An edited token is hidden in the row, and counts as what edits_ says; unless it is not allowed.
        allowed_ = bits_.data();
        for (Candidate & one : edits_) {
            if (!allows(one.id)) {
                one.logit = -infinity;
            }
            bits_[static_cast<size_t>(one.id) / 32] &= ~(1U << (static_cast<uint32_t>(one.id) % 32));
        }
    }
    bool numbers = find_maxima(allowed_, maxima_);
    largest_ = *std::max_element(maxima_.begin(), maxima_.end());
    for (const Candidate & one : edits_) {
        numbers = numbers && !std::isnan(one.logit);
        largest_ = std::max(largest_, one.logit);
    }
    if (!numbers || !std::isfinite(largest_)) {
        const bool nothing_allowed = numbers && largest_ == -infinity && allowed_ != nullptr;
        throw Error(nothing_allowed
                        ? "no token is left to choose: every one is banned, not allowed, or impossible to the model"
                        : "the logits are not numbers (NaN, or all of them infinite): the model's file may be "
                          "damaged, or a value overflowed on this device");
    }
}

void Row::take_unedited(const float * logits, size_t n) {
    make_room(logits, n);
    find_maxima(nullptr, maxima_);
}

void Row::let_go() {
    if (threads_ != nullptr) {
        std::exchange(threads_, nullptr)->end();
    }
    if (allowed_ != nullptr) {
        std::fill(bits_.begin(), bits_.end(), ~0U);
        allowed_ = nullptr;
    }
}

void Row::hide(int32_t id) {
    const auto edited =
        std::find_if(edits_.begin(), edits_.end(), [id](const Candidate & one) { return one.id == id; });
    if (edited != edits_.end()) {
        edited->logit = -infinity;
    }
    allowed_ = bits_.data();
    bits_[static_cast<size_t>(id) / 32] &= ~(1U << (static_cast<uint32_t>(id) % 32));
}

int32_t Row::best() const {
    const auto block = static_cast<size_t>(std::find(maxima_.begin(), maxima_.end(), largest_) - maxima_.begin());
    int32_t found = any_id;
    if (block < maxima_.size()) {
        for (size_t i = block * block_size; found == any_id && i < n_; ++i) {
            if (logits_[i] == largest_ && allows(static_cast<int32_t>(i))) {
                found = static_cast<int32_t>(i);
            }
        }
    }
    for (const Candidate & one : edits_) {
        found = one.logit == largest_ ? std::min(found, one.id) : found;
    }
    if (found == any_id) {
        row_has_changed();
    }
    return found;
}

// So many groups of blocks have one. Twice as many groups as needed are looked at, since to select among all blocks
// would take longer than what it saves.
float Row::at_least(const std::vector<float> & maxima, TokenBits allowed, size_t k) {
    if (k > maxima.size()) {
        return at_least_of_lanes(allowed, k);
    }
    const size_t n_per_group = std::max<size_t>(maxima.size() / (2 * k), 1);
    const size_t n_groups = maxima.size() / n_per_group;
    groups_.assign(maxima.begin(), maxima.begin() + static_cast<std::ptrdiff_t>(n_groups));
    for (size_t i = 1; i < n_per_group; ++i) {
        for (size_t group = 0; group < n_groups; ++group) {
            groups_[group] = std::max(groups_[group], maxima[i * n_groups + group]);
        }
    }
    return kth_largest_group(k);
}

// Where there are fewer blocks than that: of logits that are twice as many apart, at least k have one.
float Row::at_least_of_lanes(TokenBits allowed, size_t k) {
    constexpr size_t n_per_word = 32;
    const size_t n_lanes = (2 * k + n_per_word - 1) / n_per_word * n_per_word;
    constexpr size_t fewest_each = 4;  // with fewer, listing everything is as fast
    if (n_ < fewest_each * n_lanes) {
        return lowest;
    }
    groups_.assign(n_lanes, -infinity);
    size_t lane = 0;
    for (size_t at = 0; at < n_; at += n_per_word, lane = lane + n_per_word == n_lanes ? 0 : lane + n_per_word) {
        const uint32_t bits = allowed == nullptr ? ~0U : allowed[at / n_per_word];
        float * best = groups_.data() + lane;
        if (bits == ~0U && at + n_per_word <= n_) {
            for (size_t i = 0; i < n_per_word; ++i) {
                best[i] = std::max(best[i], logits_[at + i]);
            }
            continue;
        }
        for (size_t i = 0; bits != 0 && i < std::min(n_per_word, n_ - at); ++i) {
            best[i] = ((bits >> i) & 1U) != 0 ? std::max(best[i], logits_[at + i]) : best[i];
        }
    }
    return kth_largest_group(k);
}

// Changes their order.
float Row::kth_largest_group(size_t k) {
    const auto kth = groups_.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(groups_.begin(), kth, groups_.end(), std::greater<>());
    return std::max(*kth, lowest);
}

void Row::list(float low, float high, std::vector<Candidate> & to) {
    const size_t n_found = kernels_->find(logits_, n_, allowed_, maxima_.data(), low, high, ids_.data());
    to.resize(n_found);
    for (size_t i = 0; i < n_found; ++i) {
        // Never under `low`, nor NaN, though another thread should write to the row by now.
        to[i] = {std::max(low, logits_[ids_[i]]), ids_[i], 0.0F};
    }
    for (const Candidate & one : edits_) {
        if (one.logit >= low && one.logit < high) {
            to.push_back(one);
        }
    }
}

void Row::add_up(float low, float scale) {
    each_part(allowed_, [&](size_t first, const Part & part) {
        kernels_->exp_sums(part.logits, part.n, part.allowed, &maxima_[first], {largest_, scale, low, infinity},
                           &sums_[first]);
    });
}

void Row::add_up_split(float low, float split) {
    each_part(allowed_, [&](size_t first, const Part & part) {
        kernels_->exp_sums_split(part.logits, part.n, part.allowed, &maxima_[first], {largest_, 1.0F, low, split},
                                 &sums_[first], &parts_[first]);
    });
}

void Row::add_up_weighted(float low) {
    each_part(allowed_, [&](size_t first, const Part & part) {
        kernels_->exp_sums_weighted(part.logits, part.n, part.allowed, &maxima_[first], {largest_, 1.0F, low, infinity},
                                    &sums_[first], &parts_[first]);
    });
}

double Row::edited_mass(float low) const {
    double mass = 0;
    for (const Candidate & one : edits_) {
        float weight = 0;
        kernels_->exps(&one.logit, 1, largest_, 1.0F, &weight);
        mass += one.logit >= low ? static_cast<double>(weight) : 0.0;
    }
    return mass;
}

double Row::deviation() {
    std::atomic<size_t> n_numbers{0};
    each_part(allowed_, [&](size_t first, const Part & part) {
        n_numbers += kernels_->moments(part.logits, part.n, part.allowed, largest_, &sums_[first], &parts_[first]);
    });
    auto n = static_cast<double>(n_numbers);
    double sum = total_of(sums_);
    double squares = total_of(parts_);
    for (const Candidate & one : edits_) {
        if (one.logit != -infinity) {
            const auto difference = static_cast<double>(one.logit - largest_);
            sum += difference;
            squares += difference * difference;
            ++n;
        }
    }
    const double mean = sum / n;
    return std::sqrt(std::max(squares / n - mean * mean, 0.0));
}

void Row::measure(Logprobs & logprobs) {
    if (allowed_ != nullptr) {
        find_maxima(nullptr, parts_);
    }
    const std::vector<float> & maxima = allowed_ == nullptr ? maxima_ : parts_;
    const float largest = *std::max_element(maxima.begin(), maxima.end());
    each_part(nullptr, [&](size_t first, const Part & part) {
        kernels_->exp_sums(part.logits, part.n, part.allowed, &maxima[first], {largest, 1.0F, lowest, infinity},
                           &sums_[first]);
    });
    const double log_total = static_cast<double>(largest) + std::log(total_of(sums_));
    logprobs.chosen = static_cast<float>(-log_total);
    if (logprobs.top.empty()) {
        return;
    }
    const size_t k = std::min(logprobs.top.size(), n_);
    const float low = at_least(maxima, nullptr, k);
    const size_t n_found = kernels_->find(logits_, n_, nullptr, maxima.data(), low, infinity, ids_.data());
    most_likely_.clear();
    for (size_t i = 0; i < n_found; ++i) {
        most_likely_.push_back({logits_[ids_[i]], ids_[i], 0.0F});
    }
    logprobs.top.resize(std::min(k, n_found));
    const auto end = most_likely_.begin() + static_cast<std::ptrdiff_t>(logprobs.top.size());
    std::partial_sort(most_likely_.begin(), end, most_likely_.end(), before);
    std::transform(most_likely_.begin(), end, logprobs.top.begin(), [&](const Candidate & one) {
        return std::make_pair(one.id, static_cast<float>(static_cast<double>(one.logit) - log_total));
    });
}

}  // namespace overspill
