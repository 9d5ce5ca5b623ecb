#include "product/product_stages.h"

#include "base/assertions.h"

#include <algorithm>
#include <array>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace overspill {

namespace {

// So many columns are multiplied with the rows of a part before the next: they stay in the cache.
constexpr size_t columns_at_once = 16;
// The parts of a product that a thread takes at a time have so many bytes of weights or more.
constexpr size_t least_part_bytes = 16384;
constexpr int64_t parts_per_thread = 8;
// Of weights that are multiplied with one column after the other.
constexpr size_t most_part_bytes = 65536;
// Activations that a thread puts in order at a time, a multiple of every type's groups: at least what is done in the
// time of a barrier.
constexpr int64_t part_activations = 2048;
// Activations of a feed-forward that are put in order as soon as they are there: a multiple of every type's groups.
constexpr int64_t group_activations = 256;
// Results that share a cache line.
constexpr int64_t least_rows = 16;

int64_t parts_in(int64_t n, int64_t n_of_part) {
    return (n + n_of_part - 1) / n_of_part;
}

// A column of activations or results, by its number.
const char * column_of(const ggml_tensor & x, int64_t c) {
    const int64_t i1 = c % x.ne[1], i2 = c / x.ne[1] % x.ne[2], i3 = c / (x.ne[1] * x.ne[2]);
    return static_cast<const char *>(x.data) + static_cast<size_t>(i1) * x.nb[1] + static_cast<size_t>(i2) * x.nb[2] +
           static_cast<size_t>(i3) * x.nb[3];
}

float * column_to(const ggml_tensor & out, int64_t c) {
    return const_cast<float *>(reinterpret_cast<const float *>(column_of(out, c)));
}

// Parts are given out in turn; the first ones by the threads' own numbers.
template <typename Work>
void for_parts(std::atomic<int64_t> & next_part, int64_t n_parts, int ith, int nth, const Work & work) {
    for (int64_t part = ith; part < n_parts; part = nth + next_part.fetch_add(1, std::memory_order_relaxed)) {
        work(part);
    }
}

// Rows of a part, for so many rows in all.
int64_t rows_of_part(size_t row_bytes, int64_t n_rows, int64_t n_columns, int nth) {
    const auto rows_in = [&](size_t n_bytes) { return static_cast<int64_t>(n_bytes / row_bytes) + 1; };
    const bool again = n_columns > static_cast<int64_t>(columns_at_once);
    const int64_t most = again ? rows_in(most_part_bytes) : n_rows;
    const int64_t rows = std::max(rows_in(least_part_bytes), std::min(most, n_rows / (nth * parts_per_thread)));
    return parts_in(rows, least_rows) * least_rows;
}

// The columns of a product, those of an expert together.
class Routes {
  public:
    // Of a network that has all columns.
    explicit Routes(int64_t n_columns) : n_used_(1), n_(static_cast<size_t>(n_columns)) {
        for (size_t i = 0; i < n_; ++i) {
            routes_[i] = {0, static_cast<int32_t>(i)};
        }
        first_[0] = 0;
        first_[1] = n_;
    }
    // expert_of(i) is the expert of column i, which has a route if it is wanted.
    template <typename ExpertOf, typename Wanted>
    Routes(int64_t n_columns, int64_t n_experts, const ExpertOf & expert_of, const Wanted & wanted) {
        for (int64_t i = 0; i < n_columns; ++i) {
            const int32_t expert = expert_of(i);
            GGML_ASSERT(expert >= 0 && expert < n_experts);
            if (wanted(expert)) {
                routes_[n_++] = {expert, static_cast<int32_t>(i)};
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
    int64_t n_used() const { return static_cast<int64_t>(n_used_); }
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
    size_t n_used_ = 0;
    size_t n_ = 0;
};

int32_t expert_in(const ggml_tensor & ids, int64_t column) {
    const int64_t k = column % ids.ne[0], t = column / ids.ne[0];
    return *reinterpret_cast<const int32_t *>(static_cast<const char *>(ids.data) + static_cast<size_t>(t) * ids.nb[1] +
                                              static_cast<size_t>(k) * ids.nb[0]);
}

// Of a token, the experts multiply the same column, or each one its own.
int64_t n_sharing(const ggml_tensor & x, const ggml_tensor & ids) {
    return x.ne[1] == 1 ? ids.ne[0] : 1;
}

// Columns of activations and where their products go, some at a time.
class Columns {
  public:
    void clear() { n_ = 0; }
    bool is_full() const { return n_ == columns_at_once; }
    size_t n() const { return n_; }
    float * out(size_t c) const { return out_[c]; }
    void add(const void * activations, float * out) {
        activations_[n_] = activations;
        out_[n_++] = out;
    }
    // With rows of weights, which are those from row `first` of the results on.
    void multiply(const Products & products, const ggml_tensor & weights, const char * rows, int64_t first,
                  int64_t n_rows) const {
        std::array<float *, columns_at_once> to;
        for (size_t c = 0; c < n_; ++c) {
            to[c] = out_[c] + first;
        }
        products.multiply({rows, weights.nb[1], n_rows, weights.ne[0], activations_.data(), to.data(),
                           static_cast<int64_t>(n_), prefetch_bytes()});
    }

  private:
    std::array<const void *, columns_at_once> activations_;
    std::array<float *, columns_at_once> out_;
    size_t n_ = 0;
};

const char * row_of(const ggml_tensor & weights, size_t expert, int64_t row) {
    return static_cast<const char *>(weights.data) + expert * weights.nb[2] + static_cast<size_t>(row) * weights.nb[1];
}

void multiply_all(Product & product, const ggml_tensor & out, int ith, int nth) {
    const ggml_tensor & weights = *product.weights;
    const int64_t n_rows = weights.ne[1], n_columns = ggml_nrows(&out);
    const int64_t rows = rows_of_part(weights.nb[1], n_rows, n_columns, nth);
    Columns columns;
    for_parts(product.next_part, parts_in(n_rows, rows), ith, nth, [&](int64_t part) {
        const int64_t first = part * rows;
        for (int64_t c = 0; c < n_columns;) {
            for (columns.clear(); c < n_columns && !columns.is_full(); ++c) {
                columns.add(product.x->ordered.column(c), column_to(out, c));
            }
            columns.multiply(*product.products, weights, row_of(weights, 0, first), first,
                             std::min(rows, n_rows - first));
        }
    });
}

void multiply_routed(Product & product, const ggml_tensor & out, int ith, int nth) {
    const ggml_tensor & weights = *product.weights;
    const Routes routes(
        ggml_nrows(&out), weights.ne[2], [&](int64_t c) { return expert_in(*product.ids, c); },
        [](int32_t) { return true; });
    const int64_t shared = n_sharing(*product.x->x, *product.ids);
    const int64_t n_used = routes.n_used(), n_rows = weights.ne[1];
    const int64_t rows = rows_of_part(weights.nb[1], n_rows * n_used, ggml_nrows(&out) / n_used, nth);
    const int64_t parts_of_expert = parts_in(n_rows, rows);
    Columns columns;
    for_parts(product.next_part, parts_of_expert * n_used, ith, nth, [&](int64_t part) {
        const auto used = static_cast<size_t>(part / parts_of_expert);
        const int64_t first = part % parts_of_expert * rows;
        const char * from = row_of(weights, routes.expert(used), first);
        for (size_t i = routes.begin(used); i < routes.end(used);) {
            for (columns.clear(); i < routes.end(used) && !columns.is_full(); ++i) {
                const int64_t column = routes.column(i);
                columns.add(product.x->ordered.column(column / shared), column_to(out, column));
            }
            columns.multiply(*product.products, weights, from, first, std::min(rows, n_rows - first));
        }
    });
}

// Results of a projection's rows from `first` on, each column's one after the other.
void project(const Projection & projection, size_t expert, int64_t first, int64_t n_rows, const Columns & columns) {
    const ggml_tensor & weights = *projection.node->src[0];
    const int64_t row = projection.first_row + first;
    columns.multiply(*projection.products, weights, row_of(weights, expert, row), 0, n_rows);
    if (projection.bias == nullptr) {
        return;
    }
    const char * of_expert = static_cast<const char *>(projection.bias->data) + expert * projection.bias->nb[1];
    const float * bias = reinterpret_cast<const float *>(of_expert) + row;
    for (size_t c = 0; c < columns.n(); ++c) {
        float * out = columns.out(c);
        std::transform(out, out + n_rows, bias, out, [](float y, float b) { return y + b; });
    }
}

// Rows of a part of the first projections: a group is a whole number of parts.
int64_t rows_of_group_part(size_t row_bytes, int64_t n_rows, int64_t n_columns, int nth) {
    const int64_t wanted = rows_of_part(row_bytes, n_rows, n_columns, nth);
    int64_t rows = least_rows;
    while (rows < wanted && rows < group_activations) {
        rows *= 2;
    }
    return rows;
}

// Whether experts may be on another device.
bool is_shared(const FeedForward & f) {
    return f.device != nullptr && f.is_of_one_token;
}

// Whether another device computes an expert of this token.
bool is_elsewhere(const FeedForward & f, int32_t expert) {
    return is_shared(f) && f.device->has(f.layer, expert);
}

// Of what the CPU computes.
template <typename ExpertOf>
Routes routes_of(const FeedForward & f, const ExpertOf & expert_of) {
    const int64_t n_columns = ggml_nrows(f.nodes.activated);
    if (f.nodes.ids == nullptr) {
        return Routes(n_columns);
    }
    return Routes(n_columns, f.nodes.down.node->src[0]->ne[2], expert_of,
                  [&](int32_t expert) { return !is_elsewhere(f, expert); });
}

void copy_routing(FeedForward & f) {
    const auto n_of_token = f.nodes.ids->ne[0];
    for (size_t i = 0; i < f.experts.size(); ++i) {
        const auto column = static_cast<int64_t>(i);
        f.experts[i] = expert_in(*f.nodes.ids, column);
        if (f.nodes.routing_weights != nullptr) {
            const ggml_tensor & w = *f.nodes.routing_weights;
            const auto k = static_cast<size_t>(column % n_of_token), t = static_cast<size_t>(column / n_of_token);
            f.routing_weights[i] =
                *reinterpret_cast<const float *>(static_cast<const char *>(w.data) + k * w.nb[1] + t * w.nb[2]);
        }
    }
}

void activate(FeedForward & f, int ith, int nth) {
    const FeedForwardNodes & nodes = f.nodes;
    const ggml_tensor & activated = *nodes.activated;
    const int64_t n_rows = activated.ne[0], n_columns = ggml_nrows(&activated);
    const Routes routes = routes_of(f, [&](int64_t column) { return expert_in(*nodes.ids, column); });
    const int64_t shared = nodes.ids != nullptr ? n_sharing(*f.x->x, *nodes.ids) : 1;
    const int64_t n_used = routes.n_used();
    if (n_used == 0) {
        return;
    }
    const bool is_gated = nodes.up.node != nullptr;
    const size_t row_bytes = nodes.gate.node->src[0]->nb[1] + (is_gated ? nodes.up.node->src[0]->nb[1] : 0);
    const int64_t rows = rows_of_group_part(row_bytes, n_rows * n_used, n_columns / n_used, nth);
    const int64_t parts_of_expert = parts_in(n_rows, rows), groups_of_expert = parts_in(n_rows, group_activations);
    alignas(64) std::array<std::array<float, static_cast<size_t>(group_activations)>, columns_at_once> of_gate, of_up;
    Columns gates, ups;
    for_parts(f.next_part, parts_of_expert * n_used, ith, nth, [&](int64_t part) {
        const auto used = static_cast<size_t>(part / parts_of_expert);
        const size_t expert = routes.expert(used);
        const int64_t first = part % parts_of_expert * rows, n_here = std::min(rows, n_rows - first);
        for (size_t i = routes.begin(used); i < routes.end(used); i += gates.n()) {
            gates.clear();
            ups.clear();
            for (size_t j = i; j < routes.end(used) && !gates.is_full(); ++j) {
                const void * x = f.x->ordered.column(routes.column(j) / shared);
                ups.add(x, of_up[gates.n()].data());
                gates.add(x, of_gate[gates.n()].data());
            }
            project(nodes.gate, expert, first, n_here, gates);
            if (is_gated) {
                project(nodes.up, expert, first, n_here, ups);
            }
            for (size_t c = 0; c < gates.n(); ++c) {
                f.activate({nodes.activation, nodes.alpha, nodes.limit, gates.out(c), is_gated ? ups.out(c) : nullptr,
                            n_here, column_to(activated, routes.column(i + c)) + first});
            }
        }
        const int64_t group = first / group_activations, first_of_group = group * group_activations;
        const int64_t n_of_group = std::min(group_activations, n_rows - first_of_group);
        std::atomic<int64_t> & done =
            f.parts_done[used * static_cast<size_t>(groups_of_expert) + static_cast<size_t>(group)];
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == parts_in(n_of_group, rows)) {
            for (size_t i = routes.begin(used); i < routes.end(used); ++i) {
                const int64_t column = routes.column(i);
                f.activated.write(column_to(activated, column) + first_of_group, n_of_group, column, first_of_group);
            }
        }
    });
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What another device has computed. The thread that asks first waits for the device, the others for that thread.
const float * results_of(FeedForward & f) {
    using Arrival = FeedForward::Arrival;
    auto found = Arrival::awaited;
    if (f.arrival.compare_exchange_strong(found, Arrival::claimed, std::memory_order_acq_rel)) {
        // Where the device fails, this thread leaves by an exception, and the others must not wait for ever.
        struct End {
            std::atomic<Arrival> & arrival;
            Arrival how = Arrival::failed;
            ~End() { arrival.store(how, std::memory_order_release); }
        } end{f.arrival};
        f.results = f.device->results();
        end.how = Arrival::arrived;
        return f.results;
    }
    while (found == Arrival::claimed) {
        leave_if_failed();  // without resting: a device takes as long as it takes
        relax();
        found = f.arrival.load(std::memory_order_acquire);
    }
    return found == Arrival::arrived ? f.results : nullptr;
}

// Results of a part, of all columns before they are summed.
constexpr int64_t most_unsummed = 8192;

void project_down(FeedForward & f, const ggml_tensor & out, int ith, int nth) {
    const FeedForwardNodes & nodes = f.nodes;
    const ggml_tensor & weights = *nodes.down.node->src[0];
    const int64_t n_rows = weights.ne[1], n_columns = ggml_nrows(nodes.activated);
    const auto expert_of = [&](int64_t column) { return f.experts[static_cast<size_t>(column)]; };
    const Routes routes = routes_of(f, expert_of);
    const auto n_used = static_cast<size_t>(routes.n_used());
    const int64_t most_rows = most_unsummed / n_columns / least_rows * least_rows;
    const int64_t rows = std::min(most_rows, rows_of_part(weights.nb[1] * std::max<size_t>(1, n_used), n_rows, 1, nth));
    const bool is_summed = nodes.n_summed > 0;
    const int64_t n_of_token = is_summed ? nodes.ids->ne[0] : 1;
    std::array<float, static_cast<size_t>(most_unsummed)> products;
    const auto products_of = [&](int64_t column) { return products.data() + column * rows; };
    Columns columns;
    for_parts(f.next_part_down, parts_in(n_rows, rows), ith, nth, [&](int64_t part) {
        const int64_t first = part * rows, n_here = std::min(rows, n_rows - first);
        for (size_t used = 0; used < n_used; ++used) {
            for (size_t i = routes.begin(used); i < routes.end(used);) {
                for (columns.clear(); i < routes.end(used) && !columns.is_full(); ++i) {
                    const int64_t column = routes.column(i);
                    columns.add(f.activated.column(column), products_of(column));
                }
                project(nodes.down, routes.expert(used), first, n_here, columns);
            }
        }
        const float * elsewhere = is_shared(f) ? results_of(f) : nullptr;
        if (is_shared(f) && elsewhere == nullptr) {
            return;  // the whole graph fails
        }
        for (int64_t column = 0; column < n_columns; ++column) {
            const int64_t k = column % n_of_token;
            float * y = products_of(column);
            if (elsewhere != nullptr && is_elsewhere(f, expert_of(column))) {
                std::copy_n(elsewhere + first, n_here, y);
                elsewhere += n_rows;
            }
            if (is_summed && k >= nodes.n_summed) {
                continue;
            }
            if (nodes.routing_weights != nullptr) {
                const float w = f.routing_weights[static_cast<size_t>(column)];
                std::transform(y, y + n_here, y, [w](float a) { return a * w; });
            }
            float * to = column_to(out, column / n_of_token) + first;
            if (k > 0) {
                std::transform(to, to + n_here, y, to, [](float a, float b) { return a + b; });
            } else {
                std::copy(y, y + n_here, to);
            }
        }
    });
}

}  // namespace

void Ordered::write(const float * x, int64_t n, int64_t c, int64_t first) const {
    alignas(64) std::array<char, part_activations * sizeof(float)> quantized;
    quantize(x, quantized.data(), n);
    products->order(quantized.data(), n, column(c) + products->ordered_bytes(first));
}

void start(Ordering & ordering) {
    ordering.next_part.store(0, std::memory_order_relaxed);
}

void start(Product & product) {
    product.next_part.store(0, std::memory_order_relaxed);
}

void prepare(FeedForward & f) {
    const FeedForwardNodes & nodes = f.nodes;
    const int64_t n_columns = ggml_nrows(nodes.activated);
    const int64_t most_used = nodes.ids != nullptr ? std::min(n_columns, nodes.down.node->src[0]->ne[2]) : 1;
    f.n_groups = static_cast<size_t>(most_used * parts_in(nodes.activated->ne[0], group_activations));
    f.parts_done = std::make_unique<std::atomic<int64_t>[]>(f.n_groups);
    if (nodes.ids != nullptr) {
        f.experts.resize(static_cast<size_t>(n_columns));
        f.routing_weights.resize(static_cast<size_t>(n_columns));
    }
}

void start(FeedForward & f) {
    f.next_part.store(0, std::memory_order_relaxed);
    f.next_part_down.store(0, std::memory_order_relaxed);
    f.arrival.store(FeedForward::Arrival::awaited, std::memory_order_relaxed);
    for (size_t i = 0; i < f.n_groups; ++i) {
        f.parts_done[i].store(0, std::memory_order_relaxed);
    }
}

void order_stage(ggml_tensor *, int ith, int nth, void * data) {
    before_stage();
    auto & ordering = *static_cast<Ordering *>(data);
    const ggml_tensor & x = *ordering.x;
    const int64_t parts_of_column = parts_in(x.ne[0], part_activations);
    for_parts(ordering.next_part, parts_of_column * ggml_nrows(&x), ith, nth, [&](int64_t part) {
        const int64_t c = part / parts_of_column, first = part % parts_of_column * part_activations;
        const int64_t n = std::min(part_activations, x.ne[0] - first);
        ordering.ordered.write(column_to(x, c) + first, n, c, first);
        if (ordering.copy != nullptr) {
            std::copy_n(column_to(x, c) + first, n, ordering.copy + first);
        }
    });
    after_stage();
}

void multiply_stage(ggml_tensor * out, int ith, int nth, void * data) {
    before_stage();
    auto & product = *static_cast<Product *>(data);
    (product.ids != nullptr ? multiply_routed : multiply_all)(product, *out, ith, nth);
    after_stage();
}

void activate_stage(ggml_tensor *, int ith, int nth, void * data) {
    before_stage();
    auto & f = *static_cast<FeedForward *>(data);
    if (ith == 0 && f.nodes.ids != nullptr) {
        copy_routing(f);
        if (f.device != nullptr) {
            const auto n_used = static_cast<size_t>(f.nodes.ids->ne[0]);
            f.device->note(f.layer, f.experts.data(), f.experts.size() / n_used, n_used);
            if (f.is_of_one_token) {
                f.device->launch(f.layer, f.experts.data(), n_used);
            }
        }
    }
    activate(f, ith, nth);
    after_stage();
}

void project_down_stage(ggml_tensor * out, int ith, int nth, void * data) {
    before_stage();
    project_down(*static_cast<FeedForward *>(data), *out, ith, nth);
    after_stage();
}

void record_stage(ggml_tensor *, int ith, int, void * data) {
    before_stage();
    if (ith == 0) {
        const auto & recording = *static_cast<const Recording *>(data);
        recording.recorder->note(recording.layer, *recording.ids);
    }
    after_stage();
}

#ifdef __SANITIZE_THREAD__
namespace {
char barrier;
}
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

}  // namespace overspill
