#include "sample/sampler.h"

#include "base/error.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <sstream>

namespace overspill {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float lowest = std::numeric_limits<float>::lowest();
constexpr int32_t any_id = std::numeric_limits<int32_t>::max();

SamplingOptions sorted(SamplingOptions options) {
    check(options);
    std::sort(options.logit_bias.begin(), options.logit_bias.end());
    return options;
}

// Memory is kept for every token up to the largest.
void check_token(const char * name, int32_t token) {
    constexpr int32_t largest = (1 << 24) - 1;
    if (token < 0 || token > largest) {
        throw std::invalid_argument(std::string(name) + " must be 0 to 16777215, not " + std::to_string(token));
    }
}

[[noreturn]] void row_has_changed() {
    throw Error("the logits changed while a token was drawn from them: no other thread may write to them meanwhile");
}

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

}  // namespace

Sampler::Sampler(SamplingOptions options)
    : options_(sorted(std::move(options))), kernels_(&kernels()), logit_edits_(options_) {
    const bool shifts_the_best = options_.typical_p < 1.0F ||
                                 (options_.xtc_probability > 0.0F && options_.xtc_threshold <= 0.5F) ||
                                 options_.dynamic_temperature_range > 0.0F || options_.mirostat != 0;
    greedy_ = options_.temperature == 0.0F && !shifts_the_best;
    only_top_p_ = options_.top_p < 1 && options_.top_k == 0 && options_.min_p == 0.0F && options_.top_n_sigma == 0.0F &&
                  !shifts_the_best && options_.temperature > 0;
    seed_ = options_.seed ? *options_.seed : std::random_device{}() >> 1U;
    reset();
}

void Sampler::reset() {
    restore({seed_, 0, {}, 2.0F * options_.mirostat_tau});
}

void Sampler::Busy::enter() {
    if (flag_.test_and_set(std::memory_order_acquire)) {
        throw Error(
            "the sampler is in use by another thread, or by a stream that is in the middle of a step; clone() it");
    }
}

std::shared_ptr<Sampler> Sampler::clone() const {
    const Working working(busy_);
    return std::make_shared<Sampler>(*this);
}

SamplerState Sampler::state() const {
    const Working working(busy_);
    return {seed_, n_draws_, logit_edits_.history(), mirostat_mu_};
}

void Sampler::restore(const SamplerState & state) {
    for (const int32_t token : state.history) {
        check_token("history: a token", token);
    }
    // Random numbers are drawn again to get there.
    constexpr uint64_t most_draws = uint64_t{1} << 32U;
    if (state.n_draws > most_draws) {
        throw std::invalid_argument("n_draws must be 0 to 4294967296, not " + std::to_string(state.n_draws));
    }
    const Working working(busy_);
    seed_ = state.seed;
    random_.seed(seed_);
    random_.discard(state.n_draws);
    n_draws_ = state.n_draws;
    mirostat_mu_ = state.mirostat_mu;
    logit_edits_.forget();
    for (const int32_t token : state.history) {
        logit_edits_.accept(token);
    }
}

void Sampler::accept(int32_t token) {
    check_token("token", token);
    const Working working(busy_);
    logit_edits_.accept(token);
}

// --- The row ------------------------------------------------------------------------------------

// Makes room for it, too.
void Sampler::take_row(const float * logits, size_t n) {
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

void Sampler::look_at(const float * logits, size_t n, TokenBits allowed, size_t n_words, Logprobs * logprobs) {
    take_row(logits, n);
    edits_.clear();
    for (const EditedLogit & one : logit_edits_.of(logits, n)) {
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
            if (!this->allowed(one.id)) {
                one.logit = -infinity;
            }
            bits_[static_cast<size_t>(one.id) / 32] &= ~(1U << (static_cast<uint32_t>(one.id) % 32));
        }
    }
    bool numbers = kernels_->block_maxima(logits, n, allowed_, maxima_.data());
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
    if (logprobs != nullptr) {
        measure_logprobs(*logprobs, allowed_ == nullptr);
    }
    cut_ = {lowest, any_id};
    listed_ = false;
    sorted_ = false;
    n_nominal_ = n;
}

void Sampler::restore_bits() {
    if (allowed_ != nullptr) {
        std::fill(bits_.begin(), bits_.end(), ~0U);
        allowed_ = nullptr;
    }
}

void Sampler::measure_logprobs(Logprobs & logprobs, bool maxima_are_of_all) {
    if (!maxima_are_of_all) {
        kernels_->block_maxima(logits_, n_, nullptr, parts_.data());
    }
    const std::vector<float> & maxima = maxima_are_of_all ? maxima_ : parts_;
    const float largest = *std::max_element(maxima.begin(), maxima.end());
    kernels_->exp_sums(logits_, n_, nullptr, maxima.data(), {largest, 1.0F, lowest, infinity}, sums_.data());
    const double log_total = static_cast<double>(largest) + std::log(total_of(sums_));
    logprobs.chosen = static_cast<float>(-log_total);  // to which sample() adds the logit
    if (logprobs.top.empty()) {
        return;
    }
    const size_t k = std::min(logprobs.top.size(), n_);
    const float low = kth_largest_maximum(maxima, nullptr, k);
    list_.clear();
    const size_t n_found = kernels_->find(logits_, n_, nullptr, maxima.data(), low, infinity, ids_.data());
    for (size_t i = 0; i < n_found; ++i) {
        list_.push_back({logits_[ids_[i]], ids_[i], 0.0F});
    }
    logprobs.top.resize(std::min(k, n_found));
    const auto end = list_.begin() + static_cast<std::ptrdiff_t>(logprobs.top.size());
    std::partial_sort(list_.begin(), end, list_.end(), before);
    std::transform(list_.begin(), end, logprobs.top.begin(), [&](const Candidate & one) {
        return std::make_pair(one.id, static_cast<float>(static_cast<double>(one.logit) - log_total));
    });
}

// A logit that at least k are not less than: so many groups of blocks have one. Twice as many groups
// as needed are looked at, since to select among all blocks would take longer than what it saves.
float Sampler::kth_largest_maximum(const std::vector<float> & maxima, TokenBits allowed, size_t k) {
    if (k > maxima.size()) {
        return kth_largest_of_lanes(allowed, k);
    }
    const size_t n_per_group = std::max<size_t>(maxima.size() / (2 * k), 1);
    const size_t n_groups = maxima.size() / n_per_group;
    floats_.assign(maxima.begin(), maxima.begin() + static_cast<std::ptrdiff_t>(n_groups));
    for (size_t i = 1; i < n_per_group; ++i) {
        for (size_t group = 0; group < n_groups; ++group) {
            floats_[group] = std::max(floats_[group], maxima[i * n_groups + group]);
        }
    }
    return kth_largest_float(k);
}

// Of floats_, whose order it changes.
float Sampler::kth_largest_float(size_t k) {
    const auto kth = floats_.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(floats_.begin(), kth, floats_.end(), std::greater<>());
    return std::max(*kth, lowest);
}

// As kth_largest_maximum(), where there are fewer blocks than that: of logits that lie twice as many apart, at least k
// have one.
float Sampler::kth_largest_of_lanes(TokenBits allowed, size_t k) {
    constexpr size_t n_per_word = 32;
    const size_t n_lanes = (2 * k + n_per_word - 1) / n_per_word * n_per_word;
    constexpr size_t fewest_each = 4;  // with fewer, listing everything is as fast
    if (n_ < fewest_each * n_lanes) {
        return lowest;
    }
    floats_.assign(n_lanes, -infinity);
    size_t lane = 0;
    for (size_t at = 0; at < n_; at += n_per_word, lane = lane + n_per_word == n_lanes ? 0 : lane + n_per_word) {
        const uint32_t bits = allowed == nullptr ? ~0U : allowed[at / n_per_word];
        float * best = floats_.data() + lane;
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
    return kth_largest_float(k);
}

int32_t Sampler::best() const {
    const auto block = static_cast<size_t>(std::find(maxima_.begin(), maxima_.end(), largest_) - maxima_.begin());
    int32_t found = any_id;
    if (block < maxima_.size()) {
        for (size_t i = block * block_size; found == any_id && i < n_; ++i) {
            if (logits_[i] == largest_ && allowed(static_cast<int32_t>(i))) {
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

// --- Lists --------------------------------------------------------------------------------------

// Lists the candidates from `low` to below `high`.
void Sampler::list(float low, float high) {
    const size_t n_found = kernels_->find(logits_, n_, allowed_, maxima_.data(), low, high, ids_.data());
    list_.resize(n_found);
    for (size_t i = 0; i < n_found; ++i) {
        // Never under `low`, nor NaN, though another thread should write to the row by now.
        list_[i] = {std::max(low, logits_[ids_[i]]), ids_[i], 0.0F};
    }
    for (const Candidate & one : edits_) {
        if (one.logit >= low && one.logit < high) {
            list_.push_back(one);
        }
    }
    sorted_ = false;
}

void Sampler::list_kept() {
    if (listed_) {
        return;
    }
    list(cut_.logit, infinity);
    list_.erase(
        std::remove_if(list_.begin(), list_.end(), [this](const Candidate & one) { return !kept(one.logit, one.id); }),
        list_.end());
    listed_ = true;
    if (list_.empty()) {
        row_has_changed();
    }
}

float Sampler::listed_largest() const {
    const auto less = [](const Candidate & a, const Candidate & b) { return a.logit < b.logit; };
    return sorted_ ? list_.front().logit : std::max_element(list_.begin(), list_.end(), less)->logit;
}

// Gives every listed candidate its weight, exp((logit - largest) * scale), and returns their sum.
double Sampler::weigh_list(float largest, float scale) {
    floats_.resize(list_.size());
    std::transform(list_.begin(), list_.end(), floats_.begin(), [](const Candidate & one) { return one.logit; });
    kernels_->exps(floats_.data(), floats_.size(), largest, scale, floats_.data());
    double total = 0;
    for (size_t i = 0; i < list_.size(); ++i) {
        list_[i].weight = floats_[i];
        total += static_cast<double>(floats_[i]);
    }
    return total;
}

// In nats, of the probabilities weight / total, where weight is exp(logit - largest).
double Sampler::entropy_of_list(float largest, double total) const {
    double sum = 0;
    for (const Candidate & one : list_) {
        sum += one.weight > 0 ? static_cast<double>(one.weight) * static_cast<double>(one.logit - largest) : 0.0;
    }
    return std::log(total) - sum / total;
}

// Keeps the nearest candidates of the weighed list, as few as have more than this mass together,
// and one at least. Of equally near ones the more likely comes first.
template <typename Distance>
void Sampler::keep_nearest(double mass, const Distance & distance) {
    // Only the bucket in which the mass is reached has to be sorted.
    constexpr size_t n_buckets = 256;
    std::array<double, n_buckets> masses{};
    double farthest = 0;
    double nearest = static_cast<double>(infinity);
    for (const Candidate & one : list_) {
        nearest = std::min(nearest, distance(one));
        farthest = std::max(farthest, distance(one));
    }
    const double scale = farthest > nearest ? n_buckets / (farthest - nearest) : 0.0;
    const auto bucket_of = [&](const Candidate & one) {
        return std::min(static_cast<size_t>((distance(one) - nearest) * scale), n_buckets - 1);
    };
    for (const Candidate & one : list_) {
        masses[bucket_of(one)] += static_cast<double>(one.weight);
    }
    double sum = 0;
    size_t last = 0;
    for (; last + 1 < n_buckets && sum + masses[last] <= mass; ++last) {
        sum += masses[last];
    }
    const auto from =
        std::partition(list_.begin(), list_.end(), [&](const Candidate & one) { return bucket_of(one) < last; });
    const auto to = std::partition(from, list_.end(), [&](const Candidate & one) { return bucket_of(one) == last; });
    std::sort(from, to, [&](const Candidate & a, const Candidate & b) {
        return distance(a) < distance(b) || (distance(a) == distance(b) && before(a, b));
    });
    auto end = from;
    while (end != to && sum <= mass) {
        sum += static_cast<double>(end->weight);
        ++end;
    }
    list_.erase(std::max(end, list_.begin() + 1), list_.end());
    sorted_ = false;
}

// The same by likelihood, and at least this mass.
void Sampler::keep_most_likely(double mass) {
    const double just_under = std::nextafter(mass, -1.0);
    if (!sorted_ && list_.size() <= 96) {
        std::sort(list_.begin(), list_.end(), before);
        sorted_ = true;
    }
    if (!sorted_) {
        keep_nearest(just_under, [this](const Candidate & one) { return static_cast<double>(largest_ - one.logit); });
        return;
    }
    double sum = 0;
    auto end = list_.begin();
    while (end != list_.end() && sum <= just_under) {
        sum += static_cast<double>(end->weight);
        ++end;
    }
    list_.erase(std::max(end, list_.begin() + 1), list_.end());
}

// --- Truncation ---------------------------------------------------------------------------------

void Sampler::truncate() {
    const SamplingOptions & o = options_;
    if (o.top_n_sigma > 0 && n_ > 1) {
        cut_top_n_sigma();
    }
    if (o.top_k > 0 && static_cast<size_t>(o.top_k) < n_) {
        cut_top_k(static_cast<size_t>(o.top_k));
    }
    if (o.typical_p < 1) {
        cut_typical();
    }
    if (o.top_p < 1) {
        cut_top_p();
    }
    if (o.min_p > 0) {
        cut_min_p();
    }
    if (o.xtc_probability > 0 && o.xtc_threshold <= 0.5F) {
        cut_xtc();
    }
}

void Sampler::cut_below(float logit) {
    if (logit > cut_.logit) {
        cut_ = {logit, any_id};
    }
}

void Sampler::cut_top_n_sigma() {
    auto n = static_cast<double>(kernels_->moments(logits_, n_, allowed_, largest_, sums_.data(), parts_.data()));
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
    const double deviation = std::sqrt(std::max(squares / n - mean * mean, 0.0));
    cut_below(largest_ - static_cast<float>(static_cast<double>(options_.top_n_sigma) * deviation));
}

void Sampler::cut_top_k(size_t k) {
    list(std::max(kth_largest_maximum(maxima_, allowed_, k), cut_.logit), infinity);
    if (list_.empty()) {
        row_has_changed();
    }
    if (list_.size() > k) {
        std::nth_element(list_.begin(), list_.begin() + static_cast<std::ptrdiff_t>(k), list_.end(), before);
        list_.resize(k);
    }
    std::sort(list_.begin(), list_.end(), before);
    listed_ = true;
    sorted_ = true;
    n_nominal_ = k;
}

// Locally typical sampling (Meister et al., 2022): those whose surprise is closest to the expected one.
void Sampler::cut_typical() {
    list_kept();
    const float largest = listed_largest();
    const double total = weigh_list(largest, 1.0F);
    const double expected = static_cast<double>(largest) + std::log(total) - entropy_of_list(largest, total);
    keep_nearest(static_cast<double>(options_.typical_p) * total,
                 [&](const Candidate & one) { return std::fabs(static_cast<double>(one.logit) - expected); });
    n_nominal_ = list_.size();
}

// Nucleus sampling (Holtzman et al., 2020).
void Sampler::cut_top_p() {
    if (!listed_ && cut_top_p_of_row()) {
        return;
    }
    list_kept();
    const double total = weigh_list(listed_largest(), 1.0F);
    keep_most_likely(static_cast<double>(options_.top_p) * total);
    n_nominal_ = list_.size();
}

// The same without a list of the whole vocabulary.
bool Sampler::cut_top_p_of_row() {
    constexpr size_t n_least = 4096;  // under this, listing everything is as fast
    if (n_ < n_least) {
        return false;
    }
    Glance seen{};
    return cut_top_p_of_most_likely(seen) || cut_top_p_by_sample(3) || cut_top_p_by_sample(12);
}

// Lists and weighs the k most likely tokens and some more, and estimates from a few of the other
// logits, whose weights stay in floats_, what mass they have.
Sampler::Glance Sampler::glance(size_t k) {
    constexpr size_t n_per_block = 1;
    Glance seen{};
    seen.low = std::max(kth_largest_maximum(maxima_, allowed_, std::min(k, maxima_.size() / 2)), cut_.logit);
    list(seen.low, infinity);
    if (list_.empty()) {
        row_has_changed();
    }
    seen.mass = weigh_list(largest_, 1.0F);
    floats_.resize(n_per_block * maxima_.size());
    for (size_t block = 0; block < maxima_.size(); ++block) {
        for (size_t i = 0; i < n_per_block; ++i) {
            const size_t at = block * block_size + (block * n_per_block) % block_size + i;
            const float logit = at < n_ ? logits_[at] : -infinity;
            floats_[n_per_block * block + i] = logit < seen.low && logit >= cut_.logit ? logit : -infinity;
        }
    }
    kernels_->exps(floats_.data(), floats_.size(), largest_, 1.0F, floats_.data());
    seen.stands_for = static_cast<double>(block_size / n_per_block);
    seen.rest = total_of(floats_) * seen.stands_for;
    return seen;
}

// Where the mass lies in a short list of the most likely tokens: one pass adds up the whole row,
// and only the list is sorted. Otherwise false, and `seen` is what the list and the sample say.
bool Sampler::cut_top_p_of_most_likely(Glance & seen) {
    const auto p = static_cast<double>(options_.top_p);
    std::optional<double> total;
    for (const size_t k : {size_t{128}, size_t{384}}) {
        seen = glance(k);
        const double about = total ? *total : seen.mass + seen.rest;
        if (seen.mass < 0.5 * p * about) {
            return false;
        }
        if (seen.mass < p * about) {
            continue;
        }
        if (!total) {
            kernels_->exp_sums(logits_, n_, allowed_, maxima_.data(), {largest_, 1.0F, cut_.logit, infinity},
                               sums_.data());
            total = total_of(sums_) + edited_mass(cut_.logit);
        }
        if (seen.mass >= p * *total) {
            keep_most_likely(p * *total);
            listed_ = true;
            n_nominal_ = list_.size();
            return true;
        }
    }
    return false;
}

// Finds the cut between two logits that a sample says it is between, with an error of so many
// standard deviations. list_ holds the most likely tokens, weighed, which are not left to chance.
bool Sampler::cut_top_p_by_sample(double n_deviations) {
    constexpr size_t n_per_block = 16;
    constexpr size_t n_buckets = 1024;  // of a histogram of the logits
    constexpr float bucket_width = 1.0F / 32;
    constexpr double n_stands_for = static_cast<double>(block_size) / n_per_block;
    const auto p = static_cast<double>(options_.top_p);

    const float heavy =
        std::max(kth_largest_maximum(maxima_, allowed_, std::min<size_t>(256, maxima_.size())), cut_.logit);
    list(heavy, infinity);
    const double heavy_mass = weigh_list(largest_, 1.0F);
    std::array<uint32_t, n_buckets> histogram{};
    for (size_t block = 0; block < maxima_.size(); ++block) {
        const size_t begin = block * block_size + (block * n_per_block) % block_size;
        for (size_t i = begin; i < std::min(begin + n_per_block, n_); ++i) {
            const float logit = logits_[i];
            if (logit < heavy && logit >= cut_.logit) {
                const float bucket = (largest_ - logit) * (1.0F / bucket_width);
                ++histogram[bucket < n_buckets - 1 ? static_cast<size_t>(bucket) : n_buckets - 1];
            }
        }
    }
    const double ratio = std::exp(-static_cast<double>(bucket_width));
    const double first_weight = n_stands_for * std::sqrt(ratio);
    double total = heavy_mass;
    double tail_variance = 0;
    double weight = first_weight;
    for (const uint32_t count : histogram) {
        total += count * weight;
        tail_variance += count * weight * weight;
        weight *= ratio;
    }

    // Where the mass is reached, as far as the sample can tell.
    double head = heavy_mass;
    double head_variance = 0;
    float high = 0;
    float low = 0;
    weight = first_weight;
    for (size_t bucket = 0; bucket < n_buckets; ++bucket) {
        const double variance = (1 - p) * (1 - p) * head_variance + p * p * std::max(tail_variance, 0.0);
        const double error = n_deviations * std::sqrt(variance);
        if (head <= p * total - error) {
            high = static_cast<float>(bucket) * bucket_width;
        }
        const double mass = histogram[bucket] * weight;
        head += mass;
        head_variance += mass * weight;
        tail_variance -= mass * weight;
        low = static_cast<float>(bucket + 1) * bucket_width;
        if (head >= p * total + error) {
            break;
        }
        weight *= ratio;
    }

    const float above = high > 0 ? std::min(largest_ - high, heavy) : infinity;
    const float below = std::max(largest_ - low, cut_.logit);
    kernels_->exp_sums_split(logits_, n_, allowed_, maxima_.data(), {largest_, 1.0F, cut_.logit, above}, sums_.data(),
                             parts_.data());
    const double mass = p * (total_of(sums_) + edited_mass(cut_.logit));
    const double mass_above = total_of(parts_) + edited_mass(above);
    if (mass_above >= mass) {
        return false;
    }
    list(below, above);
    if (list_.empty() || mass_above + weigh_list(largest_, 1.0F) < mass) {
        return false;
    }
    keep_most_likely(mass - mass_above);
    const Candidate & last = *std::max_element(list_.begin(), list_.end(), before);
    cut_ = {last.logit, last.id};
    n_nominal_ = 0;
    return true;
}

// The sum of exp(logit - largest) over the edited tokens from `low` on.
double Sampler::edited_mass(float low) const {
    double mass = 0;
    for (const Candidate & one : edits_) {
        float weight = 0;
        kernels_->exps(&one.logit, 1, largest_, 1.0F, &weight);
        mass += one.logit >= low ? static_cast<double>(weight) : 0.0;
    }
    return mass;
}

// Min-p (Nguyen et al., 2024).
void Sampler::cut_min_p() {
    const float log_p = std::log(options_.min_p);
    if (listed_) {
        const float least = listed_largest() + log_p;
        list_.erase(
            std::remove_if(list_.begin(), list_.end(), [least](const Candidate & one) { return one.logit < least; }),
            list_.end());
    } else {
        cut_below(largest_ + log_p);
        const auto n_blocks =
            std::count_if(maxima_.begin(), maxima_.end(), [this](float maximum) { return maximum >= cut_.logit; });
        if (static_cast<size_t>(n_blocks) > maxima_.size() / 4) {
            n_nominal_ = 0;
            return;  // too many to be worth a list
        }
        list_kept();
    }
    n_nominal_ = list_.size();
}

// Exclude top choices (github.com/oobabooga/text-generation-webui, pull request 6335): of those
// that are likely enough, only the least likely stays.
void Sampler::cut_xtc() {
    if ((listed_ && list_.size() < 2) || uniform() > static_cast<double>(options_.xtc_probability)) {
        return;
    }
    // A cut between equal logits is known to the list only.
    const bool of_row = !listed_ && options_.xtc_threshold > 0 && cut_.id == any_id;
    double total = 0;
    if (of_row) {
        // Only few can be likely enough: the rest is not listed.
        kernels_->exp_sums(logits_, n_, allowed_, maxima_.data(), {largest_, 1.0F, cut_.logit, infinity}, sums_.data());
        total = total_of(sums_) + edited_mass(cut_.logit);
        const double least =
            static_cast<double>(largest_) + std::log(static_cast<double>(options_.xtc_threshold) * total);
        list(std::max(static_cast<float>(least - 1e-3), cut_.logit), infinity);
        weigh_list(largest_, 1.0F);
    } else {
        list_kept();
        total = weigh_list(listed_largest(), 1.0F);
    }
    const Candidate * least_likely = nullptr;
    for (const Candidate & one : list_) {
        if (static_cast<double>(one.weight) >= static_cast<double>(options_.xtc_threshold) * total &&
            (least_likely == nullptr || before(*least_likely, one))) {
            least_likely = &one;
        }
    }
    if (least_likely == nullptr) {
        return;
    }
    const Candidate stays = *least_likely;
    if (of_row) {
        std::for_each(list_.begin(), list_.end(), [&](const Candidate & one) {
            if (before(one, stays)) {
                hide(one.id);
            }
        });
        largest_ = stays.logit;
        return;
    }
    list_.erase(std::remove_if(list_.begin(), list_.end(), [&](const Candidate & one) { return before(one, stays); }),
                list_.end());
    n_nominal_ = list_.size();
}

// Makes a token as good as not there until the row is done with.
void Sampler::hide(int32_t id) {
    const auto edited =
        std::find_if(edits_.begin(), edits_.end(), [id](const Candidate & one) { return one.id == id; });
    if (edited != edits_.end()) {
        edited->logit = -infinity;
    }
    allowed_ = bits_.data();
    bits_[static_cast<size_t>(id) / 32] &= ~(1U << (static_cast<uint32_t>(id) % 32));
    n_nominal_ -= n_nominal_ > 0 ? 1 : 0;
}

// Dynamic temperature (github.com/kalomaze/koboldcpp): more where the model is less sure.
float Sampler::final_temperature() {
    if (options_.dynamic_temperature_range == 0.0F) {
        return options_.temperature;
    }
    const bool of_list = listed_ || n_nominal_ == 0;
    if (of_list) {
        list_kept();
        n_nominal_ = std::max(n_nominal_, list_.size());
    }
    if (n_nominal_ < 2) {
        return 1.0F;
    }
    double entropy = 0;
    if (of_list) {
        const float largest = listed_largest();
        entropy = entropy_of_list(largest, weigh_list(largest, 1.0F));
    } else {
        kernels_->exp_sums_weighted(logits_, n_, allowed_, maxima_.data(), {largest_, 1.0F, cut_.logit, infinity},
                                    sums_.data(), parts_.data());
        list_.clear();
        std::copy_if(edits_.begin(), edits_.end(), std::back_inserter(list_),
                     [this](const Candidate & one) { return one.logit >= cut_.logit; });
        double total = total_of(sums_) + weigh_list(largest_, 1.0F);
        double weighted = total_of(parts_);
        for (const Candidate & one : list_) {
            weighted += static_cast<double>(one.weight) * static_cast<double>(one.logit - largest_);
        }
        entropy = std::log(total) - weighted / total;
    }
    const double uncertainty = std::max(entropy, 0.0) / std::log(static_cast<double>(n_nominal_));
    const float low = std::max(0.0F, options_.temperature - options_.dynamic_temperature_range);
    const float high = options_.temperature + options_.dynamic_temperature_range;
    return low + (high - low) * std::pow(static_cast<float>(uncertainty), options_.dynamic_temperature_exponent);
}

// --- The draw -----------------------------------------------------------------------------------

namespace {

// The largest keeps differences between logits finite in single precision.
float scale_of(float temperature) {
    return std::min(1.0F / temperature, 1e30F);
}

}  // namespace

double Sampler::uniform() {
    ++n_draws_;
    return static_cast<double>(random_() >> 11U) * 0x1p-53;
}

Sampler::Chosen Sampler::draw(float temperature) {
    if (temperature <= 0.0F) {
        list_kept();
        const Candidate & best = *std::min_element(list_.begin(), list_.end(), before);
        return {best.id, best.logit, 1.0};
    }
    return listed_ ? draw_from_list(scale_of(temperature)) : draw_from_row(scale_of(temperature));
}

Sampler::Chosen Sampler::draw_from_list(float scale) {
    const double total = weigh_list(listed_largest(), scale);
    const double target = uniform() * total;
    double sum = 0;
    const Candidate * chosen = nullptr;
    for (const Candidate & one : list_) {
        if (one.weight > 0) {
            chosen = &one;
        }
        sum += static_cast<double>(one.weight);
        if (sum > target) {
            break;
        }
    }
    if (chosen == nullptr) {
        row_has_changed();
    }
    return {chosen->id, chosen->logit, static_cast<double>(chosen->weight) / total};
}

Sampler::Chosen Sampler::draw_from_row(float scale) {
    kernels_->exp_sums(logits_, n_, allowed_, maxima_.data(), {largest_, scale, cut_.logit, infinity}, sums_.data());
    return draw_from_sums(scale);
}

// From the row whose blocks' sums of exp((logit - largest) * scale) are in sums_.
Sampler::Chosen Sampler::draw_from_sums(float scale) {
    // Edited tokens come last, as one more block.
    list_.clear();
    std::copy_if(edits_.begin(), edits_.end(), std::back_inserter(list_),
                 [this](const Candidate & one) { return one.logit >= cut_.logit; });
    const double total = total_of(sums_) + weigh_list(largest_, scale);
    constexpr int most_tries = 10'000;  // more than a row takes that does not change
    for (int tries = 0; tries < most_tries; ++tries) {
        const double target = uniform() * total;
        double sum = 0;
        size_t block = 0;
        for (; block + 1 < sums_.size() && sum + static_cast<double>(sums_[block]) <= target; ++block) {
            sum += static_cast<double>(sums_[block]);
        }
        const bool in_row = sum + static_cast<double>(sums_[block]) > target || list_.empty();
        Candidate chosen{0, -1, 0};
        const auto take = [&](const Candidate & one) {
            chosen = one.weight > 0 ? one : chosen;
            sum += static_cast<double>(one.weight);
            return sum > target;
        };
        if (in_row) {
            const size_t begin = block * block_size;
            const size_t size = std::min(block_size, n_ - begin);
            floats_.resize(block_size);
            kernels_->exps(logits_ + begin, size, largest_, scale, floats_.data());
            for (size_t i = 0; i < size; ++i) {
                const auto id = static_cast<int32_t>(begin + i);
                if (logits_[id] >= cut_.logit && this->allowed(id) && take({logits_[id], id, floats_[i]})) {
                    break;
                }
            }
        } else {
            sum += static_cast<double>(sums_[block]);
            std::any_of(list_.begin(), list_.end(), take);
        }
        // Of tokens as likely as the last that is kept, some may not be kept. Rounding may leave
        // nothing at the very end of a block.
        if (chosen.id >= 0 && kept(chosen.logit, chosen.id)) {
            return {chosen.id, chosen.logit, static_cast<double>(chosen.weight) / total};
        }
    }
    row_has_changed();
}

Sampler::Chosen Sampler::draw_truncated() {
    constexpr size_t n_least = 4096;
    if (only_top_p_ && n_ >= n_least) {
        Glance seen{};
        if (cut_top_p_of_most_likely(seen)) {
            return draw(options_.temperature);
        }
        return draw_from_nucleus(seen, options_.temperature);
    }
    truncate();
    return draw(final_temperature());
}

// The draw where top-p alone truncates, and leaves thousands: where exactly it cuts need not be
// known. Draw from the whole row, and reject what top-p drops. A logit under which certainly too
// little mass lies, which a sample suggests and the pass over the row confirms, answers that at
// once for nearly every draw; for the rest a pass adds up what is more likely.
Sampler::Chosen Sampler::draw_from_nucleus(const Glance & seen, float temperature) {
    constexpr double margin = 0.01;  // of the mass, for the sample's error
    const auto p = static_cast<double>(options_.top_p);
    // A histogram of the sample over the weights' exponents and three bits of their fractions.
    constexpr size_t n_buckets = 128 * 8;
    constexpr unsigned fraction_bits = 20;
    std::array<float, n_buckets + 1> masses{};
    for (const float weight : floats_) {
        uint32_t bits = 0;
        std::memcpy(&bits, &weight, sizeof bits);
        masses[std::min<size_t>(bits >> fraction_bits, n_buckets)] += weight;
    }
    double head = seen.mass;
    size_t bucket = n_buckets;
    while (bucket > 0 &&
           head + static_cast<double>(masses[bucket]) * seen.stands_for < (p - margin) * (seen.mass + seen.rest)) {
        head += static_cast<double>(masses[bucket]) * seen.stands_for;
        --bucket;
    }
    const auto edge = static_cast<uint32_t>(bucket + 1) << fraction_bits;
    float weight_kept_from = 0;
    std::memcpy(&weight_kept_from, &edge, sizeof edge);
    float kept_from = std::min(largest_ + std::log(weight_kept_from), seen.low);

    const auto mass_from = [&](float low) {
        kernels_->exp_sums_split(logits_, n_, allowed_, maxima_.data(), {largest_, 1.0F, cut_.logit, low}, sums_.data(),
                                 parts_.data());
        return total_of(parts_) + edited_mass(low);
    };
    const double mass_kept_from = mass_from(kept_from);
    const double mass = p * (total_of(sums_) + edited_mass(cut_.logit));
    if (mass_kept_from >= mass) {
        // The sample was misleading: what is below is dropped, and of what is above little is known.
        cut_below(kept_from);
        kept_from = seen.mass < mass ? seen.low : infinity;
    }
    const float scale = scale_of(temperature);
    bool sums_are_of_draw = scale == 1.0F && mass_kept_from < mass;
    while (true) {
        if (!sums_are_of_draw) {
            kernels_->exp_sums(logits_, n_, allowed_, maxima_.data(), {largest_, scale, cut_.logit, infinity},
                               sums_.data());
            sums_are_of_draw = true;
        }
        const Chosen chosen = draw_from_sums(scale);
        if (chosen.logit >= kept_from) {
            return chosen;
        }
        double before_it = mass_from(std::nextafter(chosen.logit, infinity));
        sums_are_of_draw = false;  // the cut is about to drop some of what they add up
        list(chosen.logit, std::nextafter(chosen.logit, infinity));
        weigh_list(largest_, 1.0F);
        for (const Candidate & one : list_) {
            before_it += one.id < chosen.id ? static_cast<double>(one.weight) : 0.0;
        }
        if (before_it < mass) {
            return chosen;
        }
        cut_ = {chosen.logit, chosen.id - 1};
    }
}

// Mirostat v2 (Basu et al., 2021): drops what would surprise more than mu bits, and moves mu so
// that the surprise comes to tau.
Sampler::Chosen Sampler::draw_mirostat() {
    if (options_.temperature == 0.0F) {
        return {best(), largest_, 1.0};
    }
    const float scale = scale_of(options_.temperature);
    kernels_->exp_sums(logits_, n_, allowed_, maxima_.data(), {largest_, scale, lowest, infinity}, sums_.data());
    list_.assign(edits_.begin(), edits_.end());
    const double total = total_of(sums_) + weigh_list(largest_, scale);
    constexpr double ln_2 = 0.69314718055994531;
    const double least = (std::log(total) - static_cast<double>(mirostat_mu_) * ln_2) / static_cast<double>(scale);
    if (least > 0) {
        list_.assign(1, {largest_, best(), 0.0F});
        listed_ = true;
        sorted_ = true;
    } else {
        cut_below(largest_ + static_cast<float>(least));
    }
    const Chosen chosen = draw(options_.temperature);
    const double surprise = -std::log2(chosen.probability);
    mirostat_mu_ -= options_.mirostat_eta * static_cast<float>(surprise - static_cast<double>(options_.mirostat_tau));
    return chosen;
}

int32_t Sampler::sample(const float * logits, size_t n, TokenBits allowed, size_t n_words, Logprobs * logprobs) {
    const Working working(busy_);
    struct Restore {
        Sampler & sampler;
        ~Restore() { sampler.restore_bits(); }
    } const restore{*this};
    look_at(logits, n, allowed, n_words, logprobs);
    int32_t chosen = 0;
    if (greedy_) {
        chosen = best();
    } else if (options_.mirostat != 0) {
        chosen = draw_mirostat().id;
    } else {
        chosen = draw_truncated().id;
    }
    if (logprobs != nullptr) {
        logprobs->chosen += logits[chosen];
    }
    return chosen;
}

void Sampler::measure_logprobs(const float * logits, size_t n, int32_t chosen, Logprobs & logprobs) {
    const Working working(busy_);
    take_row(logits, n);
    measure_logprobs(logprobs, /*maxima_are_of_all =*/false);
    logprobs.chosen += logits[chosen];
}

std::vector<TokenProbability> Sampler::distribution(const float * logits, size_t n, TokenBits allowed,
                                                    size_t n_words) const {
    const Working working(busy_);
    Sampler copy = *this;
    copy.look_at(logits, n, allowed, n_words, nullptr);
    float temperature = options_.temperature;
    if (options_.mirostat != 0) {
        copy.draw_mirostat();  // for the cut
    } else {
        copy.truncate();
        temperature = copy.final_temperature();
    }
    copy.list_kept();
    std::sort(copy.list_.begin(), copy.list_.end(), before);
    copy.sorted_ = true;
    if (temperature <= 0.0F) {
        return {{copy.list_.front().id, 1.0F}};
    }
    const double total = copy.weigh_list(copy.list_.front().logit, scale_of(temperature));
    std::vector<TokenProbability> result;
    for (const Candidate & one : copy.list_) {
        if (one.weight > 0) {
            result.push_back({one.id, static_cast<float>(static_cast<double>(one.weight) / total)});
        }
    }
    return result;
}

}  // namespace overspill
