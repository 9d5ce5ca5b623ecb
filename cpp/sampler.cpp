#include "sampler.h"

#include "error.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <sstream>

namespace overspill {

namespace {

// The conditions below are written as `!(in range)`, so that NaN is out of range too.
template <typename T>
[[noreturn]] void out_of_range(const char * name, const char * range, T value) {
    std::ostringstream message;
    message << name << " must be " << range << ", not " << value;
    throw std::invalid_argument(message.str());
}

void check(const SamplingOptions & o) {
    if (!(o.temperature >= 0 && std::isfinite(o.temperature))) {
        out_of_range("temperature", "0 or more and finite", o.temperature);
    }
    if (o.top_k < 0) {
        out_of_range("top_k", "0 or more", o.top_k);
    }
    if (!(o.top_p >= 0 && o.top_p <= 1)) {
        out_of_range("top_p", "0 to 1", o.top_p);
    }
    if (!(o.min_p >= 0 && o.min_p <= 1)) {
        out_of_range("min_p", "0 to 1", o.min_p);
    }
    if (!(o.repeat_penalty > 0 && std::isfinite(o.repeat_penalty))) {
        out_of_range("repeat_penalty", "over 0 and finite", o.repeat_penalty);
    }
    if (!std::isfinite(o.frequency_penalty)) {
        out_of_range("frequency_penalty", "finite", o.frequency_penalty);
    }
    if (!std::isfinite(o.presence_penalty)) {
        out_of_range("presence_penalty", "finite", o.presence_penalty);
    }
    if (o.repeat_last_n < -1) {
        out_of_range("repeat_last_n", "-1 or more", o.repeat_last_n);
    }
    if (o.seed == LLAMA_DEFAULT_SEED) {
        out_of_range("seed", "0 to 4294967294", *o.seed);
    }
}

[[noreturn]] void not_numbers() {
    throw Error(
        "the model's logits are not numbers (NaN or infinite): the file may be damaged, "
        "or a value overflowed on this device");
}

}  // namespace

Sampler::Sampler(const SamplingOptions & options, int32_t n_vocab, int32_t n_ctx)
    : n_vocab_(static_cast<size_t>(n_vocab)) {
    check(options);
    const int32_t last_n = options.repeat_last_n < 0 ? n_ctx : options.repeat_last_n;
    const bool penalties = last_n != 0 && (options.repeat_penalty != 1.0F || options.frequency_penalty != 0.0F ||
                                           options.presence_penalty != 0.0F);
    greedy_ = options.temperature == 0.0F && !penalties;
    if (greedy_) {
        return;
    }
    candidates_.resize(n_vocab_);
    chain_.reset(llama_sampler_chain_init({/*no_perf =*/true}));
    const auto add = [this](llama_sampler * sampler) { llama_sampler_chain_add(chain_.get(), sampler); };
    if (penalties) {
        add(llama_sampler_init_penalties(n_vocab, last_n, options.repeat_penalty, options.frequency_penalty,
                                         options.presence_penalty));
    }
    if (options.temperature == 0.0F) {
        add(llama_sampler_init_greedy());
        return;
    }
    if (options.top_k > 0) {
        add(llama_sampler_init_top_k(options.top_k));
    }
    if (options.top_p < 1.0F) {
        add(llama_sampler_init_top_p(options.top_p, 1));
    }
    if (options.min_p > 0.0F) {
        add(llama_sampler_init_min_p(options.min_p, 1));
    }
    add(llama_sampler_init_temp(options.temperature));
    add(llama_sampler_init_dist(options.seed ? *options.seed : std::random_device{}() >> 1U));
}

int32_t Sampler::sample(const float * logits) {
    size_t chosen = 0;
    if (greedy_) {
        chosen = argmax(logits, n_vocab_);
    } else {
        bool numbers = true;
        for (size_t i = 0; i < n_vocab_; ++i) {
            candidates_[i] = {static_cast<llama_token>(i), logits[i], 0.0F};
            numbers &= logits[i] == logits[i];
        }
        if (!numbers) {
            not_numbers();  // and upstream's sort must not see them: NaN has no order
        }
        llama_token_data_array candidates{candidates_.data(), n_vocab_, -1, false};
        llama_sampler_apply(chain_.get(), &candidates);
        if (candidates.selected < 0) {
            not_numbers();
        }
        chosen = static_cast<size_t>(candidates.data[candidates.selected].id);
    }
    if (!std::isfinite(logits[chosen])) {
        not_numbers();
    }
    return static_cast<int32_t>(chosen);
}

void Sampler::accept(int32_t token) {
    if (chain_) {
        llama_sampler_accept(chain_.get(), token);
    }
}

size_t argmax(const float * logits, size_t n) {
    constexpr size_t n_lanes = 32;  // enough independent maxima to hide the latency of one
    constexpr size_t block = 4096;  // small enough to be in the cache still when it is searched
    float best = -std::numeric_limits<float>::infinity();
    size_t best_block = 0;
    for (size_t start = 0; start < n; start += block) {
        const size_t end = std::min(start + block, n);
        // Written so that compilers make vector instructions of it without leave to reorder
        // floating point. NaN is never larger, so it is never chosen over a number.
        std::array<float, n_lanes> lanes;
        lanes.fill(-std::numeric_limits<float>::infinity());
        size_t i = start;
        for (; i + n_lanes <= end; i += n_lanes) {
            for (size_t lane = 0; lane < n_lanes; ++lane) {
                const float logit = logits[i + lane];
                lanes[lane] = logit > lanes[lane] ? logit : lanes[lane];
            }
        }
        float block_best = *std::max_element(lanes.begin(), lanes.end());
        for (; i < end; ++i) {
            block_best = logits[i] > block_best ? logits[i] : block_best;
        }
        if (block_best > best) {
            best = block_best;
            best_block = start;
        }
    }
    const float * to = logits + std::min(best_block + block, n);
    const float * found = std::find(logits + best_block, to, best);
    return found == to ? best_block : static_cast<size_t>(found - logits);
}

float log_probability(const float * logits, size_t n, int32_t token) {
    const double largest = logits[argmax(logits, n)];
    double sum = 0;
    for (size_t i = 0; i < n; ++i) {
        sum += std::exp(static_cast<double>(logits[i]) - largest);
    }
    return static_cast<float>(static_cast<double>(logits[token]) - largest - std::log(sum));
}

}  // namespace overspill
