#include "product/product_graphs.h"

// Graphs and the parameters of custom operations are structs that only this header defines.
#include <ggml-impl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <new>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace overspill {

namespace {

// llama.cpp's barriers are between what threads do here, and between that and whoever computes the graph.
// ThreadSanitizer does not see them, and is told.
#ifdef __SANITIZE_THREAD__
char barrier;
void before_stage() {
    __tsan_acquire(&barrier);
}
void after_stage() {
    __tsan_release(&barrier);
}
#else
void before_stage() {}
void after_stage() {}
#endif

// So many columns are multiplied with the rows of a part before the next: they stay in the cache.
constexpr size_t columns_at_once = 16;
// Tokens times experts of a token; products with more are llama.cpp's.
constexpr size_t most_routes = 4096;
// The parts of a product that a thread takes at a time have so many bytes of weights or more.
constexpr size_t least_part_bytes = 16384;
constexpr int64_t parts_per_thread = 8;
// Of weights that are multiplied with one column after the other.
constexpr size_t most_part_bytes = 65536;
// Activations that a thread puts in order at a time, a multiple of every type's groups: at least what is done in the
// time of a barrier.
constexpr int64_t part_activations = 2048;

struct AlignedDelete {
    void operator()(uint8_t * p) const { ::operator delete[](p, std::align_val_t{activation_alignment}); }
};

// Memory for activations in order, used by one product after the other.
struct Scratch {
    size_t n_bytes = 0;
    int last_use = -1;
    std::unique_ptr<uint8_t[], AlignedDelete> bytes;
};

// A column of activations or results, by its number.
const char * column_of(const ggml_tensor & x, int64_t c) {
    const int64_t i1 = c % x.ne[1], i2 = c / x.ne[1] % x.ne[2], i3 = c / (x.ne[1] * x.ne[2]);
    return static_cast<const char *>(x.data) + static_cast<size_t>(i1) * x.nb[1] + static_cast<size_t>(i2) * x.nb[2] +
           static_cast<size_t>(i3) * x.nb[3];
}

float * column_to(const ggml_tensor & out, int64_t c) {
    return const_cast<float *>(reinterpret_cast<const float *>(column_of(out, c)));
}

struct Ordering {
    const ggml_tensor * x;
    const Products * products;
    ggml_from_float_t quantize;
    size_t ordered_bytes;  // of a column
    int last_use;          // by the number of the node
    Scratch * scratch = nullptr;
    std::atomic<int64_t> next_part{0};

    uint8_t * ordered() const { return scratch->bytes.get(); }
    const void * ordered(int64_t c) const { return ordered() + static_cast<size_t>(c) * ordered_bytes; }
};

struct Product {
    int node;  // its number
    const Products * products;
    const ggml_tensor * weights;
    const ggml_tensor * ids;  // null: one product for all columns
    Ordering * x;
    std::atomic<int64_t> next_part{0};
};

// Parts are given out in turn; the first ones by the threads' own numbers.
template <typename Work>
void for_parts(std::atomic<int64_t> & next_part, int64_t n_parts, int ith, int nth, const Work & work) {
    for (int64_t part = ith; part < n_parts; part = nth + next_part.fetch_add(1, std::memory_order_relaxed)) {
        work(part);
    }
}

template <void (*stage)(ggml_tensor *, int, int, void *)>
void run_stage(ggml_tensor * out, int ith, int nth, void * data) {
    before_stage();
    stage(out, ith, nth, data);
    after_stage();
}

void order(ggml_tensor *, int ith, int nth, void * data) {
    auto & o = *static_cast<Ordering *>(data);
    const Products & products = *o.products;
    const int64_t n = o.x->ne[0], n_columns = ggml_nrows(o.x);
    const int64_t parts_of_column = (n + part_activations - 1) / part_activations;
    alignas(64) std::array<char, part_activations * sizeof(float)> quantized;
    for_parts(o.next_part, parts_of_column * n_columns, ith, nth, [&](int64_t part) {
        const int64_t c = part / parts_of_column, first = part % parts_of_column * part_activations;
        const int64_t n_here = std::min(part_activations, n - first);
        const float * x = reinterpret_cast<const float *>(column_of(*o.x, c)) + first;
        o.quantize(x, quantized.data(), n_here);
        products.order(quantized.data(), n_here,
                       o.ordered() + static_cast<size_t>(c) * o.ordered_bytes + products.ordered_bytes(first));
    });
}

// Columns of activations and where their products go, some at a time.
class Columns {
  public:
    Columns(const Product & product, const ggml_tensor & out) : product_(product), out_(out) {}

    // The products of rows of weights, which are those from row `first` of the results on.
    void multiply(const char * rows, int64_t first, int64_t n_rows) const {
        const ggml_tensor & weights = *product_.weights;
        product_.products->multiply(
            {rows, weights.nb[1], n_rows, weights.ne[0], x_.data(), to(first).data(), static_cast<int64_t>(n_)});
    }
    void clear() { n_ = 0; }
    bool is_full() const { return n_ == columns_at_once; }
    void add(int64_t of_x, int64_t of_out) {
        x_[n_] = product_.x->ordered(of_x);
        out_columns_[n_++] = column_to(out_, of_out);
    }

  private:
    std::array<float *, columns_at_once> to(int64_t first) const {
        std::array<float *, columns_at_once> rows;
        for (size_t c = 0; c < n_; ++c) {
            rows[c] = out_columns_[c] + first;
        }
        return rows;
    }

    const Product & product_;
    const ggml_tensor & out_;
    std::array<const void *, columns_at_once> x_;
    std::array<float *, columns_at_once> out_columns_;
    size_t n_ = 0;
};

// Rows of a part, for so many rows in all.
int64_t rows_of_part(const ggml_tensor & weights, int64_t n_rows, int64_t n_columns, int nth) {
    constexpr int64_t unit = 16;  // results that share a cache line
    const auto rows_in = [&](size_t n_bytes) { return static_cast<int64_t>(n_bytes / weights.nb[1]) + 1; };
    const bool again = n_columns > static_cast<int64_t>(columns_at_once);
    const int64_t most = again ? rows_in(most_part_bytes) : n_rows;
    const int64_t rows = std::max(rows_in(least_part_bytes), std::min(most, n_rows / (nth * parts_per_thread)));
    return (rows + unit - 1) / unit * unit;
}

void multiply(ggml_tensor * out, int ith, int nth, void * data) {
    auto & product = *static_cast<Product *>(data);
    const ggml_tensor & weights = *product.weights;
    const int64_t n_rows = weights.ne[1], n_columns = ggml_nrows(out);
    const int64_t rows = rows_of_part(weights, n_rows, n_columns, nth);
    Columns columns(product, *out);
    for_parts(product.next_part, (n_rows + rows - 1) / rows, ith, nth, [&](int64_t part) {
        const int64_t first = part * rows;
        for (int64_t c = 0; c < n_columns;) {
            for (columns.clear(); c < n_columns && !columns.is_full(); ++c) {
                columns.add(c, c);
            }
            columns.multiply(static_cast<const char *>(weights.data) + static_cast<size_t>(first) * weights.nb[1],
                             first, std::min(rows, n_rows - first));
        }
    });
}

// The columns of a product with experts, those of an expert together.
class Routes {
  public:
    Routes(const ggml_tensor & ids, int64_t n_experts) {
        for (int64_t t = 0; t < ids.ne[1]; ++t) {
            for (int64_t k = 0; k < ids.ne[0]; ++k) {
                const auto * id = reinterpret_cast<const int32_t *>(static_cast<const char *>(ids.data) +
                                                                    static_cast<size_t>(t) * ids.nb[1] +
                                                                    static_cast<size_t>(k) * ids.nb[0]);
                GGML_ASSERT(*id >= 0 && *id < n_experts);
                routes_[n_] = {*id, static_cast<int32_t>(n_)};
                ++n_;
            }
        }
        std::sort(routes_.begin(), routes_.begin() + static_cast<std::ptrdiff_t>(n_),
                  [](const Route & a, const Route & b) {
                      return a.expert != b.expert ? a.expert < b.expert : a.column < b.column;
                  });
        for (size_t i = 0; i < n_; ++i) {
            if (i == 0 || routes_[i].expert != routes_[i - 1].expert) {
                first_[n_used_++] = i;
            }
        }
        first_[n_used_] = n_;
    }
    // Experts that are used.
    size_t n_used() const { return n_used_; }
    size_t expert(size_t used) const { return static_cast<size_t>(routes_[first_[used]].expert); }
    size_t begin(size_t used) const { return first_[used]; }
    size_t end(size_t used) const { return first_[used + 1]; }
    int64_t column(size_t i) const { return routes_[i].column; }

  private:
    struct Route {
        int32_t expert;
        int32_t column;  // of the results
    };
    std::array<Route, most_routes> routes_;
    std::array<size_t, most_routes + 1> first_;  // of each expert that is used
    size_t n_ = 0;
    size_t n_used_ = 0;
};

void multiply_routed(ggml_tensor * out, int ith, int nth, void * data) {
    auto & product = *static_cast<Product *>(data);
    const ggml_tensor & weights = *product.weights;
    const Routes routes(*product.ids, weights.ne[2]);
    // Of a token, the experts multiply the same column, or each one its own.
    const int64_t n_of_token = product.ids->ne[0];
    const int64_t n_sharing = product.x->x->ne[1] == 1 ? n_of_token : 1;
    const auto n_used = static_cast<int64_t>(routes.n_used());
    const int64_t n_rows = weights.ne[1];
    const int64_t rows = rows_of_part(weights, n_rows * n_used, ggml_nrows(out) / n_used, nth);
    const int64_t parts_of_expert = (n_rows + rows - 1) / rows;
    Columns columns(product, *out);
    for_parts(product.next_part, parts_of_expert * n_used, ith, nth, [&](int64_t part) {
        const auto used = static_cast<size_t>(part / parts_of_expert);
        const int64_t first = part % parts_of_expert * rows;
        const char * from = static_cast<const char *>(weights.data) + routes.expert(used) * weights.nb[2] +
                            static_cast<size_t>(first) * weights.nb[1];
        for (size_t i = routes.begin(used); i < routes.end(used);) {
            for (columns.clear(); i < routes.end(used) && !columns.is_full(); ++i) {
                columns.add(routes.column(i) / n_sharing, routes.column(i));
            }
            columns.multiply(from, first, std::min(rows, n_rows - first));
        }
    });
}

bool are_weights_in_ram(const ggml_tensor & tensor) {
    ggml_backend_buffer_t buffer = tensor.view_src != nullptr ? tensor.view_src->buffer : tensor.buffer;
    return buffer != nullptr && ggml_backend_buffer_is_host(buffer) &&
           ggml_backend_buffer_get_usage(buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

// The products that such a node can be computed with; null: llama.cpp's.
const Products * products_for(const ProductSet & set, const ggml_tensor & node) {
    if ((node.op != GGML_OP_MUL_MAT && node.op != GGML_OP_MUL_MAT_ID) || (node.flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return nullptr;
    }
    const ggml_tensor & weights = *node.src[0];
    const ggml_tensor & x = *node.src[1];
    const Products * products = set.find(weights.type);
    if (products == nullptr) {
        return nullptr;
    }
    // Each expert gets a part of the tokens.
    const bool fits = node.op == GGML_OP_MUL_MAT
                          ? weights.ne[2] == 1 && ggml_nrows(&node) <= products->most_columns
                          : ggml_nrows(&node) / weights.ne[2] < products->most_columns &&
                                ggml_nelements(node.src[2]) <= static_cast<int64_t>(most_routes) &&
                                (x.ne[1] == 1 || x.ne[1] == node.src[2]->ne[0]);
    const bool is_usual = weights.ne[3] == 1 && weights.nb[0] == ggml_type_size(weights.type) &&
                          x.type == GGML_TYPE_F32 && x.nb[0] == sizeof(float) && node.type == GGML_TYPE_F32 &&
                          ggml_is_contiguous(&node);
    return fits && is_usual && weights.ne[0] % products->block == 0 && !ggml_is_empty(&node) &&
                   are_weights_in_ram(weights)
               ? products
               : nullptr;
}

}  // namespace

struct ProductGraphs::Scratches {
    std::deque<Scratch> all;  // whose elements stay where they are
};

// One graph with its nodes replaced.
class ProductGraphs::Graph {
  public:
    Graph(Quantize quantize, std::deque<Scratch> & scratch) : quantize_(quantize), scratch_(scratch) {}

    void build(const ProductSet & set, const ggml_cgraph & graph) {
        uid_ = 0;  // until it is complete
        orderings_.clear();
        products_.clear();
        tensors_.clear();
        nodes_.clear();
        for (Scratch & one : scratch_) {
            one.last_use = -1;
        }
        for (int i = 0; i < graph.n_nodes; ++i) {
            if (const Products * products = products_for(set, *graph.nodes[i])) {
                note(*graph.nodes[i], *products, i);
            }
        }
        auto product = products_.begin();
        for (int i = 0; i < graph.n_nodes; ++i) {
            if (product != products_.end() && product->node == i) {
                replace(*graph.nodes[i], *product++);
            } else {
                nodes_.push_back(graph.nodes[i]);
            }
        }
        uid_ = graph.uid;
    }

    bool is_of(const ggml_cgraph & graph) const { return graph.uid != 0 && graph.uid == uid_; }

    ggml_cgraph * of(ggml_cgraph * graph) {
        if (products_.empty()) {
            return graph;
        }
        for (Ordering & one : orderings_) {
            one.next_part.store(0, std::memory_order_relaxed);
        }
        for (Product & one : products_) {
            one.next_part.store(0, std::memory_order_relaxed);
        }
        // With the counts of uses, by which the backend fuses operations.
        view_ = *graph;
        view_.nodes = nodes_.data();
        view_.n_nodes = static_cast<int>(nodes_.size());
        view_.size = view_.n_nodes;
        view_.grads = nullptr;
        view_.grad_accs = nullptr;
        return &view_;
    }

  private:
    // Notes a product, and that its activations are needed until then.
    void note(const ggml_tensor & node, const Products & products, int i) {
        const ggml_tensor * x = node.src[1];
        const auto same = [&](const Ordering & one) { return one.x == x && one.products->order == products.order; };
        auto known = std::find_if(orderings_.rbegin(), orderings_.rend(), same);
        if (known == orderings_.rend()) {
            Ordering & ordering = orderings_.emplace_back();
            ordering.x = x;
            ordering.products = &products;
            ordering.quantize = quantize_(products.activations);
            ordering.ordered_bytes = products.ordered_bytes(x->ne[0]);
            known = orderings_.rbegin();
        }
        known->last_use = i;
        Product & product = products_.emplace_back();
        product.node = i;
        product.products = &products;
        product.weights = node.src[0];
        product.ids = node.op == GGML_OP_MUL_MAT_ID ? node.src[2] : nullptr;
        product.x = &*known;
    }

    // Puts a product's stages in place of its node.
    void replace(const ggml_tensor & node, Product & product) {
        Ordering & x = *product.x;
        if (x.scratch == nullptr) {
            x.scratch = take_scratch(x.ordered_bytes * static_cast<size_t>(ggml_nrows(x.x)), product.node, x.last_use);
            nodes_.push_back(custom(node, run_stage<order>, &x));
        }
        nodes_.push_back(
            custom(node, product.ids != nullptr ? run_stage<multiply_routed> : run_stage<multiply>, &product));
    }

    Scratch * take_scratch(size_t n_bytes, int first_use, int last_use) {
        auto one = std::find_if(scratch_.begin(), scratch_.end(),
                                [&](const Scratch & scratch) { return scratch.last_use < first_use; });
        if (one == scratch_.end()) {
            one = scratch_.emplace(scratch_.end());
        }
        if (one->n_bytes < n_bytes) {
            one->bytes.reset(static_cast<uint8_t *>(::operator new[](n_bytes, std::align_val_t{activation_alignment})));
            one->n_bytes = n_bytes;
        }
        one->last_use = last_use;
        return &*one;
    }

    // A node with the same result that calls the function with the data.
    ggml_tensor * custom(const ggml_tensor & node, ggml_custom_op_t function, void * data) {
        ggml_tensor & tensor = tensors_.emplace_back(node);
        tensor.op = GGML_OP_CUSTOM;
        std::fill(std::begin(tensor.src), std::end(tensor.src), nullptr);
        const ggml_custom_op_params params = {function, GGML_N_TASKS_MAX, data};
        ggml_set_op_params(&tensor, &params, sizeof(params));
        return &tensor;
    }

    const Quantize quantize_;
    uint64_t uid_ = 0;
    // Lists whose elements stay where they are.
    std::deque<Ordering> orderings_;
    std::deque<Product> products_;
    std::deque<ggml_tensor> tensors_;
    std::deque<Scratch> & scratch_;  // of all graphs: one is computed at a time
    std::vector<ggml_tensor *> nodes_;
    ggml_cgraph view_ = {};
};

ProductGraphs::ProductGraphs(const ProductSet & set, Quantize quantize)
    : set_(set), quantize_(quantize), scratch_(std::make_unique<Scratches>()) {}
ProductGraphs::~ProductGraphs() = default;

void ProductGraphs::computed() {
    before_stage();
}

ggml_cgraph * ProductGraphs::replace(ggml_cgraph * graph) {
    // Addresses change where the pieces become more.
    constexpr size_t most_graphs = 1024;
    if (graphs_.size() > most_graphs) {
        graphs_.clear();
    }
    std::unique_ptr<Graph> & known = graphs_[graph];
    if (!known) {
        known = std::make_unique<Graph>(quantize_, scratch_->all);
    }
    if (!known->is_of(*graph)) {
        known->build(set_, *graph);
    }
    ggml_cgraph * replaced = known->of(graph);
    after_stage();
    return replaced;
}

}  // namespace overspill
