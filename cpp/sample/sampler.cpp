#include "sample/sampler.h"

#include "base/error.h"
#include "sample/draw.h"
#include "sample/top_p.h"
#include "sample/truncation.h"

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>

namespace overspill {

namespace {

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

}  // namespace

Sampler::Sampler(SamplingOptions options) : options_(sorted(std::move(options))), logit_edits_(options_) {
    const bool shifts_the_best = options_.typical_p < 1.0F ||
                                 (options_.xtc_probability > 0.0F && options_.xtc_threshold <= 0.5F) ||
                                 options_.dynamic_temperature_range > 0.0F || options_.mirostat != 0;
    greedy_ = options_.temperature == 0.0F && !shifts_the_best;
    only_top_p_ = options_.top_p < 1 && options_.top_k == 0 && options_.min_p == 0.0F && options_.top_n_sigma == 0.0F &&
                  !shifts_the_best && options_.temperature > 0;
    restore({options_.seed ? *options_.seed : std::random_device{}() >> 1U, 0, {}, 2.0F * options_.mirostat_tau});
}

void Sampler::reset() {
    restore({random_.seed(), 0, {}, 2.0F * options_.mirostat_tau});
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
    return {random_.seed(), random_.n_draws(), logit_edits_.history(), mirostat_mu_};
}

void Sampler::restore(const SamplerState & state, const Interrupt::Poll & poll) {
    for (const int32_t token : state.history) {
        check_token("history: a token", token);
    }
    // Random numbers are drawn again to get there.
    constexpr uint64_t most_draws = uint64_t{1} << 32U;
    if (state.n_draws > most_draws) {
        throw std::invalid_argument("n_draws must be 0 to 4294967296, not " + std::to_string(state.n_draws));
    }
    Random random(state.seed);
    constexpr uint64_t asking_interval = uint64_t{1} << 20U;
    while (random.n_draws() < state.n_draws) {
        random.skip(std::min(asking_interval, state.n_draws - random.n_draws()));
        if (poll && poll()) {
            throw CancelledError("interrupted");
        }
    }
    const Working working(busy_);
    random_ = random;
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

void Sampler::take(const LogitsRow & row, TokenBits allowed, size_t n_words) {
    candidates_.row.take(row, logit_edits_.of(row.logits, row.n), allowed, n_words);
    candidates_.keep_all();
}

int32_t Sampler::sample(const LogitsRow & row, TokenBits allowed, size_t n_words, Logprobs * logprobs) {
    const Working working(busy_);
    Candidates & c = candidates_;
    struct LetGo {
        Row & row;
        ~LetGo() { row.let_go(); }
    } const let_go{c.row};
    take(row, allowed, n_words);
    if (logprobs != nullptr) {
        c.row.measure(*logprobs);
    }
    constexpr size_t n_least = 4096;  // under this, listing everything is as fast
    Glance seen{};
    int32_t chosen = 0;
    if (greedy_) {
        chosen = c.row.best();
    } else if (options_.mirostat != 0) {
        chosen = draw_mirostat(c, random_, options_, mirostat_mu_).id;
    } else if (!only_top_p_ || row.n < n_least) {
        truncate(c, options_, random_);
        chosen = draw(c, random_, final_temperature(c, options_)).id;
    } else if (cut_top_p_of_most_likely(c, options_.top_p, seen)) {
        chosen = draw(c, random_, options_.temperature).id;
    } else {
        chosen = draw_from_nucleus(c, random_, options_.top_p, seen, options_.temperature).id;
    }
    if (logprobs != nullptr) {
        logprobs->chosen += row.logits[chosen];
    }
    return chosen;
}

void Sampler::measure_logprobs(const LogitsRow & row, int32_t chosen, Logprobs & logprobs) {
    const Working working(busy_);
    candidates_.row.take_unedited(row.logits, row.n);
    candidates_.row.measure(logprobs);
    logprobs.chosen += row.logits[chosen];
}

std::vector<TokenProbability> Sampler::distribution(const LogitsRow & row, TokenBits allowed, size_t n_words) const {
    const Working working(busy_);
    Sampler copy = *this;
    copy.take(row, allowed, n_words);
    Candidates & c = copy.candidates_;
    float temperature = options_.temperature;
    if (options_.mirostat != 0) {
        draw_mirostat(c, copy.random_, options_, copy.mirostat_mu_);  // for the cut
    } else {
        truncate(c, options_, copy.random_);
        temperature = final_temperature(c, options_);
    }
    c.list_kept();
    std::sort(c.list.begin(), c.list.end(), before);
    c.is_sorted = true;
    if (temperature <= 0.0F) {
        return {{c.list.front().id, 1.0F}};
    }
    const double total = c.weigh(c.list.front().logit, scale_of(temperature));
    std::vector<TokenProbability> result;
    for (const Candidate & one : c.list) {
        if (one.weight > 0) {
            result.push_back({one.id, static_cast<float>(static_cast<double>(one.weight) / total)});
        }
    }
    return result;
}

}  // namespace overspill
