#include "device/expert_cache.h"

#include "base/assertions.h"
#include "base/error_capture.h"
#include "base/log.h"
#include "base/process.h"
#include "base/stopwatch.h"
#include "device/compute_hooks.h"
#include "device/devices.h"
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

// The matrices and biases of a layer's experts, in the order in which they are in a slot; null: there is none.
enum Part : size_t { gate, gate_bias, up, up_bias, down, down_bias, n_parts };
using Parts = std::array<const ggml_tensor *, n_parts>;

bool is_bias(size_t part) {
    return part == gate_bias || part == up_bias || part == down_bias;
}

// Of one expert.
size_t bytes_of(const ggml_tensor & tensor, size_t part) {
    return is_bias(part) ? tensor.nb[1] : tensor.nb[2];
}

size_t bytes_of(const Parts & parts) {
    size_t n = 0;
    for (size_t part = 0; part < n_parts; ++part) {
        n += parts[part] != nullptr ? bytes_of(*parts[part], part) : 0;
    }
    return n;
}

Parts parts_of(const FeedForwardNodes & nodes) {
    Parts parts = {};
    parts[gate] = nodes.gate.node->src[0];
    parts[gate_bias] = nodes.gate.bias;
    if (nodes.up.node != nullptr && nodes.up.node != nodes.gate.node) {
        parts[up] = nodes.up.node->src[0];
        parts[up_bias] = nodes.up.bias;
    }
    parts[down] = nodes.down.node->src[0];
    parts[down_bias] = nodes.down.bias;
    return parts;
}

// What decides whether experts of two layers can be in the same slots, and be computed by the same graph.
struct Form {
    std::array<ggml_type, n_parts> types;
    std::array<std::array<int64_t, 2>, n_parts> shapes;
    std::array<int64_t, 2> first_rows;  // of gate and up
    bool is_merged;
    ggml_op op;
    std::array<int32_t, GGML_MAX_OP_PARAMS / sizeof(int32_t)> op_params;
    bool is_split;  // a gated activation of two tensors
    bool is_squared;
    size_t n_used;

    static Form of(const FeedForwardNodes & nodes) {
        Form form = {};
        const Parts parts = parts_of(nodes);
        for (size_t part = 0; part < n_parts; ++part) {
            if (parts[part] != nullptr) {
                form.types[part] = parts[part]->type;
                form.shapes[part] = {parts[part]->ne[0], parts[part]->ne[1]};
            } else {
                form.types[part] = GGML_TYPE_COUNT;
            }
            if (is_bias(part)) {
                form.shapes[part][1] = 0;  // the number of experts
            }
        }
        form.first_rows = {nodes.gate.first_row, nodes.up.first_row};
        form.is_merged = nodes.up.node == nodes.gate.node;
        const ggml_tensor * activation = nodes.activated;
        form.is_squared = activation->op == GGML_OP_SQR;
        activation = form.is_squared ? activation->src[0] : activation;
        form.op = activation->op;
        std::copy(std::begin(activation->op_params), std::end(activation->op_params), form.op_params.begin());
        form.is_split = activation->op == GGML_OP_GLU && activation->src[1] != nullptr;
        form.n_used = static_cast<size_t>(nodes.ids->ne[0]);
        return form;
    }
    bool operator==(const Form & other) const {
        return types == other.types && shapes == other.shapes && first_rows == other.first_rows &&
               is_merged == other.is_merged && op == other.op && op_params == other.op_params &&
               is_split == other.is_split && is_squared == other.is_squared && n_used == other.n_used;
    }

    int64_t n_embd() const { return shapes[gate][0]; }
    int64_t n_ff() const { return shapes[down][0]; }
    int64_t n_out() const { return shapes[down][1]; }
};

struct BackendDeleter {
    void operator()(ggml_backend_t backend) const { ggml_backend_free(backend); }
};
using Backend = std::unique_ptr<ggml_backend, BackendDeleter>;

// A graph that computes so many experts of a token.
struct Launch {
    ggml_context_ptr context;
    ggml_cgraph * graph = nullptr;
    ggml_gallocr_ptr memory;
    ggml_tensor * result = nullptr;  // (n_out, experts)
};

// Slots for experts of one form, in one pool.
struct Store {
    Form form;
    size_t n_slots = 0;
    ggml_context_ptr context;
    std::array<ggml_tensor *, n_parts> tensors = {};  // the last dimension is the slot
    std::vector<Launch> launches;                     // of 1 expert, 2, ...
};

struct Pool {
    ggml_backend_dev_t device = nullptr;
    size_t n_bytes = 0;
    ggml_backend_buffer_ptr buffer;
    Backend computes, copies;  // a stream of its own for each
    bool is_copying = false;
    // What a launch reads: the activations, then the slots.
    ggml_backend_buffer_ptr input_buffer;
    ggml_context_ptr input_context;
    ggml_tensor * input = nullptr;
    std::vector<std::unique_ptr<Store>> stores;
};

// How much of a token's time its insertions may take from whoever decodes: more while there are free slots.
constexpr double share_of_insertions = 0.03, share_while_empty = 0.3;
constexpr size_t most_insertions_by_time = 16, most_while_empty = 24;
constexpr size_t most_used = 64;
constexpr size_t most_kept = 65536;  // uses of experts

// Whether decoding is faster with the cache than without, found once.
class Trial {
  public:
    Trial(bool is_over, double worth) : worth_(worth), is_over_(is_over) {}
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

}  // namespace

struct ExpertCache::State {
    struct Layer {
        int32_t number;  // in the model
        Parts parts;
        Form form;
        size_t n_experts;
        size_t expert_bytes;
        Pool * pool = nullptr;
        Store * store = nullptr;       // null: nothing is ever resident
        std::vector<int32_t> slot_of;  // by expert; -1: not resident
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
    Trial trial{options.is_trusted, options.worth};
    // Since it was full, or since they were last looked at.
    ExpertCounts looked_at;
    bool holds_whole_layers = false;
    bool has_given_up = false;
    uint64_t most_resident = 0, grown_at = 0;  // ever, and at which token

    void publish() {
        const std::lock_guard lock(mutex);
        published = counts;
    }

    bool take_host_memory(const Form & form);
    bool lay_out();
    bool lay_out(Pool & pool, const std::vector<Layer *> & of_pool);
    static void share_out(const std::vector<Layer *> & alike, bool whole_layers);
    void hold_whole_layers();
    void look_at_hits();
    void finish(bool computed, double seconds);
    void give_up(const std::string & why);
    void abandon(const std::string & why);
    static bool build(Pool & pool, Store & store);
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

Backend backend_of(ggml_backend_dev_t device) {
    Backend backend(ggml_backend_dev_init(device, nullptr));
    if (!backend) {
        throw Error(std::string("no second stream of work could be had on ") + ggml_backend_dev_name(device));
    }
    return backend;
}

// A projection of the activations with the matrices in slots.
ggml_tensor * project(ggml_context * context, const Store & store, Part weights, ggml_tensor * x, ggml_tensor * ids) {
    ggml_tensor * y = ggml_mul_mat_id(context, store.tensors[weights], x, ids);
    ggml_tensor * bias = store.tensors[weights + 1];
    return bias != nullptr ? ggml_add_id(context, y, bias, ids) : y;
}

ggml_tensor * rows(ggml_context * context, ggml_tensor * y, int64_t first, int64_t n) {
    return ggml_view_3d(context, y, n, y->ne[1], y->ne[2], y->nb[1], y->nb[2], static_cast<size_t>(first) * y->nb[0]);
}

// As the layer's own graph has it.
ggml_tensor * activation(ggml_context * context, const Store & store, ggml_tensor * x, ggml_tensor * ids) {
    const Form & form = store.form;
    ggml_tensor * of_gate = project(context, store, gate, x, ids);
    ggml_tensor * activated = nullptr;
    if (form.op != GGML_OP_GLU) {
        activated = ggml_unary(context, of_gate, static_cast<ggml_unary_op>(form.op_params[0]));
        return form.is_squared ? ggml_sqr(context, activated) : activated;
    }
    const auto op = static_cast<ggml_glu_op>(form.op_params[0]);
    if (form.is_split) {
        ggml_tensor * of_up = form.is_merged ? of_gate : project(context, store, up, x, ids);
        const auto part = [&](ggml_tensor * y, int64_t first) {
            return y->ne[0] == form.n_ff() ? y : rows(context, y, first, form.n_ff());
        };
        activated = ggml_glu_split(context, part(of_gate, form.first_rows[0]), part(of_up, form.first_rows[1]), op);
    } else {
        activated = ggml_glu(context, of_gate, op, form.op_params[1] != 0);
    }
    std::copy(form.op_params.begin(), form.op_params.end(), std::begin(activated->op_params));
    return activated;
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

bool ExpertCache::State::take_host_memory(const Form & form) {
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
    const Parts parts = parts_of(nodes);
    auto & layers = state_->layers;
    const auto known =
        std::find_if(layers.begin(), layers.end(), [&](const auto & layer) { return layer.parts == parts; });
    const auto n_used = static_cast<size_t>(nodes.ids->ne[0]);
    if (known != layers.end()) {
        return known->form.n_used == n_used ? static_cast<int32_t>(known - layers.begin()) : -1;
    }
    const Form form = Form::of(nodes);
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
    const size_t alignment = ggml_backend_buft_get_alignment(type);
    const auto aligned = [&](size_t n) { return (n + alignment - 1) / alignment * alignment; };
    // Activations and slots side by side, so that one copy has both.
    const size_t input_bytes = (static_cast<size_t>(n_embd) + most_used) * sizeof(float);
    pool.input_context.reset(ggml_init({ggml_tensor_overhead() * 4, nullptr, true}));
    pool.input =
        ggml_new_tensor_1d(pool.input_context.get(), GGML_TYPE_F32, static_cast<int64_t>(input_bytes / sizeof(float)));
    pool.input_buffer.reset(ggml_backend_buft_alloc_buffer(type, aligned(input_bytes)));
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
    auto * base = static_cast<char *>(ggml_backend_buffer_get_base(pool.buffer.get()));
    size_t used_bytes = 0;
    for (const auto & alike : by_form) {
        const Layer & first = *alike.front();
        size_t n_experts = 0;
        for (const Layer * layer : alike) {
            n_experts += layer->n_experts;
        }
        // Of what is left after the padding of each part, which is less than so much.
        constexpr size_t padding = 65536;
        const size_t reserved = by_form.size() * n_parts * padding;
        const double share =
            static_cast<double>(pool_bytes - std::min(pool_bytes, reserved)) / static_cast<double>(all_bytes);
        auto store = std::make_unique<Store>();
        store->form = first.form;
        store->n_slots = std::min(n_experts, static_cast<size_t>(share * static_cast<double>(n_experts)));
        if (store->n_slots < alike.size()) {
            continue;  // not one for each layer
        }
        store->context.reset(ggml_init({ggml_tensor_overhead() * n_parts, nullptr, true}));
        for (size_t part = 0; part < n_parts; ++part) {
            const ggml_tensor * of = first.parts[part];
            if (of == nullptr) {
                continue;
            }
            const auto n_slots = static_cast<int64_t>(store->n_slots);
            ggml_tensor * tensor =
                is_bias(part) ? ggml_new_tensor_2d(store->context.get(), of->type, of->ne[0], n_slots)
                              : ggml_new_tensor_3d(store->context.get(), of->type, of->ne[0], of->ne[1], n_slots);
            const size_t n_bytes = ggml_backend_buft_get_alloc_size(type, tensor);
            if (used_bytes + n_bytes > pool_bytes ||
                ggml_backend_tensor_alloc(pool.buffer.get(), tensor, base + used_bytes) != GGML_STATUS_SUCCESS) {
                return false;
            }
            used_bytes += aligned(n_bytes);
            store->tensors[part] = tensor;
        }
        if (!build(pool, *store)) {
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
        counts.n_slots += store->n_slots;
        pool.stores.push_back(std::move(store));
    }
    return true;
}

// Gives the slots of a store to its layers, which are in order: to each the same number, or to each one for all of its
// experts until there are none left. Nothing is resident then.
void ExpertCache::State::share_out(const std::vector<Layer *> & alike, bool whole_layers) {
    const size_t n_slots = alike.front()->store->n_slots;
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

// False if the device has not got what it takes.
bool ExpertCache::State::build(Pool & pool, Store & store) {
    constexpr size_t most_nodes = 32;
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(pool.device);
    const auto n_embd = static_cast<int64_t>(store.form.n_embd());
    for (size_t n = 1; n <= store.form.n_used; ++n) {
        Launch & launch = store.launches.emplace_back();
        launch.context.reset(ggml_init(
            {ggml_tensor_overhead() * most_nodes + ggml_graph_overhead_custom(most_nodes, false), nullptr, true}));
        ggml_context * context = launch.context.get();
        auto * input = static_cast<char *>(pool.input->data);
        const auto at = [&](ggml_tensor * tensor, size_t offset) {
            return ggml_backend_tensor_alloc(pool.input_buffer.get(), tensor, input + offset) == GGML_STATUS_SUCCESS;
        };
        ggml_tensor * x = ggml_new_tensor_3d(context, GGML_TYPE_F32, n_embd, 1, 1);
        ggml_tensor * ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, static_cast<int64_t>(n), 1);
        if (!at(x, 0) || !at(ids, static_cast<size_t>(n_embd) * sizeof(float))) {
            return false;
        }
        launch.result = project(context, store, down, activation(context, store, x, ids), ids);
        ggml_set_output(launch.result);
        launch.graph = ggml_new_graph_custom(context, most_nodes, false);
        ggml_build_forward_expand(launch.graph, launch.result);
        for (int i = 0; i < ggml_graph_n_nodes(launch.graph); ++i) {
            if (!ggml_backend_dev_supports_op(pool.device, ggml_graph_node(launch.graph, i))) {
                add_to_log(LogLevel::warning, std::string(ggml_backend_dev_name(pool.device)) +
                                                  " cannot compute these experts: none are cached there");
                return false;
            }
        }
        launch.memory.reset(ggml_gallocr_new(type));
        if (!ggml_gallocr_alloc_graph(launch.memory.get(), launch.graph)) {
            return false;
        }
    }
    return true;
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
    for (size_t k = 0; k < n_used && state.trial.uses_cache(); ++k) {
        const int32_t slot = layer.slot_of[static_cast<size_t>(experts[k])];
        if (slot >= 0) {
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
    const Launch & launch = layer.store->launches[n - 1];
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
    Store & store = *layer.store;
    for (size_t part = 0; part < n_parts; ++part) {
        const ggml_tensor * from = layer.parts[part];
        if (from != nullptr) {
            const size_t n_bytes = bytes_of(*from, part);
            ggml_backend_tensor_set_async(layer.pool->copies.get(), store.tensors[part],
                                          static_cast<const char *>(from->data) + expert * n_bytes,
                                          static_cast<size_t>(slot) * n_bytes, n_bytes);
        }
    }
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
