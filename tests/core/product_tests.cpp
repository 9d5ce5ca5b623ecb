#include "product_tests.h"

#include "checks.h"

#include "base/log.h"
#include "device/devices.h"
#include "product/product_graphs.h"
#include "product/products.h"

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml-impl.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace overspill;

namespace {

enum class Values { ordinary, far_apart, no_weights, no_activations, any_bits, least_scales, largest_scales };

// Quantized activations as numbers: their blocks are public in GGUF's specification, Q8_1's and Q8_K's in
// ggml-common.h.
std::vector<double> activation_values(ggml_type type, const std::vector<char> & bytes, int64_t n) {
    const bool is_large = type == GGML_TYPE_Q8_K;
    const int64_t block = is_large ? 256 : 32;
    const auto block_bytes = static_cast<int64_t>(ggml_type_size(type));
    const int64_t first = is_large ? 4 : type == GGML_TYPE_Q8_1 ? 4 : 2;  // of the whole numbers
    std::vector<double> values;
    for (int64_t i = 0; i < n; ++i) {
        const char * at = bytes.data() + i / block * block_bytes;
        float scale;
        ggml_fp16_t half;
        std::memcpy(&scale, at, sizeof(scale));
        std::memcpy(&half, at, sizeof(half));
        values.push_back(static_cast<double>(is_large ? scale : ggml_fp16_to_fp32(half)) *
                         static_cast<signed char>(at[first + i % block]));
    }
    return values;
}

// Rows and some columns, against sums in double precision, or the product of llama.cpp's own. Many columns are
// multiplied with sixteen rows at a time.

// On the heap to the byte, so that a read beyond the end is noticed.
std::vector<char> weights_of(ggml_type type, int64_t n, size_t n_rows, Values kind) {
    std::mt19937 random(static_cast<uint32_t>(n));
    std::vector<char> weights(n_rows * ggml_row_size(type, n));
    if (kind == Values::any_bits) {
        std::generate(weights.begin(), weights.end(), [&] { return static_cast<char>(random()); });
        return weights;
    }
    if (kind == Values::least_scales || kind == Values::largest_scales) {  // of MXFP4: a block begins with its exponent
        const unsigned first = kind == Values::least_scales ? 0 : 253;
        for (size_t i = 0; i < weights.size(); ++i) {
            weights[i] = static_cast<char>(i % ggml_type_size(type) == 0 ? first + random() % 3 : random());
        }
        return weights;
    }
    const float scale = kind == Values::no_weights ? 0.0F : kind == Values::far_apart ? 1e-3F : 1.0F;
    std::normal_distribution<float> normal;
    std::vector<float> exact(n_rows * static_cast<size_t>(n));
    std::generate(exact.begin(), exact.end(), [&] { return scale * normal(random); });
    ggml_quantize_chunk(type, exact.data(), weights.data(), 0, n_rows, n, nullptr);
    return weights;
}

void test_product(const ProductSet & set, const Products & products, const std::vector<char> & weights, int64_t n,
                  size_t n_rows, size_t n_columns, Values kind) {
    std::mt19937 random(static_cast<uint32_t>(n + static_cast<int64_t>(n_columns)));
    std::normal_distribution<float> normal;
    const auto numbers = [&](size_t n_numbers, float scale) {
        std::vector<float> some(n_numbers);
        std::generate(some.begin(), some.end(), [&] { return scale * normal(random); });
        return some;
    };
    const auto width = static_cast<size_t>(n);
    const float activation_scale = kind == Values::no_activations                              ? 0.0F
                                   : kind == Values::far_apart || kind == Values::least_scales ? 1e4F
                                   : kind == Values::largest_scales                            ? 5e-6F
                                                                                               : 1.0F;
    const size_t row_bytes = ggml_row_size(products.weights, n);
    const size_t ordered_bytes = products.ordered_bytes(n);
    check(ordered_bytes % activation_alignment == 0, "activations in order are a multiple of the alignment");
    std::vector<std::vector<char>> quantized;
    std::vector<char> memory(n_columns * ordered_bytes + activation_alignment);
    void * start = memory.data();
    size_t room = memory.size();
    auto * ordered = static_cast<char *>(std::align(activation_alignment, n_columns * ordered_bytes, start, room));
    std::vector<const void *> x;
    std::vector<float> results(n_columns * n_rows);
    std::vector<float *> out;
    for (size_t c = 0; c < n_columns; ++c) {
        std::vector<char> & one = quantized.emplace_back(ggml_row_size(products.activations, n));
        cpu_type_traits(products.activations).from_float(numbers(width, activation_scale).data(), one.data(), n);
        products.order(one.data(), n, ordered + c * ordered_bytes);
        x.push_back(ordered + c * ordered_bytes);
        out.push_back(results.data() + c * n_rows);
    }
    products.multiply({weights.data(), row_bytes, static_cast<int64_t>(n_rows), n, x.data(), out.data(),
                       static_cast<int64_t>(n_columns), prefetch_bytes()});
    size_t n_wrong = 0;
    for (size_t c = 0; c < n_columns; ++c) {
        const std::vector<double> activations = activation_values(products.activations, quantized[c], n);
        for (size_t r = 0; r < n_rows; ++r) {
            std::vector<float> row(width);
            ggml_get_type_traits(products.weights)->to_float(weights.data() + r * row_bytes, row.data(), n);
            double sum = 0;
            double size = 0;
            for (size_t i = 0; i < width; ++i) {
                const double product = static_cast<double>(row[i]) * activations[i];
                sum += product;
                size += std::abs(product);
            }
            float llama_cpps = 0;
            cpu_type_traits(products.weights)
                .vec_dot(static_cast<int>(n), &llama_cpps, 0, weights.data() + r * row_bytes, 0, quantized[c].data(), 0,
                         1);
            const float ours = results[c * n_rows + r];
            const bool is_near = std::abs(static_cast<double>(ours) - sum) <= 1e-6 * size ||
                                 std::abs(static_cast<double>(ours) - static_cast<double>(llama_cpps)) <= 1e-6 * size;
            // What becomes of numbers that overflow depends on the order of a sum. Where llama.cpp's is a number, ours
            // is.
            const bool overflows = !(size < 1e37);
            const bool is_same = ours == llama_cpps || (std::isnan(ours) && std::isnan(llama_cpps));
            n_wrong += overflows ? std::isfinite(llama_cpps) && !std::isfinite(ours) : !is_near && !is_same;
        }
    }
    check(n_wrong == 0, std::string(set.name) + ": products of " + ggml_type_name(products.weights) + ", " +
                            std::to_string(n) + " weights, " + std::to_string(n_columns) + " columns, values " +
                            std::to_string(static_cast<int>(kind)));
}

}  // namespace

void test_products() {
    ggml_free(ggml_init({1024, nullptr, true}));  // fills tables that conversions of halves look up
    cpu_device();
    const std::vector<const ProductSet *> sets = available_product_sets();
    if (sets.empty()) {
        return;
    }
    for (const ProductSet * set : sets) {
        std::printf("products with %s\n", set->name);
        check(set->n_products == sets[0]->n_products, "all sets have the same types");
        check(set->find(GGML_TYPE_F32) == nullptr, "no products of other types");
    }
    const std::vector<std::pair<size_t, std::vector<size_t>>> shapes = {{7, {1, 2, 4}}, {16, {5, 16}}, {37, {7, 19}}};
    for (size_t i = 0; i < sets[0]->n_products; ++i) {
        const ggml_type type = sets[0]->products[i].weights;
        for (const int64_t n_blocks : {1, 2, 3, 4, 5, 9}) {
            const int64_t n = n_blocks * sets[0]->products[i].block;
            for (const Values kind : {Values::ordinary, Values::far_apart, Values::no_weights, Values::no_activations,
                                      Values::any_bits, Values::least_scales, Values::largest_scales}) {
                // Any bits are weights in MXFP4; elsewhere also infinite scales, whose sums have no order.
                const bool is_of_bits =
                    kind == Values::any_bits || kind == Values::least_scales || kind == Values::largest_scales;
                if (is_of_bits && type != GGML_TYPE_MXFP4) {
                    continue;
                }
                for (const auto & [n_rows, numbers_of_columns] : shapes) {
                    const std::vector<char> weights = weights_of(type, n, n_rows, kind);
                    for (const ProductSet * set : sets) {
                        const Products * products = set->find(type);
                        check(products != nullptr && products->weights == type, "products are found by their type");
                        for (const size_t n_columns : numbers_of_columns) {
                            test_product(*set, *products, weights, n, n_rows, n_columns, kind);
                        }
                    }
                }
            }
        }
    }
}

namespace {

double activation_of(Activation activation, double x, double y, double alpha, double limit) {
    const auto sigmoid = [](double of) { return 1 / (1 + std::exp(-of)); };
    const double low = std::min(x, limit), within = std::clamp(y, -limit, limit);
    switch (activation) {
        case Activation::silu: return x * sigmoid(x) * y;
        case Activation::gelu: return x / 2 * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))) * y;
        case Activation::relu: return std::max(x, 0.0) * y;
        case Activation::relu_squared: return std::pow(std::max(x, 0.0), 2) * y;
        case Activation::oai: return low * sigmoid(alpha * low) * (within + 1);
        case Activation::clamped_silu: return low * sigmoid(low) * within;
    }
    return 0;
}

}  // namespace

void test_activations() {
    constexpr float alpha = 1.702F, limit = 7.0F;
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0.0F, 6.0F);
    for (const ProductSet * set : available_product_sets()) {
        for (const size_t n : {1, 7, 8, 16, 33, 500}) {
            // On the heap to the byte, so that a read beyond the end is noticed.
            std::vector<float> x(n), y(n), out(n);
            std::generate(x.begin(), x.end(), [&] { return normal(random); });
            std::generate(y.begin(), y.end(), [&] { return normal(random); });
            x[0] = n == 7 ? -200.0F : n == 8 ? 200.0F : n == 16 ? 0.0F : x[0];
            for (const Activation activation : {Activation::silu, Activation::gelu, Activation::relu,
                                                Activation::relu_squared, Activation::oai, Activation::clamped_silu}) {
                for (const bool is_gated : {true, false}) {
                    set->activate({activation, alpha, limit, x.data(), is_gated ? y.data() : nullptr,
                                   static_cast<int64_t>(n), out.data()});
                    size_t n_wrong = 0;
                    for (size_t i = 0; i < n; ++i) {
                        const double factor = is_gated ? static_cast<double>(y[i]) : 1.0;
                        const double exact = activation_of(activation, static_cast<double>(x[i]), factor,
                                                           static_cast<double>(alpha), static_cast<double>(limit));
                        // llama.cpp rounds GELU and what it is of to halves, which keep 2^-11 of a number.
                        const double rounding =
                            activation == Activation::gelu
                                ? std::abs(exact) + 1.2 * std::abs(static_cast<double>(x[i]) * factor)
                                : 0.0;
                        const double bound = 1e-6 * std::abs(exact) + 1e-7 * std::abs(factor) + rounding / 2048;
                        n_wrong += !(std::abs(static_cast<double>(out[i]) - exact) <= bound);
                    }
                    check(n_wrong == 0, std::string(set->name) + ": activation " +
                                            std::to_string(static_cast<int>(activation)) + " of " + std::to_string(n));
                }
            }
        }
    }
}

namespace {

// A form that a feed-forward has in llama.cpp's graphs.
struct Form {
    std::string name;
    std::function<ggml_tensor *(ggml_context *, ggml_tensor * gate, ggml_tensor * up)> activate;
    bool is_gated = true;
    bool is_merged = false;  // gate and up are one product
    bool has_experts = true;
    bool has_biases = false;
    bool weighs_before = false;  // the experts' activations, and not their results
    int64_t n_summed = 3;        // experts; 0: none
    // What keeps it from being one piece.
    bool reads_within = false;
    bool computes_between = false;
    bool is_whole() const { return !reads_within && !computes_between && name.find("apart") == std::string::npos; }
};

struct Types {
    ggml_type first, down;
    int64_t n_ff;
};

struct ContextDelete {
    void operator()(ggml_context * context) const { ggml_free(context); }
};
struct BufferDelete {
    void operator()(ggml_backend_buffer * buffer) const { ggml_backend_buffer_free(buffer); }
};
struct BackendDelete {
    void operator()(ggml_backend * backend) const { ggml_backend_free(backend); }
};
struct AllocatorDelete {
    void operator()(ggml_gallocr * allocator) const { ggml_gallocr_free(allocator); }
};
using Context = std::unique_ptr<ggml_context, ContextDelete>;
using Buffer = std::unique_ptr<ggml_backend_buffer, BufferDelete>;
using Backend = std::unique_ptr<ggml_backend, BackendDelete>;
using Allocator = std::unique_ptr<ggml_gallocr, AllocatorDelete>;

Context new_context() {
    return Context(ggml_init({256 * ggml_tensor_overhead() + 2 * ggml_graph_overhead(), nullptr, true}));
}

// The graph of one feed-forward, with weights by chance.
class FeedForwardGraph {
  public:
    FeedForwardGraph(const Form & form, const Types & types, int64_t n_tokens, ggml_backend_t backend)
        : form_(form), types_(types), n_tokens_(n_tokens), backend_(backend) {
        make_weights();
        make_graph();
    }

    // With llama.cpp's products, or with those of the set.
    std::vector<float> compute(ProductGraphs * products) {
        ggml_backend_buffer_clear(out_->buffer, 0xFF);  // not a number: nothing is there from the last time
        set_inputs();
        ggml_backend_graph_compute(backend_, products != nullptr ? products->replace(graph_) : graph_);
        ProductGraphs::computed();
        std::vector<float> result(static_cast<size_t>(ggml_nelements(out_)));
        ggml_backend_tensor_get(out_, result.data(), 0, ggml_nbytes(out_));
        return result;
    }

  private:
    static constexpr int64_t n_embd = 256, n_experts = 5, n_used = 3;
    static constexpr int n_layers = 2;

    ggml_tensor * new_weights(ggml_type type, int64_t n, int64_t n_weight_rows) {
        return form_.has_experts ? ggml_new_tensor_3d(weights_.get(), type, n, n_weight_rows, n_experts)
                                 : ggml_new_tensor_2d(weights_.get(), type, n, n_weight_rows);
    }
    ggml_tensor * new_bias(int64_t n) {
        return form_.has_experts ? ggml_new_tensor_2d(weights_.get(), GGML_TYPE_F32, n, n_experts)
                                 : ggml_new_tensor_1d(weights_.get(), GGML_TYPE_F32, n);
    }

    std::vector<float> numbers(int64_t n, float scale) {
        std::normal_distribution<float> normal;
        std::vector<float> some(static_cast<size_t>(n));
        constexpr size_t period = 4099;  // the others follow from the first, sooner than by chance
        for (size_t i = 0; i < some.size(); ++i) {
            some[i] = i < period ? scale * normal(random_) : some[i - period];
        }
        return some;
    }

    void make_weights() {
        const int64_t n_first = form_.is_merged ? 2 * types_.n_ff : types_.n_ff;
        gate_ = new_weights(types_.first, n_embd, n_first);
        up_ = new_weights(types_.first, n_embd, types_.n_ff);
        down_ = new_weights(types_.down, types_.n_ff, n_embd);
        other_ = ggml_new_tensor_2d(weights_.get(), types_.first, n_embd, n_embd);
        gate_bias_ = new_bias(n_first);
        up_bias_ = new_bias(types_.n_ff);
        down_bias_ = new_bias(n_embd);
        weights_buffer_.reset(ggml_backend_alloc_ctx_tensors(weights_.get(), backend_));
        ggml_backend_buffer_set_usage(weights_buffer_.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        for (ggml_tensor * one : {gate_, up_, down_, other_, gate_bias_, up_bias_, down_bias_}) {
            const std::vector<float> exact = numbers(ggml_nelements(one), one->type == GGML_TYPE_F32 ? 1.0F : 0.1F);
            if (one->type == GGML_TYPE_F32) {
                ggml_backend_tensor_set(one, exact.data(), 0, ggml_nbytes(one));
                continue;
            }
            std::vector<char> quantized(ggml_nbytes(one));
            ggml_quantize_chunk(one->type, exact.data(), quantized.data(), 0, ggml_nrows(one), one->ne[0], nullptr);
            ggml_backend_tensor_set(one, quantized.data(), 0, quantized.size());
        }
    }

    ggml_tensor * project(ggml_tensor * weights, ggml_tensor * bias, ggml_tensor * x) {
        ggml_context * c = context_.get();
        if (form_.has_experts) {
            ggml_tensor * y = ggml_mul_mat_id(c, weights, x, ids_);
            return form_.has_biases ? ggml_add_id(c, y, bias, ids_) : y;
        }
        ggml_tensor * y = ggml_mul_mat(c, weights, x);
        return form_.has_biases ? ggml_add(c, y, bias) : y;
    }

    ggml_tensor * half_of(ggml_tensor * both, int64_t half) {
        return ggml_view_3d(context_.get(), both, types_.n_ff, both->ne[1], both->ne[2], both->nb[1], both->nb[2],
                            static_cast<size_t>(half * types_.n_ff) * sizeof(float));
    }

    bool gives_columns() const { return !form_.has_experts || form_.n_summed > 0; }

    void make_graph() {
        ggml_context * c = context_.get();
        graph_ = ggml_new_graph(c);
        input_ = ggml_new_tensor_2d(c, GGML_TYPE_F32, n_embd, n_tokens_);
        all_ids_ = ggml_new_tensor_2d(c, GGML_TYPE_I32, n_experts, n_tokens_);
        routing_ = ggml_new_tensor_3d(c, GGML_TYPE_F32, 1, n_used, n_tokens_);
        for (ggml_tensor * one : {input_, all_ids_, routing_}) {
            ggml_set_input(one);
        }
        ids_ = ggml_view_2d(c, all_ids_, n_used, n_tokens_, all_ids_->nb[1], 0);  // as of sorted ones
        // So that memory of what is read here may be used again: results of operations, not inputs.
        ggml_tensor * routing = ggml_scale(c, routing_, 0.5F);
        ggml_build_forward_expand(graph_, routing);
        out_ = ggml_scale(c, input_, 2.0F);
        for (int layer = 0; layer < (gives_columns() ? n_layers : 1); ++layer) {
            ggml_tensor * x = ggml_rms_norm(c, out_, 1e-6F);
            ggml_tensor * apart = ggml_mul_mat(c, other_, x);  // one more product of the same activations
            ggml_build_forward_expand(graph_, apart);
            add_feed_forward(x, routing);
            if (gives_columns()) {
                out_ = ggml_add(c, out_, apart);
            }
        }
        ggml_set_output(out_);
        ggml_build_forward_expand(graph_, out_);
        allocator_.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend_)));
        ggml_gallocr_alloc_graph(allocator_.get(), graph_);
        graph_->uid = ggml_graph_next_uid();
    }

    // Its result is out_ then.
    void add_feed_forward(ggml_tensor * x, ggml_tensor * routing) {
        ggml_context * c = context_.get();
        if (form_.has_experts) {
            x = ggml_reshape_3d(c, x, n_embd, 1, n_tokens_);
            if (form_.weighs_before) {
                x = ggml_mul(c, ggml_repeat_4d(c, x, n_embd, n_used, n_tokens_, 1), routing);
            }
        }
        ggml_tensor * gate = project(gate_, gate_bias_, x);
        ggml_tensor * up = nullptr;
        if (form_.is_merged && form_.is_gated && form_.has_experts) {
            ggml_tensor * both = gate;
            gate = half_of(both, 0);
            up = half_of(both, 1);
        } else if (form_.is_gated && !form_.is_merged) {
            ggml_build_forward_expand(graph_, gate);
            if (form_.computes_between) {
                ggml_build_forward_expand(graph_, ggml_sqr(c, input_));
            }
            up = project(up_, up_bias_, x);
        }
        ggml_tensor * activated = form_.activate(c, gate, up);
        out_ = project(down_, down_bias_, activated);
        if (form_.has_experts && !form_.weighs_before) {
            out_ = ggml_mul(c, out_, routing);
        }
        ggml_build_forward_expand(graph_, out_);
        if (form_.has_experts && form_.n_summed > 0) {
            ggml_tensor * experts = out_;
            std::vector<ggml_tensor *> slots;
            for (int64_t k = 0; k < form_.n_summed; ++k) {
                slots.push_back(ggml_view_2d(c, experts, n_embd, n_tokens_, experts->nb[2],
                                             static_cast<size_t>(k) * experts->nb[1]));
                ggml_build_forward_expand(graph_, slots.back());
            }
            out_ = slots[0];
            for (size_t k = 1; k < slots.size(); ++k) {
                out_ = ggml_add(c, out_, slots[k]);
                ggml_build_forward_expand(graph_, out_);
            }
        }
        if (form_.reads_within) {
            out_ = ggml_add(c, out_, ggml_sum(c, activated));
        }
    }

    void set_inputs() {
        random_.seed(17);
        const std::vector<float> x = numbers(ggml_nelements(input_), 1.0F);
        const std::vector<float> routing = numbers(ggml_nelements(routing_), 1.0F);
        std::vector<int32_t> ids(static_cast<size_t>(ggml_nelements(all_ids_)));
        std::generate(ids.begin(), ids.end(), [&] { return static_cast<int32_t>(random_() % n_experts); });
        set(input_, x.data());
        set(routing_, routing.data());
        set(all_ids_, ids.data());
    }
    static void set(ggml_tensor * tensor, const void * values) {
        if (tensor->buffer != nullptr) {  // it is not, where the graph does not read it
            ggml_backend_tensor_set(tensor, values, 0, ggml_nbytes(tensor));
        }
    }

    const Form & form_;
    const Types types_;
    const int64_t n_tokens_;
    const ggml_backend_t backend_;
    std::mt19937 random_{5};
    Context weights_ = new_context();
    Context context_ = new_context();
    Buffer weights_buffer_;
    Allocator allocator_;
    ggml_tensor *gate_, *up_, *down_, *other_, *gate_bias_, *up_bias_, *down_bias_;
    ggml_tensor *input_, *all_ids_, *ids_, *routing_, *out_;
    ggml_cgraph * graph_;
};

std::vector<Form> forms() {
    using Tensor = ggml_tensor *;
    const auto glu = [](ggml_glu_op op) {
        return [op](ggml_context * c, Tensor gate, Tensor up) {
            return up != nullptr ? ggml_glu_split(c, gate, up, op) : ggml_glu(c, gate, op, false);
        };
    };
    const auto oai = [](ggml_context * c, Tensor gate, Tensor up) {
        return ggml_swiglu_oai(c, gate, up, 1.702F, 7.0F);
    };
    const auto clamped = [](ggml_context * c, Tensor gate, Tensor up) { return ggml_swiglu_clamp(c, gate, up, 1.5F); };
    const auto unary = [](ggml_unary_op op) {
        return [op](ggml_context * c, Tensor gate, Tensor) { return ggml_unary(c, gate, op); };
    };
    const auto squared = [](ggml_context * c, Tensor gate, Tensor) { return ggml_sqr(c, ggml_relu(c, gate)); };
    const auto swapped = [](ggml_context * c, Tensor gate, Tensor) { return ggml_swiglu_swapped(c, gate); };
    std::vector<Form> all;
    for (const bool has_experts : {true, false}) {
        for (const bool has_biases : {true, false}) {
            const std::string kind =
                std::string(has_experts ? "experts, " : "dense, ") + (has_biases ? "biases, " : "");
            const auto add = [&](const std::string & name, auto activate, bool is_gated, bool is_merged) -> Form & {
                return all.emplace_back(Form{kind + name, activate, is_gated, is_merged, has_experts, has_biases});
            };
            add("reglu", glu(GGML_GLU_OP_REGLU), true, false);
            add("geglu", glu(GGML_GLU_OP_GEGLU), true, false);
            add("swiglu", glu(GGML_GLU_OP_SWIGLU), true, false);
            add("oai", oai, true, false);
            add("clamped", clamped, true, false);
            add("merged swiglu", glu(GGML_GLU_OP_SWIGLU), true, true);
            if (!has_experts) {
                add("merged swapped swiglu", swapped, true, true);
            }
            add("silu", unary(GGML_UNARY_OP_SILU), false, false);
            add("gelu", unary(GGML_UNARY_OP_GELU), false, false);
            add("relu", unary(GGML_UNARY_OP_RELU), false, false);
            add("relu squared", squared, false, false);
            add("apart: erf", glu(GGML_GLU_OP_GEGLU_ERF), true, false);
            add("apart: tanh", unary(GGML_UNARY_OP_TANH), false, false);
            add("read within", glu(GGML_GLU_OP_SWIGLU), true, false).reads_within = true;
            add("computed between", glu(GGML_GLU_OP_SWIGLU), true, false).computes_between = true;
            if (has_experts) {
                add("weights before", glu(GGML_GLU_OP_SWIGLU), true, false).weighs_before = true;
                add("no sum", glu(GGML_GLU_OP_SWIGLU), true, false).n_summed = 0;
                // As in a warm-up.
                add("fewer summed", glu(GGML_GLU_OP_SWIGLU), true, false).n_summed = 2;
            }
        }
    }
    return all;
}

// The root of the mean square of the differences, over that of the numbers.
double difference(const std::vector<float> & one, const std::vector<float> & other) {
    double apart = 0, size = 0;
    for (size_t i = 0; i < one.size(); ++i) {
        apart += std::pow(static_cast<double>(one[i]) - static_cast<double>(other[i]), 2);
        size += std::pow(static_cast<double>(other[i]), 2);
    }
    return one.size() == other.size() ? std::sqrt(apart / size) : 1.0;
}

std::string logged() {
    std::string all;
    for (const LogLine & line : drain_log()) {
        all += line.text + "\n";
    }
    return all;
}

}  // namespace

void test_feed_forwards() {
    std::vector<const ProductSet *> sets = available_product_sets();
    if (sets.size() > 1) {
        sets = {sets.front(), sets.back()};  // the products of all are looked at by themselves
    }
    const Backend backend(ggml_backend_dev_init(cpu_device(), nullptr));
    ggml_backend_cpu_set_n_threads(backend.get(), 2);
    const std::vector<Types> types = {{GGML_TYPE_MXFP4, GGML_TYPE_MXFP4, 544},
                                      {GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, 512},
                                      {GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, 32}};
    for (const Form & form : forms()) {
        for (const Types & type : types) {
            for (const int64_t n_tokens : {1, 3, 200}) {
                FeedForwardGraph graph(form, type, n_tokens, backend.get());
                const std::vector<float> theirs = graph.compute(nullptr);
                for (const ProductSet * set : sets) {
                    const std::string what = std::string(set->name) + ": " + form.name + ", " +
                                             ggml_type_name(type.first) + ", " + std::to_string(n_tokens) + " tokens";
                    const int64_t n_columns = (form.has_experts ? 3 : 1) * n_tokens;
                    const int64_t most =
                        std::min(set->find(type.first)->most_columns, set->find(type.down)->most_columns);
                    const bool is_few =
                        n_columns <= 256 && (form.has_experts ? n_columns / 5 < most : n_columns <= most);
                    drain_log();
                    ProductGraphs products(set, cpu_quantize);
                    // A rounding may make an activation the next whole number; without its biases it is far from that.
                    const std::vector<float> ours = graph.compute(&products);
                    check(difference(ours, theirs) < 1e-2, what);
                    check(graph.compute(&products) == ours, what + ", again");
                    const std::string layers = form.has_experts && form.n_summed == 0 ? "1" : "2";
                    const bool is_whole = logged().find(": " + layers + " whole") != std::string::npos;
                    check(is_whole == (form.is_whole() && is_few), what + (is_whole ? " is" : " is not") + " whole");
                }
            }
        }
    }
}
