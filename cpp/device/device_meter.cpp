#include "device/device_meter.h"

#include "base/activity.h"
#include "base/check_range.h"
#include "base/error_capture.h"
#include "device/compute_hooks.h"
#include "device/weights.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

namespace overspill {

namespace {

constexpr int64_t largest_dimension = 1 << 24;
constexpr int64_t most_tokens = 8192;   // of a batch; attention's mask grows with the square
constexpr size_t most_distinct = 1024;  // tensors that a measurement cycles through
constexpr int64_t row_unit = 64;        // of which repacked layouts want a multiple

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The first quartile of the runs that the budget allows, after one that makes plans, wakes threads and fills caches:
// what else runs on the machine makes some of them longer, and none shorter.
template <typename Run>
double typical_s(double budget_s, Run && run) {
    const size_t fewest = budget_s > 0 ? 3 : 1;
    run();
    std::vector<double> times;
    const double start = seconds();
    double now = start;
    while (now - start < budget_s || times.size() < fewest) {
        run();
        const double after = seconds();
        times.push_back(after - now);
        now = after;
    }
    const auto quartile = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 4);
    std::nth_element(times.begin(), quartile, times.end());
    return *quartile;
}

// A graph whose tensors have no memory yet.
struct Graph {
    explicit Graph(size_t n_operations)
        // As many leaves again: weights, inputs, numbers of experts.
        : context(ggml_init({ggml_tensor_overhead() * (2 * n_operations + 16) +
                                 ggml_graph_overhead_custom(2 * n_operations + 16, false),
                             nullptr, /*no_alloc =*/true})),
          graph(ggml_new_graph_custom(context.get(), 2 * n_operations + 16, false)) {}

    ggml_context_ptr context;
    ggml_cgraph * graph;
};

// An RPC device counts as synchronised when everything has been sent to it; only reading waits for its results.
void wait_for(const ggml_tensor * result) {
    float first = 0;
    ggml_backend_tensor_get(result, &first, 0, sizeof first);
}

void set(ggml_tensor * vector, float scale) {
    std::vector<float> values(static_cast<size_t>(ggml_nelements(vector)));
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = scale * (static_cast<float>(i % 7) - 3.0F);
    }
    ggml_backend_tensor_set(vector, values.data(), 0, ggml_nbytes(vector));
}

// Small operations of the kinds that a layer has, none of which backends fuse with the one before.
ggml_tensor * small_operation(ggml_context * context, size_t i, ggml_tensor * vector, ggml_tensor * weights) {
    switch (i % 3) {
        case 0: return ggml_rms_norm(context, vector, 1e-5F);
        case 1: return ggml_add(context, vector, weights);
        default: return ggml_mul(context, vector, weights);
    }
}

WeightUse checked_use(const std::string & type, int64_t n_in, int64_t n_out, int64_t n_experts, int64_t n_used) {
    const WeightUse use{weight_type(type), n_in, n_out, n_experts, n_used};
    check_range("n_in", n_in, int64_t{1}, largest_dimension);
    check_range("n_out", n_out, int64_t{1}, largest_dimension);
    check_range("n_experts", n_experts, int64_t{0}, int64_t{1} << 16);
    check_range("n_used", n_used, std::min<int64_t>(n_experts, 1), n_experts);
    if (n_in % ggml_blck_size(use.type) != 0) {
        throw std::invalid_argument("n_in must be a multiple of " + std::to_string(ggml_blck_size(use.type)) + " for " +
                                    type + ", not " + std::to_string(n_in));
    }
    return use;
}

}  // namespace

// The part of some weights that is measured, as often as the working set has room for it.
struct DeviceMeter::Weights {
    WeightUse use;
    ggml_backend_buffer_type_t buffer_type = nullptr;
    ggml_context_ptr context = {};
    std::vector<ggml_tensor *> copies = {};
};

// Flash attention of a batch to a KV cache, as llama.cpp builds it.
struct DeviceMeter::Attention {
    ggml_type type;
    int64_t n_heads;
    int64_t n_heads_kv;
    int64_t head_width;
    int64_t n_kv;
    int64_t n_tokens = 1;

    ggml_tensor * cache(ggml_context * context) const {
        return heads_of_rows(ggml_new_tensor_3d(context, type, head_width, n_kv, n_heads_kv));
    }
    ggml_tensor * query(ggml_context * context) const {
        return heads_of_rows(ggml_new_tensor_3d(context, GGML_TYPE_F32, head_width, n_tokens, n_heads));
    }
    ggml_tensor * mask(ggml_context * context) const {
        return ggml_new_tensor_2d(context, GGML_TYPE_F16, n_kv, n_tokens);
    }
    static ggml_tensor * result(ggml_context * context, ggml_tensor * query, ggml_tensor * k, ggml_tensor * v,
                                ggml_tensor * mask) {
        ggml_tensor * result = ggml_flash_attn_ext(context, query, k, v, mask, 0.125F, 0.0F, 0.0F);
        ggml_prec_set_acc(result, GGML_PREC_F32);
        return result;
    }

  private:
    // A row holds all heads of a token; attention looks at it head by head.
    static ggml_tensor * heads_of_rows(ggml_tensor * tensor) {
        tensor->nb[2] = tensor->nb[1];
        tensor->nb[1] = tensor->nb[2] * static_cast<size_t>(tensor->ne[2]);
        return tensor;
    }
};

DeviceMeter::DeviceMeter(const std::string & device, MeterOptions options)
    : name_(device), options_(std::move(options)), device_(device_named(device)) {
    check_range("n_threads", options_.n_threads, int32_t{1}, int32_t{GGML_MAX_N_THREADS});
    check_range("working_set_bytes", options_.working_set_bytes, uint64_t{1} << 20, uint64_t{1} << 40);
    check_range("budget_s", options_.budget_s, 0.0, 60.0);
    for (const std::string & gpu : options_.gpus) {
        gpus_.push_back(device_named(gpu));
        check_usable_after_fork(gpus_.back());
    }
    const Activity activity("preparing to measure a device");
    const ErrorCapture errors;
    const ggml_backend_dev_t devices[] = {device_, nullptr};
    servers_ = std::make_unique<const RpcServers>(devices);
    hook_devices();
    set_products(product_set());
    cpu_.reset(ggml_backend_dev_init(cpu_device(), nullptr));
    if (device_ != cpu_device()) {
        other_ = held<ggml_backend_ptr>(ggml_backend_dev_init(device_, nullptr));
    }
    backend_ = device_ == cpu_device() ? cpu_.get() : other_.get();
    if (!cpu_ || backend_ == nullptr) {
        throw Error(name_ + " cannot be used: " + errors.reason("it could not be initialised"));
    }
    threads_ = std::make_unique<const ThreadPool>(options_.n_threads, "the meter of " + name_);
    cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(cpu_.get(), options_.n_threads);
    cpu_function<decltype(&ggml_backend_cpu_set_threadpool)>("ggml_backend_cpu_set_threadpool")(cpu_.get(),
                                                                                                threads_->get());
}

bool DeviceMeter::is_broken() const {
    return threads_ != nullptr && threads_->failed() && !can_be_freed_half_done(device_);
}

// One at a time, and all of it as the work of the threads: a failed assertion is then known before anything is freed.
template <typename Work>
auto DeviceMeter::measure(const char * activity, Work && work) {
    origin_.check("the meter of a device");
    const std::lock_guard lock(mutex_);
    const Activity now(activity);
    return threads_->use(std::forward<Work>(work));
}

void DeviceMeter::set_products(const ProductSet * set) {
    product_set_ = set;
    products_ = set != nullptr ? std::make_unique<ProductGraphs>(set, cpu_quantize) : nullptr;
}

void DeviceMeter::use_products(const std::string & kernels, std::optional<bool> repack) {
    origin_.check("the meter of a device");
    const ProductSet * set = product_set(kernels);
    const std::lock_guard lock(mutex_);
    set_products(set);
    repack_ = repack;
}

Error DeviceMeter::no_memory() const {
    check_server();
    return Error(name_ + " has no memory to be measured with");
}

void DeviceMeter::compute(ggml_cgraph * graph) {
    const ComputeScope scope(0, products_.get());
    if (ggml_backend_graph_compute(backend_, graph) != GGML_STATUS_SUCCESS) {
        throw Error(name_ + " failed while it was measured");
    }
    wait_for(ggml_graph_node(graph, -1));
    check_server();
}

ggml_backend_buffer_t DeviceMeter::working_set(ggml_backend_buffer_type_t type) {
    HeldBuffer & buffer = working_sets_[type];
    if (!buffer) {
        const ErrorCapture errors;
        const size_t n_bytes = std::min<size_t>(options_.working_set_bytes, ggml_backend_buft_get_max_size(type));
        buffer = held<ggml_backend_buffer_ptr>(ggml_backend_buft_alloc_buffer(type, n_bytes));
        if (!buffer) {
            check_server();
            throw Error(name_ + " has no " + std::to_string(n_bytes >> 20) +
                        " MiB to be measured with: " + errors.reason("out of memory"));
        }
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        // In every type these are finite weights, neither zeros nor denormals: 0x3C3C is 1.06 as F16, which most
        // blocks have as their scale, 0.01 as BF16 and F32, and 2^-67 as the exponent of MXFP4.
        ggml_backend_buffer_clear(buffer.get(), 0x3C);
    }
    return buffer.get();
}

// Copies of one tensor side by side in the working set, as many as there is room for.
std::vector<ggml_tensor *> DeviceMeter::fill(ggml_backend_buffer_t buffer,
                                             const std::function<ggml_tensor *()> & make) {
    std::vector<ggml_tensor *> tensors;
    ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(buffer);
    const size_t alignment = ggml_backend_buft_get_alignment(type);
    auto * base = static_cast<char *>(ggml_backend_buffer_get_base(buffer));
    for (size_t at = 0; tensors.size() < most_distinct;) {
        ggml_tensor * tensor = make();
        const size_t n_bytes = ggml_backend_buft_get_alloc_size(type, tensor);
        if (at + n_bytes > ggml_backend_buffer_get_size(buffer)) {
            break;
        }
        if (ggml_backend_tensor_alloc(buffer, tensor, base + at) != GGML_STATUS_SUCCESS) {
            throw Error(name_ + " could not hold weights to be measured with");
        }
        tensors.push_back(tensor);
        at += (n_bytes + alignment - 1) / alignment * alignment;
    }
    if (tensors.empty()) {
        throw Error(name_ + ": " + std::to_string(options_.working_set_bytes >> 20) +
                    " MiB are too few to measure with weights of this shape");
    }
    return tensors;
}

DeviceMeter::HeldBuffer DeviceMeter::allocate(ggml_context * context) {
    HeldBuffer buffer = held<ggml_backend_buffer_ptr>(
        ggml_backend_alloc_ctx_tensors_from_buft(context, ggml_backend_dev_buffer_type(device_)));
    if (!buffer) {
        throw no_memory();
    }
    return buffer;
}

// Seconds for a graph of so many operations; `build` makes the one of the given number, below n_distinct.
double DeviceMeter::graph_s(size_t n_operations, size_t n_distinct, double budget_s, const Build & build) {
    const Graph pass(n_operations);
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device_);
    HeldBuffer output;
    for (size_t i = 0; i < n_operations; ++i) {
        ggml_tensor * result = build(pass.context.get(), i % n_distinct);
        if (!output) {
            output = held<ggml_backend_buffer_ptr>(
                ggml_backend_buft_alloc_buffer(type, ggml_backend_buft_get_alloc_size(type, result)));
            if (!output) {
                throw no_memory();
            }
        }
        // All at one place, since nobody reads them: a decode uses its buffers again, too.
        ggml_backend_tensor_alloc(output.get(), result, ggml_backend_buffer_get_base(output.get()));
        ggml_build_forward_expand(pass.graph, result);
    }
    return typical_s(budget_s, [&] { compute(pass.graph); });
}

// Seconds for one of many operations, computed in one graph that has at first n_operations.
double DeviceMeter::average_s(size_t n_operations, size_t n_distinct, const Build & build) {
    // So long that starting the graph and waiting for it do not count.
    constexpr double long_enough_s = 0.005;
    constexpr size_t most_operations = 4096;
    n_operations = std::min(n_operations, most_operations);
    double time_s = graph_s(n_operations, n_distinct, options_.budget_s, build);
    if (time_s < long_enough_s && n_operations < most_operations) {
        const double wanted = static_cast<double>(n_operations) * long_enough_s / std::max(time_s, 1e-9);
        n_operations = std::max(n_operations + 1, static_cast<size_t>(std::min<double>(wanted, most_operations)));
        time_s = graph_s(n_operations, n_distinct, options_.budget_s, build);
    }
    return time_s / static_cast<double>(n_operations);
}

// Operations per second of a batch of which any part tells the rate: as many of its n units as take long enough, and
// not long. `measure` has the work of so many units timed.
double DeviceMeter::batch_rate(int64_t n, int64_t unit, const MeasureBatch & measure) {
    constexpr double most_s = 0.03;
    const Timing once = [this](size_t n_distinct, const Build & build) {
        return graph_s(1, n_distinct, /*budget_s =*/0, build);
    };
    int64_t part = std::min(n, unit);
    double time_s = measure(part, once).seconds;
    // In steps, since little work takes longer for its size than much.
    while (part < n && time_s < most_s / 2) {
        const double most = static_cast<double>(part) * std::max(2.0, most_s / std::max(time_s, 1e-9));
        part = most >= static_cast<double>(n) ? n : std::max(part + unit, static_cast<int64_t>(most) / unit * unit);
        part = std::min(part, n);
        time_s = measure(part, once).seconds;
    }
    const BatchTime found =
        measure(part, [this](size_t n_distinct, const Build & build) { return average_s(1, n_distinct, build); });
    return found.n_operations / found.seconds;
}

// A part of the weights, in the buffer that llama.cpp would have them in.
DeviceMeter::Weights DeviceMeter::lay_out(WeightUse use) {
    Weights weights{use};
    weights.buffer_type = weight_buffer_type(use, device_, gpus_, /*host_buffers =*/!repack_.value_or(false),
                                             repack_.value_or(wants_extra_buffers(product_set_ != nullptr)));
    if (weights.buffer_type == nullptr) {
        throw Error(name_ + " has no operation for weights of the type " + ggml_type_name(use.type));
    }
    if (!ggml_backend_supports_buft(backend_, weights.buffer_type)) {
        weights.buffer_type = ggml_backend_dev_buffer_type(device_);  // an accelerator's, which is not measured
    }
    ggml_backend_buffer_t buffer = working_set(weights.buffer_type);

    // At least two of everything. Less an eighth, since some layouts need more than the weights have in a file.
    const size_t room = ggml_backend_buffer_get_size(buffer) / 8 * 7;
    const size_t row_bytes = ggml_row_size(use.type, use.n_in);
    const auto most_rows = static_cast<int64_t>(room / row_bytes) / (2 * std::max<int64_t>(1, use.n_used));
    if (use.n_out > most_rows) {
        use.n_out = std::max<int64_t>(1, most_rows / row_unit) * row_unit;
    }
    const size_t matrix_bytes = row_bytes * static_cast<size_t>(use.n_out);
    use.n_experts = std::min(use.n_experts, std::max(use.n_used, static_cast<int64_t>(room / matrix_bytes)));

    weights.use = use;
    weights.context.reset(ggml_init({ggml_tensor_overhead() * (most_distinct + 1), nullptr, true}));
    weights.copies = fill(buffer, [&] { return use.weights(weights.context.get()); });
    return weights;
}

// Whether the product of the number 0 is computed as ours.
bool DeviceMeter::is_product_ours(const Build & build) {
    if (!products_ || other_) {
        return false;
    }
    const Graph one(1);
    ggml_build_forward_expand(one.graph, build(one.context.get(), 0));
    return products_->replace(one.graph) != one.graph;
}

WeightRate DeviceMeter::weight_rate(const std::string & type, int64_t n_in, int64_t n_out, int64_t n_experts,
                                    int64_t n_used, int64_t n_tokens) {
    const WeightUse wanted = checked_use(type, n_in, n_out, n_experts, n_used);
    check_range("n_tokens", n_tokens, int64_t{1}, most_tokens);
    return measure("measuring how fast a device reads weights", [&] {
        const Weights weights = lay_out(wanted);
        const WeightUse & use = weights.use;
        // Each expert once; those of one token are apart.
        const auto n_groups = static_cast<size_t>(n_experts == 0 ? 1 : std::min<int64_t>(use.n_experts / n_used, 256));
        const ggml_context_ptr inputs_context(ggml_init({ggml_tensor_overhead() * (n_groups + 1), nullptr, true}));
        ggml_tensor * input = use.input(inputs_context.get(), n_tokens);
        std::vector<ggml_tensor *> experts(n_groups);
        for (ggml_tensor *& group : experts) {
            group = use.experts(inputs_context.get(), n_tokens);
        }
        const HeldBuffer inputs = allocate(inputs_context.get());
        set(input, 0.1F);
        for (size_t group = 0; n_experts > 0 && group < n_groups; ++group) {
            std::vector<int32_t> numbers(static_cast<size_t>(n_used * n_tokens));
            for (size_t i = 0; i < numbers.size(); ++i) {
                numbers[i] = static_cast<int32_t>(i % static_cast<size_t>(n_used) * n_groups + group);
            }
            ggml_backend_tensor_set(experts[group], numbers.data(), 0, ggml_nbytes(experts[group]));
        }
        const size_t n_distinct = weights.copies.size() * n_groups;
        const Build build = [&](ggml_context * context, size_t i) {
            return WeightUse::product(context, weights.copies[i / n_groups], input, experts[i % n_groups]);
        };
        const double operation_s = average_s(n_distinct, n_distinct, build);
        const size_t n_bytes =
            ggml_row_size(use.type, n_in) * static_cast<size_t>(use.n_out * std::max<int64_t>(1, n_used));
        return WeightRate{static_cast<double>(n_bytes) / operation_s, ggml_backend_buft_name(weights.buffer_type),
                          is_product_ours(build) ? product_set_->name : "llama.cpp"};
    });
}

double DeviceMeter::batch_flops(const std::string & type, int64_t n_in, int64_t n_out, int64_t n_experts,
                                int64_t n_used, int64_t n_tokens) {
    const WeightUse whole = checked_use(type, n_in, n_out, n_experts, n_used);
    check_range("n_tokens", n_tokens, int64_t{1}, most_tokens);
    return measure("measuring how fast a device multiplies a batch", [&] {
        // No larger than the working set, as the results of the operation are.
        const int64_t n_rows = n_tokens * std::max<int64_t>(1, n_used);
        const auto most_out = static_cast<int64_t>(options_.working_set_bytes / sizeof(float)) / n_rows;
        const int64_t n_out_here = std::min(n_out, std::max<int64_t>(1, most_out / row_unit) * row_unit);
        return batch_rate(n_out_here, row_unit, [&](int64_t n_out_part, const Timing & seconds) -> BatchTime {
            WeightUse part = whole;
            part.n_out = n_out_part;
            const Weights weights = lay_out(part);
            const WeightUse & use = weights.use;
            // Fewer experts get fewer tokens, so that each has as many rows as it would have.
            const int64_t n_here = n_experts == 0 ? n_tokens : (n_tokens * use.n_experts + n_experts - 1) / n_experts;
            const ggml_context_ptr inputs_context(ggml_init({ggml_tensor_overhead() * 2, nullptr, true}));
            ggml_tensor * input = use.input(inputs_context.get(), n_here);
            ggml_tensor * experts = use.experts(inputs_context.get(), n_here);
            const HeldBuffer inputs = allocate(inputs_context.get());
            set(input, 0.1F);
            if (experts != nullptr) {
                // In turn: all of a token's differ, and each gets its share of the rows.
                std::vector<int32_t> numbers(static_cast<size_t>(n_here * n_used));
                for (size_t i = 0; i < numbers.size(); ++i) {
                    numbers[i] = static_cast<int32_t>(i % static_cast<size_t>(use.n_experts));
                }
                ggml_backend_tensor_set(experts, numbers.data(), 0, ggml_nbytes(experts));
            }
            const double operation_s = seconds(weights.copies.size(), [&](ggml_context * context, size_t i) {
                return WeightUse::product(context, weights.copies[i], input, experts);
            });
            const auto products = static_cast<double>(n_in) * static_cast<double>(use.n_out);
            return {2 * products * static_cast<double>(n_here * std::max<int64_t>(1, n_used)), operation_s};
        });
    });
}

DeviceMeter::Attention DeviceMeter::checked_attention(const std::string & type, int64_t n_heads, int64_t n_heads_kv,
                                                      int64_t head_width) {
    const ggml_type kv_type = weight_type(type);
    check_range("n_heads", n_heads, int64_t{1}, int64_t{1} << 16);
    check_range("n_heads_kv", n_heads_kv, int64_t{1}, n_heads);
    check_range("head_width", head_width, int64_t{1}, int64_t{1} << 16);
    if (n_heads % n_heads_kv != 0) {
        throw std::invalid_argument("n_heads must be a multiple of n_heads_kv");
    }
    if (head_width % ggml_blck_size(kv_type) != 0) {
        throw std::invalid_argument("head_width must be a multiple of " + std::to_string(ggml_blck_size(kv_type)) +
                                    " for " + type + ", not " + std::to_string(head_width));
    }
    return {kv_type, n_heads, n_heads_kv, head_width, 0};
}

double DeviceMeter::attention_s(const Attention & use, const std::vector<ggml_fp16_t> & mask_values,
                                const Timing & seconds) {
    {
        const ggml_context_ptr context(ggml_init({ggml_tensor_overhead() * 8, nullptr, true}));
        ggml_tensor * example = Attention::result(context.get(), use.query(context.get()), use.cache(context.get()),
                                                  use.cache(context.get()), use.mask(context.get()));
        if (!ggml_backend_dev_supports_op(device_, example)) {
            throw Error(name_ + " has no flash attention for a KV cache of the type " + ggml_type_name(use.type) +
                        " and heads of " + std::to_string(use.head_width));
        }
    }
    ggml_backend_buffer_t buffer = working_set(ggml_backend_dev_buffer_type(device_));
    const ggml_context_ptr caches_context(ggml_init({ggml_tensor_overhead() * (most_distinct + 1), nullptr, true}));
    const std::vector<ggml_tensor *> caches = fill(buffer, [&] { return use.cache(caches_context.get()); });
    const ggml_context_ptr inputs_context(ggml_init({ggml_tensor_overhead() * 2, nullptr, true}));
    ggml_tensor * query = use.query(inputs_context.get());
    ggml_tensor * mask = use.mask(inputs_context.get());
    const HeldBuffer inputs = allocate(inputs_context.get());
    set(query, 0.1F);
    ggml_backend_tensor_set(mask, mask_values.data(), 0, ggml_nbytes(mask));
    return seconds(caches.size(), [&](ggml_context * context, size_t i) {
        return Attention::result(context, query, caches[i], caches[(i + 1) % caches.size()], mask);
    });
}

double DeviceMeter::attention_bytes_per_s(const std::string & type, int64_t n_heads, int64_t n_heads_kv,
                                          int64_t head_width, int64_t n_kv) {
    Attention use = checked_attention(type, n_heads, n_heads_kv, head_width);
    check_range("n_kv", n_kv, int64_t{1}, largest_dimension);
    use.n_kv = n_kv;
    return measure("measuring how fast a device reads a KV cache", [&] {
        const std::vector<ggml_fp16_t> nothing_masked(static_cast<size_t>(n_kv));
        const double operation_s = attention_s(use, nothing_masked, [this](size_t n_distinct, const Build & build) {
            return average_s(n_distinct, n_distinct, build);
        });
        const size_t cache_bytes = ggml_row_size(use.type, head_width) * static_cast<size_t>(n_heads_kv * n_kv);
        return 2.0 * static_cast<double>(cache_bytes) / operation_s;
    });
}

double DeviceMeter::attention_flops(const std::string & type, int64_t n_heads, int64_t n_heads_kv, int64_t head_width,
                                    int64_t n_tokens) {
    const Attention whole = checked_attention(type, n_heads, n_heads_kv, head_width);
    check_range("n_tokens", n_tokens, int64_t{1}, most_tokens);
    return measure("measuring how fast a device attends to a batch", [&] {
        constexpr int64_t n_kv_unit = 256;  // llama-kv-cache.cpp: get_n_kv
        const int64_t n_kv = (n_tokens + n_kv_unit - 1) / n_kv_unit * n_kv_unit;
        const ggml_fp16_t masked = ggml_fp32_to_fp16(-std::numeric_limits<float>::infinity());
        std::vector<ggml_fp16_t> causal(static_cast<size_t>(n_kv * n_tokens), masked);
        for (int64_t token = 0; token < n_tokens; ++token) {
            std::fill_n(causal.begin() + token * n_kv, token + 1, ggml_fp16_t{0});
        }
        const int64_t n_sharing = n_heads / n_heads_kv;  // heads that look at the same keys and values
        return batch_rate(n_heads, 1, [&](int64_t n_heads_part, const Timing & seconds) -> BatchTime {
            Attention part = whole;
            part.n_heads_kv = std::max<int64_t>(1, n_heads_part / n_sharing);
            part.n_heads = std::min(n_heads_part, part.n_heads_kv * n_sharing);
            part.n_kv = n_kv;
            part.n_tokens = n_tokens;
            const double n_looks = static_cast<double>(n_tokens) * static_cast<double>(n_tokens + 1) / 2;
            return {4.0 * static_cast<double>(head_width * part.n_heads) * n_looks, attention_s(part, causal, seconds)};
        });
    });
}

double DeviceMeter::operation_s(int64_t n_embd) {
    check_range("n_embd", n_embd, int64_t{1}, largest_dimension);
    return measure("measuring the cost of an operation", [&] {
        const auto chain_s = [&](size_t n_operations) {
            const Graph chain(n_operations);
            ggml_tensor * weights = ggml_new_tensor_1d(chain.context.get(), GGML_TYPE_F32, n_embd);
            ggml_tensor * vector = ggml_new_tensor_1d(chain.context.get(), GGML_TYPE_F32, n_embd);
            ggml_set_input(weights);
            ggml_set_input(vector);
            ggml_tensor * last = vector;
            for (size_t i = 0; i < n_operations; ++i) {
                last = small_operation(chain.context.get(), i, last, weights);
            }
            ggml_build_forward_expand(chain.graph, last);
            const auto memory = held<ggml_gallocr_ptr>(ggml_gallocr_new(ggml_backend_dev_buffer_type(device_)));
            if (!ggml_gallocr_alloc_graph(memory.get(), chain.graph)) {
                throw no_memory();
            }
            set(weights, 0.1F);
            set(vector, 0.1F);
            return typical_s(options_.budget_s / 2, [&] { compute(chain.graph); });
        };
        constexpr size_t shorter = 30;
        constexpr size_t longer = 390;
        return std::max(0.0, chain_s(longer) - chain_s(shorter)) / (longer - shorter);
    });
}

double DeviceMeter::visit_s(int64_t n_embd) {
    check_range("n_embd", n_embd, int64_t{1}, largest_dimension);
    if (!other_) {
        return 0;
    }
    return measure("measuring the cost of moving to a device", [&] {
        constexpr size_t n_visits = 16;
        constexpr size_t n_there = 30;  // operations on each side, about as many as a layer has
        constexpr size_t n_operations = n_visits * 2 * n_there;
        enum class Where { both, device, cpu };
        const auto chain_s = [&](Where where) {
            const Graph chain(n_operations);
            ggml_context * context = chain.context.get();
            ggml_backend_t backends[] = {other_.get(), cpu_.get()};
            // As llama.cpp has it: results of the CPU are in memory that the GPU's driver can reach.
            ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(device_);
            ggml_backend_buffer_type_t types[] = {
                ggml_backend_dev_buffer_type(device_),
                pinned != nullptr ? pinned : ggml_backend_dev_buffer_type(cpu_device())};
            const auto scheduler = held<ggml_backend_sched_ptr>(ggml_backend_sched_new(
                backends, types, 2, 4 * n_operations, /*parallel =*/false, /*op_offload =*/true));
            ggml_tensor * input = ggml_new_tensor_1d(context, GGML_TYPE_F32, n_embd);
            ggml_set_input(input);
            ggml_tensor * before = input;
            ggml_tensor * last = input;
            for (size_t i = 0; i < n_operations; ++i) {
                const size_t step = i % (2 * n_there);
                // Two results come back from the device, as the hidden state and the choice of experts do.
                ggml_tensor * next = step == n_there ? ggml_add(context, last, before)
                                     : i % 2 == 0    ? ggml_rms_norm(context, last, 1e-5F)
                                                     : ggml_scale(context, last, 1.5F);
                before = std::exchange(last, next);
                const bool on_device = where == Where::device || (where == Where::both && step < n_there);
                ggml_backend_sched_set_tensor_backend(scheduler.get(), last, backends[on_device ? 0 : 1]);
            }
            ggml_build_forward_expand(chain.graph, last);
            if (!ggml_backend_sched_alloc_graph(scheduler.get(), chain.graph)) {
                throw no_memory();
            }
            set(input, 0.1F);
            return typical_s(options_.budget_s, [&] {
                if (ggml_backend_sched_graph_compute(scheduler.get(), chain.graph) != GGML_STATUS_SUCCESS) {
                    throw Error(name_ + " failed while it was measured");
                }
                wait_for(last);
                check_server();
            });
        };
        const double moving_s = chain_s(Where::both) - (chain_s(Where::device) + chain_s(Where::cpu)) / 2;
        return std::max(0.0, moving_s) / n_visits;
    });
}

double DeviceMeter::exchange_s(const std::string & type, int64_t n_embd, int64_t n_ff, int64_t n_used) {
    constexpr int64_t most_resident = 64;
    const WeightUse wide = checked_use(type, n_embd, n_ff, most_resident, n_used);
    // Rows of the last matrix may be no whole number of blocks: files have another type there.
    const bool is_whole = n_ff % ggml_blck_size(wide.type) == 0;
    const WeightUse narrow = checked_use(is_whole ? type : "f16", n_ff, n_embd, most_resident, n_used);
    check_range("n_used", n_used, int64_t{1}, most_resident);
    if (!other_) {
        return 0;
    }
    return measure("measuring the cost of an exchange with a device", [&] {
        ggml_backend_buffer_type_t type_of_device = ggml_backend_dev_buffer_type(device_);
        ggml_backend_buffer_t buffer = working_set(type_of_device);
        const size_t expert_bytes = 2 * ggml_row_size(wide.type, n_embd) * static_cast<size_t>(n_ff) +
                                    ggml_row_size(narrow.type, n_ff) * static_cast<size_t>(n_embd);
        const auto room = static_cast<int64_t>(ggml_backend_buffer_get_size(buffer) / 8 * 7 / expert_bytes);
        const int64_t n_resident = std::min(room, most_resident);
        if (n_resident < n_used) {
            throw Error(name_ + ": " + std::to_string(options_.working_set_bytes >> 20) +
                        " MiB are too few to measure with experts of this shape");
        }
        const ggml_context_ptr weights(ggml_init({ggml_tensor_overhead() * 4, nullptr, true}));
        const auto matrices = [&](const WeightUse & use) {
            return ggml_new_tensor_3d(weights.get(), use.type, use.n_in, use.n_out, n_resident);
        };
        ggml_tensor *gate = matrices(wide), *up = matrices(wide), *down = matrices(narrow);
        auto * at = static_cast<char *>(ggml_backend_buffer_get_base(buffer));
        for (ggml_tensor * one : {gate, up, down}) {
            ggml_backend_tensor_alloc(buffer, one, at);
            const size_t n_bytes = ggml_backend_buft_get_alloc_size(type_of_device, one);
            const size_t alignment = ggml_backend_buft_get_alignment(type_of_device);
            at += (n_bytes + alignment - 1) / alignment * alignment;
        }
        const Graph piece(8);
        ggml_context * context = piece.context.get();
        ggml_tensor * x = ggml_new_tensor_3d(context, GGML_TYPE_F32, n_embd, 1, 1);
        ggml_tensor * ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, n_used, 1);
        ggml_set_input(x);
        ggml_set_input(ids);
        ggml_tensor * activated =
            ggml_swiglu_split(context, ggml_mul_mat_id(context, gate, x, ids), ggml_mul_mat_id(context, up, x, ids));
        ggml_tensor * result = ggml_mul_mat_id(context, down, activated, ids);
        ggml_set_output(result);
        if (!ggml_backend_dev_supports_op(device_, result)) {
            throw Error(name_ + " has no operation for experts of the type " + type);
        }
        ggml_build_forward_expand(piece.graph, result);
        const auto memory = held<ggml_gallocr_ptr>(ggml_gallocr_new(type_of_device));
        if (!ggml_gallocr_alloc_graph(memory.get(), piece.graph)) {
            throw no_memory();
        }
        // Where the driver copies from and to by itself.
        ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(device_);
        const size_t result_bytes = ggml_nbytes(result);
        const HeldBuffer host = held<ggml_backend_buffer_ptr>(
            ggml_backend_buft_alloc_buffer(pinned != nullptr ? pinned : ggml_backend_dev_buffer_type(cpu_device()),
                                           ggml_nbytes(x) + ggml_nbytes(ids) + result_bytes));
        if (!host) {
            throw no_memory();
        }
        auto * x_here = static_cast<float *>(ggml_backend_buffer_get_base(host.get()));
        auto * ids_here = reinterpret_cast<int32_t *>(x_here + n_embd);
        auto * result_here = reinterpret_cast<float *>(ids_here + n_used);
        std::fill_n(x_here, n_embd, 0.1F);
        int64_t first = 0;
        return typical_s(options_.budget_s, [&] {
            for (int64_t k = 0; k < n_used; ++k) {
                ids_here[k] = static_cast<int32_t>((first + k) % n_resident);
            }
            first += n_used;
            ggml_backend_tensor_set_async(backend_, x, x_here, 0, ggml_nbytes(x));
            ggml_backend_tensor_set_async(backend_, ids, ids_here, 0, ggml_nbytes(ids));
            if (ggml_backend_graph_compute_async(backend_, piece.graph) != GGML_STATUS_SUCCESS) {
                throw Error(name_ + " failed while it was measured");
            }
            ggml_backend_tensor_get_async(backend_, result, result_here, 0, result_bytes);
            ggml_backend_synchronize(backend_);
            check_server();
        });
    });
}

double DeviceMeter::memory_bytes_per_s() {
    if (other_) {
        throw std::invalid_argument("device: the memory of the CPU alone can be read from here, not " + name_ + "'s");
    }
    return measure("measuring memory bandwidth", [&] {
        ggml_backend_buffer_t buffer = working_set(ggml_backend_dev_buffer_type(device_));
        const auto * words = static_cast<const uint64_t *>(ggml_backend_buffer_get_base(buffer));
        const size_t n_words = ggml_backend_buffer_get_size(buffer) / sizeof *words;
        // By the threads that compute: others would have to share the cores with these, which wait by spinning.
        struct Reading {
            const uint64_t * words;
            size_t n_words;
            std::vector<uint64_t> sums;  // a cache line for each thread
        } reading{words, n_words, std::vector<uint64_t>(static_cast<size_t>(options_.n_threads) * 8)};
        const auto read_share = [](ggml_tensor *, int ith, int nth, void * data) {
            auto & all = *static_cast<Reading *>(data);
            const auto thread = static_cast<size_t>(ith), n_threads = static_cast<size_t>(nth);
            // Several sums, so that no addition waits for the one before.
            constexpr size_t n_lanes = 32;
            std::array<uint64_t, n_lanes> lanes{};
            const size_t end = all.n_words / n_lanes * (thread + 1) / n_threads * n_lanes;
            for (size_t at = all.n_words / n_lanes * thread / n_threads * n_lanes; at < end; at += n_lanes) {
                for (size_t lane = 0; lane < n_lanes; ++lane) {
                    lanes[lane] += all.words[at + lane];
                }
            }
            all.sums[thread * 8] += std::accumulate(lanes.begin(), lanes.end(), uint64_t{0});
        };
        const double time_s = graph_s(1, 1, options_.budget_s, [&](ggml_context * context, size_t) {
            return ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, read_share, GGML_N_TASKS_MAX,
                                  &reading);
        });
        // The compiler must not find that nobody wants the sums.
        const bool is_sum = std::accumulate(reading.sums.begin(), reading.sums.end(), uint64_t{0}) != 0;
        return is_sum ? static_cast<double>(n_words * sizeof *words) / time_s : 0;
    });
}

LinkRates DeviceMeter::link_rates(uint64_t n_bytes, bool pinned) {
    check_range("n_bytes", n_bytes, uint64_t{1}, uint64_t{1} << 32);
    if (!other_) {
        constexpr double infinity = std::numeric_limits<double>::infinity();
        return {infinity, infinity};
    }
    return measure("measuring the link to a device", [&] {
        const ggml_context_ptr context(ggml_init({ggml_tensor_overhead(), nullptr, true}));
        ggml_tensor * block = ggml_new_tensor_1d(context.get(), GGML_TYPE_I8, static_cast<int64_t>(n_bytes));
        const HeldBuffer there = allocate(context.get());

        // So much that no cache holds it: weights come from memory.
        constexpr size_t wanted_bytes = size_t{256} << 20;
        const size_t free_bytes = device_memory(cpu_device()).free_bytes;
        const size_t most_bytes = free_bytes == 0 ? wanted_bytes : std::min(wanted_bytes, free_bytes / 4);
        const size_t n_source_bytes = std::max<size_t>(n_bytes, most_bytes);
        ggml_backend_buffer_type_t type = pinned ? ggml_backend_dev_host_buffer_type(device_) : nullptr;
        const HeldBuffer here = held<ggml_backend_buffer_ptr>(ggml_backend_buft_alloc_buffer(
            type != nullptr ? type : ggml_backend_dev_buffer_type(cpu_device()), n_source_bytes));
        if (!here) {
            throw Error("the host has no " + std::to_string(n_source_bytes >> 20) + " MiB to measure a link with");
        }
        auto * source = static_cast<uint8_t *>(ggml_backend_buffer_get_base(here.get()));
        std::memset(source, 0x3C, n_source_bytes);

        const bool is_remote = std::string(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device_))) == "RPC";
        size_t n = n_bytes;
        size_t at = 0;
        const auto next = [&] {
            at = at + 2 * n <= n_source_bytes ? at + n : 0;
            return source + at;
        };
        const auto to_device = [&] {
            ggml_backend_tensor_set(block, next(), 0, n);
            if (is_remote) {  // it has only been sent
                uint8_t first = 0;
                ggml_backend_tensor_get(block, &first, 0, 1);
            }
            check_server();
        };
        const auto from_device = [&] {
            ggml_backend_tensor_get(block, next(), 0, n);
            check_server();
        };
        // A slow link gets smaller blocks: what does not fit into the budget is not sent.
        constexpr size_t small_block = 1 << 16;
        constexpr double shortest_s = 0.01;
        n = std::min(n, small_block);
        const double small_s = typical_s(0, to_device);
        const double most =
            static_cast<double>(n) * std::max(shortest_s, options_.budget_s / 3) / std::max(small_s, 1e-9);
        n = most < static_cast<double>(n_bytes) ? std::max(n, static_cast<size_t>(most)) : size_t{n_bytes};
        const auto bytes = static_cast<double>(n);
        const double to_device_s = typical_s(options_.budget_s / 2, to_device);
        return LinkRates{bytes / to_device_s, bytes / typical_s(options_.budget_s / 2, from_device)};
    });
}

}  // namespace overspill
