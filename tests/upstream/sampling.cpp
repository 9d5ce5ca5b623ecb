// llama.cpp's own sampler chain, in the order of its tools, behind C functions for ctypes: the
// reference of the sampler's tests and the rival of its benchmark.
#include <llama.h>

#include <algorithm>
#include <chrono>
#include <vector>

extern "C" {

struct Options {
    float temperature;
    float dynamic_temperature_range;
    float dynamic_temperature_exponent;
    int32_t top_k;
    float top_p;
    float min_p;
    float typical_p;
    float top_n_sigma;
    float xtc_probability;
    float xtc_threshold;
    float repeat_penalty;
    float frequency_penalty;
    float presence_penalty;
    int32_t repeat_last_n;
    float dry_multiplier;
    float dry_base;
    int32_t dry_allowed_length;
    int32_t dry_last_n;
    int32_t mirostat;
    float mirostat_tau;
    float mirostat_eta;
    uint32_t seed;
};

llama_model * upstream_vocabulary(const char * path) {
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    return llama_model_load_from_file(path, params);
}

// Like a tool, it leaves out what is switched off. `model` is for DRY, and may be null without it.
llama_sampler * upstream_chain(const Options * o, int32_t n_vocab, const llama_logit_bias * bias, int32_t n_bias,
                               const llama_model * model, const char ** breakers, size_t n_breakers) {
    llama_sampler * chain = llama_sampler_chain_init({/*no_perf =*/true});
    const auto add = [chain](llama_sampler * sampler) { llama_sampler_chain_add(chain, sampler); };
    if (n_bias > 0) {
        add(llama_sampler_init_logit_bias(n_vocab, n_bias, bias));
    }
    if (o->mirostat == 0) {
        if (o->repeat_penalty != 1 || o->frequency_penalty != 0 || o->presence_penalty != 0) {
            add(llama_sampler_init_penalties(n_vocab, o->repeat_last_n, o->repeat_penalty, o->frequency_penalty,
                                             o->presence_penalty));
        }
        if (model != nullptr && o->dry_multiplier > 0) {
            add(llama_sampler_init_dry(llama_model_get_vocab(model), o->dry_multiplier, o->dry_base,
                                       o->dry_allowed_length, o->dry_last_n, breakers, n_breakers));
        }
        if (o->top_n_sigma > 0) {
            add(llama_sampler_init_top_n_sigma(o->top_n_sigma));
        }
        if (o->top_k > 0) {
            add(llama_sampler_init_top_k(o->top_k));
        }
        if (o->typical_p < 1) {
            add(llama_sampler_init_typical(o->typical_p, 0));
        }
        if (o->top_p < 1) {
            add(llama_sampler_init_top_p(o->top_p, 0));
        }
        if (o->min_p > 0) {
            add(llama_sampler_init_min_p(o->min_p, 0));
        }
        if (o->xtc_probability > 0) {
            add(llama_sampler_init_xtc(o->xtc_probability, o->xtc_threshold, 0, o->seed));
        }
    }
    if (o->temperature == 0 && o->dynamic_temperature_range == 0) {
        add(llama_sampler_init_greedy());
        return chain;
    }
    add(llama_sampler_init_temp_ext(o->temperature, o->dynamic_temperature_range, o->dynamic_temperature_exponent));
    add(o->mirostat == 2 ? llama_sampler_init_mirostat_v2(o->seed, o->mirostat_tau, o->mirostat_eta)
                         : llama_sampler_init_dist(o->seed));
    return chain;
}

void upstream_accept(llama_sampler * chain, int32_t token) {
    llama_sampler_accept(chain, token);
}

void upstream_free(llama_sampler * chain) {
    llama_sampler_free(chain);
}

static llama_token_data_array apply(llama_sampler * chain, const float * logits, size_t n,
                                    std::vector<llama_token_data> & candidates) {
    candidates.resize(n);
    for (size_t i = 0; i < n; ++i) {
        candidates[i] = {static_cast<llama_token>(i), logits[i], 0.0F};
    }
    llama_token_data_array array{candidates.data(), n, -1, false};
    llama_sampler_apply(chain, &array);
    return array;
}

// Writes the ids and probabilities of what is left, returns how many, and the chosen token.
size_t upstream_sample(llama_sampler * chain, const float * logits, size_t n, int32_t * ids, float * probabilities,
                       int32_t * chosen) {
    std::vector<llama_token_data> candidates;
    const llama_token_data_array array = apply(chain, logits, n, candidates);
    for (size_t i = 0; i < array.size; ++i) {
        ids[i] = array.data[i].id;
        probabilities[i] = array.data[i].p;
    }
    *chosen = array.selected < 0 ? -1 : array.data[array.selected].id;
    return array.size;
}

// The median time of a draw, in microseconds.
double upstream_time(llama_sampler * chain, const float * logits, size_t n, int32_t repeats) {
    std::vector<llama_token_data> candidates;
    std::vector<double> times;
    for (int32_t i = 0; i < repeats; ++i) {
        const auto start = std::chrono::steady_clock::now();
        apply(chain, logits, n, candidates);
        times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
    }
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    return times[static_cast<size_t>(repeats / 2)];
}
}
