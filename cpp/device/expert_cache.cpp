#include "device/expert_cache.h"

#include "base/assertions.h"
#include "base/error_capture.h"
#include "base/log.h"
#include "base/process.h"
#include "base/stopwatch.h"
#include "device/cache_trial.h"
#include "device/compute_hooks.h"
#include "device/devices.h"
#include "device/expert_slots.h"
#include "device/out_of_memory.h"
#include "product/expert_residency.h"
#include "product/product_graphs.h"

#include <ggml-cpp.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

namespace overspill {

namespace {

struct Pool {
    ggml_backend_dev_t device = nullptr;
    size_t n_bytes = 0;
    ggml_backend_buffer_ptr buffer;
    ggml_backend_ptr computes, copies;  // a stream of its own for each
    bool is_copying = false;
    // What a launch reads: the activations, then the slots.
    ggml_backend_buffer_ptr input_buffer;
    ggml_context_ptr input_context;
    ggml_tensor * input = nullptr;
    std::vector<std::unique_ptr<ExpertSlots>> stores;
};

// How much of a token's time its insertions may take from whoever decodes: more while there are free slots.
constexpr double share_of_insertions = 0.03, share_while_empty = 0.3;
constexpr size_t most_insertions_by_time = 16, most_while_empty = 24;
constexpr size_t most_used = 64;
constexpr size_t most_kept = 65536;  // uses of experts

}  // namespace

struct ExpertCache::State {
    struct Layer {
        int32_t number;  // in the model
        ExpertParts parts;
        ExpertForm form;
        size_t n_experts;
        size_t expert_bytes;
        Pool * pool = nullptr;
        ExpertSlots * store = nullptr;  // null: nothing is ever resident
        std::vector<int32_t> slot_of;   // by expert; -1: not resident
        std::vector<int32_t> free_slots;
        std::unique_ptr<SecondTouch> policy;
        ggml_backend_event_ptr copied;     // null where the device has no events
        std::vector<int32_t> fresh_slots;  // that are being copied to, for all that is known
        std::vector<uint16_t> used;        // by the tokens of the batch, n_used each
        std::vector<uint16_t> wanted;      // of the profile, the next one last
    };

    explicit State(ExpertCacheOptions given) : options(std::move(given)) {}

    std::vector<Pool> pools;
    std::unique_ptr<ProductGraphs> products;  // of devices that compute with the CPU
    ExpertCacheOptions options;
    std::vector<Layer> layers;
    bool is_laid_out = false;
    int64_t n_embd = 0, n_out = 0;
    ggml_backend_buffer_ptr host;  // pinned, if the driver has such memory: input, then results
    float * input = nullptr;
    int32_t * slots = nullptr;
    float * results = nullptr;
    Pool * launched = nullptr;                  // whose launch has not been waited for
    double credit_s = 0, insertion_s = 0.5e-3;  // of one, as measured
    size_t first_layer = 0;                     // whose turn it is to have the first insertion
    ExpertCounts counts;                        // of who decodes
    const Origin origin;
    std::mutex mutex;
    ExpertCounts published;     // guarded by it
    size_t n_tokens = 0;        // of the batch
    bool counts_token = false;  // which is one, decoded with the cache
    ExpertCounts before;        // the batch
    CacheTrial trial{options.is_trusted, options.worth};
    // Since it was full, or since they were last looked at.
    ExpertCounts looked_at;
    bool holds_whole_layers = false;
    bool has_given_up = false;
    uint64_t most_resident = 0, grown_at = 0;  // ever, and at which token

    void publish() {
        const std::lock_guard lock(mutex);
        published = counts;
    }

    bool take_host_memory(const ExpertForm & form);
    bool lay_out();
    bool lay_out(Pool & pool, const std::vector<Layer *> & of_pool);
    static void share_out(const std::vector<Layer *> & alike, bool whole_layers);
    void hold_whole_layers();
    void look_at_hits();
    void finish(bool computed, double seconds);
    void give_up(const std::string & why);
    void abandon(const std::string & why);
    bool is_full() const;
    void apply_policy(double seconds);
    void copy(Layer & layer, size_t expert, int32_t slot);
    size_t follow(Layer & layer);
    void finish_copies();
};

namespace {

OutOfMemoryError refused(const Pool & pool) {
    const std::string name = ggml_backend_dev_name(pool.device);
    return {name + " refused " + std::to_string(pool.n_bytes >> 20U) +
                " MiB for a cache of experts; a smaller one needs less",
            name, pool.n_bytes};
}

ggml_backend_ptr backend_of(ggml_backend_dev_t device) {
    ggml_backend_ptr backend(ggml_backend_dev_init(device, nullptr));
    if (!backend) {
        throw Error(std::string("no second stream of work could be had on ") + ggml_backend_dev_name(device));
    }
    return backend;
}

}  // namespace

ExpertCache::ExpertCache(ExpertCacheOptions options, const ProductSet * set, std::shared_ptr<const void> weights)
    : weights_(std::move(weights)), state_(std::make_unique<State>(std::move(options))) {
    state_->products = std::make_unique<ProductGraphs>(set, cpu_quantize);
    hook_devices();
    const AssertionGuard guard;
    for (const ExpertPool & one : state_->options.pools) {
        ggml_backend_dev_t device = device_named(one.device);
        if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            throw std::invalid_argument("the device of an expert cache must be a GPU, not " + one.device);
        }
        check_usable_after_fork(device);
        Pool & pool = state_->pools.emplace_back();
        pool.device = device;
        pool.n_bytes = one.n_bytes;
        pool.buffer.reset(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device), one.n_bytes));
        if (!pool.buffer) {
            throw refused(pool);
        }
        ggml_backend_buffer_set_usage(pool.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        pool.computes = backend_of(device);
        pool.copies = backend_of(device);
    }
}

ExpertCache::~ExpertCache() {
    const NoAssertionGuard destructors;
    state_->finish_copies();
    if (state_->launched != nullptr) {
        ggml_backend_synchronize(state_->launched->computes.get());
    }
}

void ExpertCache::State::finish_copies() {
    for (Pool & pool : pools) {
        if (pool.is_copying) {
            ggml_backend_synchronize(pool.copies.get());
        }
    }
}

ExpertCounts ExpertCache::counts() const {
    const auto lock = state_->origin.lock(state_->mutex);
    return state_->published;
}

// --- Layers

bool ExpertCache::State::take_host_memory(const ExpertForm & form) {
    if (host) {
        return form.n_embd() == n_embd && form.n_out() == n_out;
    }
    n_embd = form.n_embd();
    n_out = form.n_out();
    ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(pools.front().device);
    const size_t n_floats = static_cast<size_t>(n_embd) + most_used + static_cast<size_t>(n_out) * most_used;
    host.reset(ggml_backend_buft_alloc_buffer(pinned != nullptr ? pinned : ggml_backend_dev_buffer_type(cpu_device()),
                                              n_floats * sizeof(float)));
    if (!host) {
        throw ram_refused();
    }
    input = static_cast<float *>(ggml_backend_buffer_get_base(host.get()));
    slots = reinterpret_cast<int32_t *>(input + n_embd);
    results = input + n_embd + most_used;
    return true;
}

int32_t ExpertCache::layer_of(const FeedForwardNodes & nodes) {
    const ExpertParts parts = expert_parts_of(nodes);
    auto & layers = state_->layers;
    const auto known =
        std::find_if(layers.begin(), layers.end(), [&](const auto & layer) { return layer.parts == parts; });
    const auto n_used = static_cast<size_t>(nodes.ids->ne[0]);
    if (known != layers.end()) {
        return known->form.n_used == n_used ? static_cast<int32_t>(known - layers.begin()) : -1;
    }
    const ExpertForm form = ExpertForm::of(nodes);
    const ggml_tensor & x = *nodes.gate.node->src[1];
    const auto are_apart = [](const ggml_tensor * tensor) {
        return tensor == nullptr || (ggml_is_contiguous(tensor) && tensor->ne[3] == 1);
    };
    // In the warm-up there are more than are summed; where they have an input each, they are a second layer's.
    const bool is_usual = n_used <= most_used && x.ne[1] == 1 &&
                          (nodes.n_summed == 0 || nodes.n_summed == static_cast<int64_t>(n_used)) &&
                          std::all_of(parts.begin(), parts.end(), are_apart);
    if (state_->pools.empty() || state_->is_laid_out || !is_usual || !state_->take_host_memory(form)) {
        return -1;
    }
    State::Layer & layer = layers.emplace_back();
    layer.number = std::max(0, layer_of_experts(*nodes.down.node));
    layer.parts = parts;
    layer.form = form;
    layer.n_experts = static_cast<size_t>(parts[down]->ne[2]);
    layer.expert_bytes = bytes_of(parts);
    layer.slot_of.assign(layer.n_experts, -1);
    return static_cast<int32_t>(layers.size() - 1);
}

float * ExpertCache::input() {
    return state_->input;
}

// --- What is where

// All layers are known: how many slots each one has.
bool ExpertCache::State::lay_out() {
    is_laid_out = true;
    std::vector<Layer *> in_order;
    size_t all_bytes = 0, pool_bytes = 0;
    for (Layer & layer : layers) {
        in_order.push_back(&layer);
        all_bytes += layer.expert_bytes * layer.n_experts;
    }
    for (const Pool & pool : pools) {
        pool_bytes += pool.n_bytes;
    }
    std::sort(in_order.begin(), in_order.end(), [](const Layer * a, const Layer * b) { return a->number < b->number; });
    auto next = in_order.begin();
    double end_share = 0, layer_share = 0;
    for (Pool & pool : pools) {
        end_share += static_cast<double>(pool.n_bytes) / static_cast<double>(std::max<size_t>(1, pool_bytes));
        std::vector<Layer *> of_pool;
        const bool is_last = &pool == &pools.back();
        for (; next != in_order.end() && (is_last || layer_share < end_share - 1e-9); ++next) {
            layer_share +=
                static_cast<double>((*next)->expert_bytes * (*next)->n_experts) / static_cast<double>(all_bytes);
            of_pool.push_back(*next);
        }
        if (!lay_out(pool, of_pool)) {
            return false;
        }
    }
    for (Layer & layer : layers) {
        counts.n_experts += layer.n_experts;
    }
    return true;
}

bool ExpertCache::State::lay_out(Pool & pool, const std::vector<Layer *> & of_pool) {
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(pool.device);
    // Activations and slots side by side, so that one copy has both.
    const size_t input_bytes = (static_cast<size_t>(n_embd) + most_used) * sizeof(float);
    pool.input_context.reset(ggml_init({ggml_tensor_overhead() * 4, nullptr, true}));
    pool.input =
        ggml_new_tensor_1d(pool.input_context.get(), GGML_TYPE_F32, static_cast<int64_t>(input_bytes / sizeof(float)));
    pool.input_buffer.reset(ggml_backend_buft_alloc_buffer(type, input_bytes));
    if (!pool.input_buffer ||
        ggml_backend_tensor_alloc(pool.input_buffer.get(), pool.input,
                                  ggml_backend_buffer_get_base(pool.input_buffer.get())) != GGML_STATUS_SUCCESS) {
        return false;
    }
    // The same share of each form's experts.
    std::vector<std::vector<Layer *>> by_form;
    size_t all_bytes = 0;
    for (Layer * layer : of_pool) {
        auto known = std::find_if(by_form.begin(), by_form.end(),
                                  [&](const auto & one) { return one.front()->form == layer->form; });
        (known != by_form.end() ? *known : by_form.emplace_back()).push_back(layer);
        all_bytes += layer->expert_bytes * layer->n_experts;
    }
    const size_t pool_bytes = ggml_backend_buffer_get_size(pool.buffer.get());
    size_t used_bytes = 0;
    for (const auto & alike : by_form) {
        const Layer & first = *alike.front();
        size_t n_experts = 0;
        for (const Layer * layer : alike) {
            n_experts += layer->n_experts;
        }
        // Of what is left after the padding of each part, which is less than so much.
        constexpr size_t padding = 65536;
        const size_t reserved = by_form.size() * n_expert_parts * padding;
        const double share =
            static_cast<double>(pool_bytes - std::min(pool_bytes, reserved)) / static_cast<double>(all_bytes);
        const size_t n_slots = std::min(n_experts, static_cast<size_t>(share * static_cast<double>(n_experts)));
        if (n_slots < alike.size()) {
            continue;  // not one for each layer
        }
        auto store = std::make_unique<ExpertSlots>(first.form, n_slots);
        if (!store->place(pool.buffer.get(), used_bytes, first.parts) || !store->build(pool.device, *pool.input)) {
            return false;
        }
        for (Layer * layer : alike) {
            layer->pool = &pool;
            layer->store = store.get();
            layer->copied.reset(ggml_backend_event_new(pool.device));
            const auto known = options.profile.find(layer->number);
            if (known != options.profile.end()) {
                layer->wanted = known->second;
            }
        }
        share_out(alike, /*whole_layers =*/false);
        counts.n_slots += n_slots;
        pool.stores.push_back(std::move(store));
    }
    return true;
}

// Gives the slots of a store to its layers, which are in order: to each the same number, or to each one for all of its
// experts until there are none left. Nothing is resident then.
void ExpertCache::State::share_out(const std::vector<Layer *> & alike, bool whole_layers) {
    const size_t n_slots = alike.front()->store->n_slots();
    int32_t slot = 0;
    for (size_t i = 0; i < alike.size(); ++i) {
        Layer & layer = *alike[i];
        const size_t even = n_slots / alike.size() + (i < n_slots % alike.size() ? 1 : 0);
        const size_t n = std::min(layer.n_experts, whole_layers ? n_slots - static_cast<size_t>(slot) : even);
        layer.policy = std::make_unique<SecondTouch>(layer.n_experts, n);
        layer.slot_of.assign(layer.n_experts, -1);
        layer.free_slots.clear();
        for (size_t k = 0; k < n; ++k) {
            layer.free_slots.push_back(slot++);
        }
    }
}

void ExpertCache::State::hold_whole_layers() {
    holds_whole_layers = true;
    for (Pool & pool : pools) {
        for (const auto & store : pool.stores) {
            std::vector<Layer *> alike;
            for (Layer & layer : layers) {
                if (layer.store == store.get()) {
                    alike.push_back(&layer);
                    layer.wanted.resize(layer.n_experts);
                    std::iota(layer.wanted.begin(), layer.wanted.end(), uint16_t{0});
                }
            }
            share_out(alike, /*whole_layers =*/true);
        }
    }
    counts.n_resident = most_resident = 0;
    add_to_log(LogLevel::info, "tokens use other experts each time: the cache holds all experts of some layers now");
}

bool ExpertCache::has(int32_t layer, int32_t expert) const {
    return state_->trial.uses_cache() &&
           state_->layers[static_cast<size_t>(layer)].slot_of[static_cast<size_t>(expert)] >= 0;
}

// --- While a token is computed

void ExpertCache::start(size_t n_tokens) {
    state_->n_tokens = n_tokens;
    state_->counts_token = n_tokens == 1 && state_->trial.uses_cache();
    state_->before = state_->counts;
    if (state_->launched != nullptr) {  // a batch that was aborted
        ggml_backend_synchronize(std::exchange(state_->launched, nullptr)->computes.get());
    }
    for (State::Layer & layer : state_->layers) {
        // What was used before it is known where experts can be is of use, too.
        if (state_->is_laid_out || layer.used.size() > most_kept) {
            layer.used.clear();
        }
    }
}

void ExpertCache::note(int32_t number, const int32_t * experts, size_t n_tokens, size_t n_used) {
    State::Layer & layer = state_->layers[static_cast<size_t>(number)];
    for (size_t i = 0; i < n_tokens * n_used && !state_->has_given_up; ++i) {
        layer.used.push_back(static_cast<uint16_t>(experts[i]));
    }
    if (state_->counts_token) {
        const auto hits = static_cast<uint64_t>(
            std::count_if(experts, experts + n_used, [&](int32_t expert) { return has(number, expert); }));
        state_->counts.n_requests += n_used;
        state_->counts.n_hits += hits;
        state_->counts.hit_bytes += hits * layer.expert_bytes;
        state_->counts.miss_bytes += (n_used - hits) * layer.expert_bytes;
    }
}

void ExpertCache::launch(int32_t number, const int32_t * experts, size_t n_used) {
    State & state = *state_;
    State::Layer & layer = state.layers[static_cast<size_t>(number)];
    size_t n = 0;
    bool is_fresh = false;
    for (size_t k = 0; k < n_used; ++k) {
        if (has(number, experts[k])) {
            const int32_t slot = layer.slot_of[static_cast<size_t>(experts[k])];
            state.slots[n++] = slot;
            const auto & fresh = layer.fresh_slots;
            is_fresh = is_fresh || std::find(fresh.begin(), fresh.end(), slot) != fresh.end();
        }
    }
    if (n == 0) {
        return;
    }
    Pool & pool = *layer.pool;
    if (is_fresh) {
        if (layer.copied) {
            ggml_backend_event_wait(pool.computes.get(), layer.copied.get());
        } else {
            ggml_backend_synchronize(pool.copies.get());
        }
        layer.fresh_slots.clear();
    }
    const ExpertLaunch & launch = layer.store->launch(n);
    ggml_backend_t backend = pool.computes.get();
    ggml_backend_tensor_set_async(backend, pool.input, state.input, 0,
                                  (static_cast<size_t>(state.n_embd) + n) * sizeof(float));
    // Where the device computes with the CPU, it does so with the same products; and nobody ends it half done.
    const ComputeScope scope(0, state.products.get());
    if (ggml_backend_graph_compute_async(backend, launch.graph) != GGML_STATUS_SUCCESS) {
        GGML_ABORT("%s could not compute experts", ggml_backend_dev_name(pool.device));
    }
    ggml_backend_tensor_get_async(backend, launch.result, state.results, 0, ggml_nbytes(launch.result));
    state.launched = &pool;
}

const float * ExpertCache::results() {
    if (state_->launched != nullptr) {
        ggml_backend_synchronize(std::exchange(state_->launched, nullptr)->computes.get());
    }
    return state_->results;
}

// --- Between tokens

void ExpertCache::finish(bool computed, double seconds) {
    try {
        const AssertionGuard guard;
        state_->finish(computed, seconds);
    } catch (const std::exception & error) {
        state_->abandon(error.what());
    }
}

// What a device that has failed holds is left to it: its destructors would end the process.
void ExpertCache::State::abandon(const std::string & why) {
    static_cast<void>(std::make_unique<std::vector<Pool>>(std::move(pools)).release());
    pools.clear();
    give_up(why);
}

void ExpertCache::State::finish(bool computed, double seconds) {
    const bool is_decoding = n_tokens == 1;
    if (!computed) {
        counts = before;
        return;
    }
    if (has_given_up || (!is_laid_out && !is_decoding)) {
        return;
    }
    if (!is_laid_out) {
        const ErrorCapture errors;
        if (!lay_out()) {
            give_up(errors.reason("the GPU has no room to compute them"));
        } else if (counts.n_slots == 0) {
            give_up(layers.empty() ? "the CPU computes none of them in a form that is known"
                                   : "there is not room for one of each layer");
        }
    } else if (is_decoding && is_full()) {
        trial.note(seconds);
        counts.is_proven = trial.has_measured() && trial.uses_cache();
        if (trial.is_over() && !trial.uses_cache()) {
            counts.is_off = true;
            give_up("decoding is faster without");
        }
    }
    counts.n_tokens += counts_token ? 1 : 0;
    // Not while others decode without it, for comparison: copies would slow them down.
    if (!has_given_up && trial.uses_cache()) {
        look_at_hits();
        apply_policy(seconds);
    }
    publish();
}

// Gives the memory back. Layers stay known, and have nothing resident.
void ExpertCache::State::give_up(const std::string & why) {
    has_given_up = true;
    finish_copies();
    for (Layer & layer : layers) {
        layer.store = nullptr;
        layer.pool = nullptr;
        layer.slot_of.assign(layer.n_experts, -1);
        if (!pools.empty()) {
            layer.copied.reset();
        } else {
            static_cast<void>(layer.copied.release());
        }
    }
    pools.clear();
    counts.n_resident = counts.n_slots = 0;
    add_to_log(LogLevel::warning, "no experts are cached on GPUs: " + why +
                                      "; a model that is loaded anew with experts=\"static\" uses their memory");
    publish();
}

// Where tokens do not come back to experts, a visit to the GPU in each layer is not worth it.
void ExpertCache::State::look_at_hits() {
    constexpr uint64_t n_looked_at = 128;
    constexpr double least_gain = 0.05;
    if (!is_full() || holds_whole_layers || options.most_insertions > 0) {
        looked_at = counts;
        return;
    }
    if (counts.n_tokens < looked_at.n_tokens + n_looked_at) {
        return;
    }
    const auto per_request = [&](uint64_t n) {
        return static_cast<double>(n) /
               static_cast<double>(std::max<uint64_t>(1, counts.n_requests - looked_at.n_requests));
    };
    const double resident = static_cast<double>(counts.n_resident) / static_cast<double>(counts.n_experts);
    if (per_request(counts.n_hits - looked_at.n_hits) < resident + least_gain && resident < 1 - least_gain) {
        hold_whole_layers();
    }
    looked_at = counts;
}

// Or as good as: some layers use few of their experts.
bool ExpertCache::State::is_full() const {
    constexpr uint64_t long_ago = 64;
    return counts.n_resident > 0 && (counts.n_resident == counts.n_slots || counts.n_tokens > grown_at + long_ago);
}

void ExpertCache::State::apply_policy(double seconds) {
    size_t most = options.most_insertions;
    if (most == 0) {
        const double share = is_full() ? share_of_insertions : share_while_empty;
        credit_s = std::min(credit_s + share * seconds, share_while_empty * seconds + insertion_s);
        most = std::min(is_full() ? most_insertions_by_time : most_while_empty,
                        static_cast<size_t>(std::max(0.0, credit_s / insertion_s)));
    }
    const Stopwatch watch;
    size_t n_copied = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
        Layer & layer = layers[(first_layer + i) % layers.size()];
        if (layer.store == nullptr) {
            continue;
        }
        const size_t n_used = layer.form.n_used;
        size_t n_admitted = 0;
        for (size_t at = 0; at + n_used <= layer.used.size(); at += n_used) {
            n_admitted +=
                layer.policy->use(layer.used.data() + at, n_used, most - std::min(most, n_copied + n_admitted));
        }
        for (; !layer.wanted.empty() && n_copied + n_admitted < most; layer.wanted.pop_back()) {
            const uint16_t expert = layer.wanted.back();
            n_admitted += expert < layer.n_experts && layer.policy->prepare(expert) ? 1 : 0;
        }
        if (n_admitted > 0) {
            n_copied += follow(layer);
        }
    }
    first_layer = (first_layer + 1) % layers.size();
    if (n_copied > 0 && options.most_insertions == 0) {
        const double spent_s = watch.seconds();
        credit_s -= spent_s;
        insertion_s += 0.1 * (spent_s / static_cast<double>(n_copied) - insertion_s);
    }
}

// Copies what the policy has taken in to where what it has dropped was.
size_t ExpertCache::State::follow(Layer & layer) {
    for (size_t expert = 0; expert < layer.n_experts; ++expert) {
        int32_t & slot = layer.slot_of[expert];
        if (slot >= 0 && !layer.policy->contains(expert)) {
            layer.free_slots.push_back(std::exchange(slot, -1));
            --counts.n_resident;
        }
    }
    size_t n = 0;
    for (size_t expert = 0; expert < layer.n_experts; ++expert) {
        if (layer.slot_of[expert] < 0 && layer.policy->contains(expert)) {
            const int32_t slot = layer.free_slots.back();
            layer.free_slots.pop_back();
            copy(layer, expert, slot);
            ++n;
        }
    }
    if (n > 0 && layer.copied) {
        ggml_backend_event_record(layer.copied.get(), layer.pool->copies.get());
    }
    return n;
}

void ExpertCache::State::copy(Layer & layer, size_t expert, int32_t slot) {
    layer.store->copy(layer.pool->copies.get(), layer.parts, expert, slot);
    layer.slot_of[expert] = slot;
    if (std::find(layer.fresh_slots.begin(), layer.fresh_slots.end(), slot) == layer.fresh_slots.end()) {
        layer.fresh_slots.push_back(slot);
    }
    layer.pool->is_copying = true;
    ++counts.n_resident;
    if (counts.n_resident > most_resident) {
        most_resident = counts.n_resident;
        grown_at = counts.n_tokens;
    }
    ++counts.n_insertions;
}

ExpertProfile ExpertCache::profile() const {
    ExpertProfile found;
    for (const State::Layer & layer : state_->layers) {
        if (layer.store != nullptr && !state_->holds_whole_layers) {
            // What there was no time for is worth less than what tokens have used.
            std::vector<uint16_t> & to = found[layer.number];
            std::copy_if(layer.wanted.begin(), layer.wanted.end(), std::back_inserter(to),
                         [&](uint16_t expert) { return !layer.policy->contains(expert); });
            for (const size_t expert : layer.policy->in_order()) {
                to.push_back(static_cast<uint16_t>(expert));
            }
        }
    }
    return found;
}

void ExpertCache::shuffle(uint64_t seed) {
    std::mt19937_64 random(seed);
    for (State::Layer & layer : state_->layers) {
        if (layer.store == nullptr) {
            continue;
        }
        std::vector<uint16_t> experts(layer.n_experts);
        for (size_t i = 0; i < experts.size(); ++i) {
            experts[i] = static_cast<uint16_t>(i);
        }
        std::shuffle(experts.begin(), experts.end(), random);
        // Twice, so that all of them are admitted.
        layer.policy->use(experts.data(), experts.size(), 0);
        layer.policy->use(experts.data(), experts.size(), experts.size());
        state_->follow(layer);
    }
}

}  // namespace overspill
