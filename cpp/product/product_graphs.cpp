#include "product/product_graphs.h"

#include "base/log.h"
#include "product/feed_forward.h"
#include "product/product_stages.h"

// Graphs and the parameters of custom operations are structs that only this header defines.
#include <ggml-impl.h>

#include <algorithm>
#include <deque>
#include <new>
#include <optional>
#include <string>
#include <vector>

namespace overspill {

namespace {

// The products that such a node can be computed with; null: llama.cpp's.
const Products * products_for(const ProductSet * set, const ggml_tensor & node) {
    if (set == nullptr || !is_product(node) || (node.flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return nullptr;
    }
    const ggml_tensor & weights = *node.src[0];
    const ggml_tensor & x = *node.src[1];
    const Products * products = set->find(weights.type);
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
    Graph(Quantize quantize, std::deque<Scratch> & scratch, ExpertDevice * device)
        : quantize_(quantize), device_(device), scratch_(scratch) {}

    void build(const ProductSet * set, ExpertRecorder * recorder, const ggml_cgraph & graph) {
        uid_ = 0;  // until it is complete
        recorder_ = recorder;
        recordings_.clear();
        orderings_.clear();
        products_.clear();
        feed_forwards_.clear();
        tensors_.clear();
        nodes_.clear();
        replacements_.clear();
        tally_ = {};
        for (Scratch & one : scratch_) {
            one.last_use = -1;
        }
        find_replacements(set, graph);
        auto replacement = replacements_.begin();
        for (int i = 0; i < graph.n_nodes; ++i) {
            const bool is_replaced = replacement != replacements_.end() && i >= replacement->first;
            for (int j = i; recorder != nullptr && j <= (is_replaced ? replacement->last : i); ++j) {
                record(*graph.nodes[j]);
            }
            if (!is_replaced) {
                nodes_.push_back(graph.nodes[i]);
                continue;
            }
            if (replacement->product != nullptr) {
                replace(*graph.nodes[i], *replacement->product, i);
            } else {
                replace(*replacement->feed_forward, i, replacement->last);
            }
            i = replacement++->last;
        }
        uid_ = graph.uid;
    }

    bool is_of(const ggml_cgraph & graph, const ExpertRecorder * recorder) const {
        return graph.uid != 0 && graph.uid == uid_ && recorder == recorder_;
    }

    ggml_cgraph * of(ggml_cgraph * graph) {
        if (replacements_.empty() && recordings_.empty()) {
            return graph;
        }
        std::for_each(orderings_.begin(), orderings_.end(), [](Ordering & one) { start(one); });
        std::for_each(products_.begin(), products_.end(), [](Product & one) { start(one); });
        std::for_each(feed_forwards_.begin(), feed_forwards_.end(), [](FeedForward & one) { start(one); });
        // With the counts of uses, by which the backend fuses operations.
        view_ = *graph;
        view_.nodes = nodes_.data();
        view_.n_nodes = static_cast<int>(nodes_.size());
        view_.size = view_.n_nodes;
        view_.grads = nullptr;
        view_.grad_accs = nullptr;
        return &view_;
    }

    const Tally & tally() const { return tally_; }

  private:
    // Nodes whose place something of ours takes, in their order: one product or a feed-forward.
    struct Replacement {
        int first, last;
        Product * product;
        FeedForward * feed_forward;
    };

    // Before the first product of a layer's experts: later, something else may be where their numbers were.
    void record(const ggml_tensor & node) {
        const int32_t layer = (node.flags & GGML_TENSOR_FLAG_COMPUTE) != 0 ? layer_of_experts(node) : -1;
        if (layer < 0 || ggml_is_empty(node.src[2]) || !is_in_ram(*node.src[2]) ||
            (!recordings_.empty() && recordings_.back().layer == static_cast<size_t>(layer))) {
            return;
        }
        const ggml_tensor & ids = *node.src[2];
        nodes_.push_back(custom(ids, record_stage,
                                &recordings_.emplace_back(Recording{recorder_, static_cast<size_t>(layer), &ids})));
    }

    void find_replacements(const ProductSet * set, const ggml_cgraph & graph) {
        const auto products_of = [&](int i) { return products_for(set, *graph.nodes[i]); };
        for (int i = 0; i < graph.n_nodes; ++i) {
            const ggml_tensor & node = *graph.nodes[i];
            const Products * products = products_of(i);
            if (products == nullptr) {
                tally_.n_left += node.op == GGML_OP_MUL_MAT_ID ? 1 : 0;
                continue;
            }
            const std::optional<FeedForwardNodes> around = ggml_nrows(&node) <= most_routes_of_feed_forward
                                                               ? feed_forward_around(graph, i, products_of)
                                                               : std::nullopt;
            const auto is_in_another = [&] {  // whose last product it takes for its first
                return !replacements_.empty() && replacements_.back().feed_forward != nullptr &&
                       replacements_.back().last >= around->first;
            };
            if (around && !is_in_another()) {
                while (!replacements_.empty() && replacements_.back().first >= around->first) {
                    count(*replacements_.back().product, -1);  // one of its first products
                    replacements_.pop_back();
                }
                note(*around, *set);
                i = around->last;
            } else {
                note(node, *products, i);
            }
        }
    }

    void note(const ggml_tensor & node, const Products & products, int i) {
        Product & product = products_.emplace_back();
        product.products = &products;
        product.weights = node.src[0];
        product.ids = node.op == GGML_OP_MUL_MAT_ID ? node.src[2] : nullptr;
        product.x = &ordering_of(node.src[1], products, i);
        replacements_.push_back({i, i, &product, nullptr});
        count(product, 1);
    }

    void count(const Product & product, int n) { (product.ids != nullptr ? tally_.n_routed : tally_.n_products) += n; }

    void note(const FeedForwardNodes & around, const ProductSet & set) {
        FeedForward & feed_forward = feed_forwards_.emplace_back();
        feed_forward.nodes = around;
        feed_forward.x = &ordering_of(around.gate.node->src[1], *around.gate.products, around.first);
        feed_forward.activated = ordered(*around.activated, *around.down.products);
        feed_forward.activate = set.activate;
        prepare(feed_forward);
        if (device_ != nullptr && around.ids != nullptr) {
            share(feed_forward);
        }
        replacements_.push_back({around.first, around.last, nullptr, &feed_forward});
        ++tally_.n_feed_forwards;
    }

    void share(FeedForward & f) const {
        f.layer = device_->layer_of(f.nodes);
        if (f.layer < 0) {
            return;
        }
        f.device = device_;
        f.is_of_one_token = f.nodes.ids->ne[1] == 1 && ggml_nrows(f.x->x) == 1;
        if (f.is_of_one_token) {
            f.x->copy = device_->input();
        }
    }

    Ordered ordered(const ggml_tensor & x, const Products & products) const {
        return {&products, quantize_(products.activations), products.ordered_bytes(x.ne[0])};
    }

    // The activations in order, which are needed until then.
    Ordering & ordering_of(const ggml_tensor * x, const Products & products, int i) {
        const auto same = [&](const Ordering & one) {
            return one.x == x && one.ordered.products->order == products.order;
        };
        auto known = std::find_if(orderings_.rbegin(), orderings_.rend(), same);
        if (known == orderings_.rend()) {
            Ordering & ordering = orderings_.emplace_back();
            ordering.x = x;
            ordering.ordered = ordered(*x, products);
            ordering.last_use = i;
            known = orderings_.rbegin();
        }
        known->last_use = std::max(known->last_use, i);
        return *known;
    }

    void order(Ordering & x, const ggml_tensor & node, int i) {
        if (x.ordered.scratch == nullptr) {
            take_scratch(x.ordered, ggml_nrows(x.x), i, x.last_use);
            nodes_.push_back(custom(node, order_stage, &x));
        }
    }

    // Puts a product's stages in place of its node.
    void replace(const ggml_tensor & node, Product & product, int i) {
        order(*product.x, node, i);
        nodes_.push_back(custom(node, multiply_stage, &product));
    }

    void replace(FeedForward & f, int first, int last) {
        order(*f.x, *f.nodes.activated, first);
        take_scratch(f.activated, ggml_nrows(f.nodes.activated), first, last);
        nodes_.push_back(custom(*f.nodes.activated, activate_stage, &f));
        nodes_.push_back(custom(*f.nodes.out, project_down_stage, &f));
    }

    void take_scratch(Ordered & ordered, int64_t n_columns, int first_use, int last_use) {
        const size_t n_bytes = ordered.column_bytes * static_cast<size_t>(n_columns);
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
        ordered.scratch = &*one;
    }

    // A node with the same result that calls the function with the data.
    ggml_tensor * custom(const ggml_tensor & node, ggml_custom_op_t function, void * data) {
        ggml_tensor & tensor = tensors_.emplace_back(node);
        tensor.op = GGML_OP_CUSTOM;
        tensor.flags |= GGML_TENSOR_FLAG_COMPUTE;  // ids may come from another device
        std::fill(std::begin(tensor.src), std::end(tensor.src), nullptr);
        const ggml_custom_op_params params = {function, GGML_N_TASKS_MAX, data};
        ggml_set_op_params(&tensor, &params, sizeof(params));
        return &tensor;
    }

    const Quantize quantize_;
    ExpertDevice * const device_;
    uint64_t uid_ = 0;
    // Lists whose elements stay where they are.
    std::deque<Ordering> orderings_;
    std::deque<Product> products_;
    std::deque<FeedForward> feed_forwards_;
    std::deque<Recording> recordings_;
    ExpertRecorder * recorder_ = nullptr;
    std::deque<ggml_tensor> tensors_;
    std::deque<Scratch> & scratch_;  // of all graphs: one is computed at a time
    std::vector<Replacement> replacements_;
    std::vector<ggml_tensor *> nodes_;
    Tally tally_;
    ggml_cgraph view_ = {};
};

ProductGraphs::ProductGraphs(const ProductSet * set, Quantize quantize)
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
        known = std::make_unique<Graph>(quantize_, scratch_->all, device_);
    }
    if (!known->is_of(*graph, recorder_)) {
        known->build(set_, recorder_, *graph);
        log(known->tally());
    }
    ggml_cgraph * replaced = known->of(graph);
    after_stage();
    return replaced;
}

// Once for all graphs that are alike: tokens make new ones all the time.
void ProductGraphs::log(const Tally & tally) {
    constexpr size_t most = 16;
    if (set_ == nullptr || logged_.size() == most ||
        std::find(logged_.begin(), logged_.end(), tally) != logged_.end()) {
        return;
    }
    logged_.push_back(tally);
    add_to_log(LogLevel::debug, std::string("products of weights in RAM by ") + set_->name + ": " +
                                    std::to_string(tally.n_feed_forwards) + " whole feed-forwards, " +
                                    std::to_string(tally.n_products) + " others; of experts apart " +
                                    std::to_string(tally.n_routed) + ", by llama.cpp " + std::to_string(tally.n_left));
}

}  // namespace overspill
