#include "product/feed_forward.h"

#include <ggml-backend.h>
// How often a node of a graph is used is in structs that only this header defines.
#include <ggml-impl.h>

#include <algorithm>
#include <vector>

namespace overspill {

namespace {

ggml_backend_buffer_t buffer_of(const ggml_tensor & tensor) {
    return tensor.view_src != nullptr ? tensor.view_src->buffer : tensor.buffer;
}

const ggml_tensor * ids_of(const ggml_tensor & product) {
    return product.op == GGML_OP_MUL_MAT_ID ? product.src[2] : nullptr;
}

// Whether a node adds a bias to what a product gave.
bool adds_bias(const ggml_tensor & node, const ggml_tensor & to, const ggml_tensor * ids) {
    if (node.op != (ids != nullptr ? GGML_OP_ADD_ID : GGML_OP_ADD) || node.src[0] != &to ||
        (ids != nullptr && node.src[2] != ids)) {
        return false;
    }
    const ggml_tensor & bias = *node.src[1];
    return bias.op == GGML_OP_NONE && bias.type == GGML_TYPE_F32 && bias.nb[0] == sizeof(float) &&
           bias.ne[0] == to.ne[0] && ggml_nrows(&bias) == (ids != nullptr ? to.src[0]->ne[2] : 1) &&
           are_weights_in_ram(bias);
}

class Matcher {
  public:
    Matcher(const ggml_cgraph & graph, int down, const std::function<const Products *(int)> & products)
        : graph_(graph), down_(down), products_(products) {}

    std::optional<FeedForwardNodes> match() {
        const ggml_tensor & down = node(down_);
        found_.ids = ids_of(down);
        found_.first = found_.last = down_;
        found_.down = {&down, nullptr, 0, products_(down_)};
        note(&down);
        if (!match_activation(*down.src[1]) || !find_first() || !have_same_input()) {
            return std::nullopt;
        }
        match_end();
        if (!is_closed()) {
            return std::nullopt;
        }
        found_.out = &node(found_.last);
        return found_;
    }

  private:
    const ggml_tensor & node(int i) const { return *graph_.nodes[i]; }

    bool match_activation(const ggml_tensor & activated) {
        found_.activated = &activated;
        if (activated.type != GGML_TYPE_F32 || !ggml_is_contiguous(&activated)) {
            return false;
        }
        note(&activated);
        if (activated.op == GGML_OP_GLU) {
            return match_gated(activated);
        }
        const ggml_tensor * unary = &activated;
        found_.activation = Activation::relu;
        if (activated.op == GGML_OP_SQR) {
            unary = activated.src[0];
            note(unary);
            found_.activation = Activation::relu_squared;
        }
        if (unary->op != GGML_OP_UNARY) {
            return false;
        }
        const ggml_unary_op op = ggml_get_unary_op(unary);
        if (op == GGML_UNARY_OP_SILU && unary == &activated) {
            found_.activation = Activation::silu;
        } else if (op == GGML_UNARY_OP_GELU && unary == &activated) {
            found_.activation = Activation::gelu;
        } else if (op != GGML_UNARY_OP_RELU) {
            return false;
        }
        return match_projection(*unary->src[0], activated.ne[0], found_.gate);
    }

    bool match_gated(const ggml_tensor & activated) {
        switch (ggml_get_glu_op(&activated)) {
            case GGML_GLU_OP_REGLU: found_.activation = Activation::relu; break;
            case GGML_GLU_OP_GEGLU: found_.activation = Activation::gelu; break;
            case GGML_GLU_OP_SWIGLU: found_.activation = Activation::silu; break;
            case GGML_GLU_OP_SWIGLU_OAI: found_.activation = Activation::oai; break;
            case GGML_GLU_OP_SWIGLU_CLAMP: found_.activation = Activation::clamped_silu; break;
            default: return false;
        }
        found_.alpha = ggml_get_op_params_f32(&activated, 2);
        found_.limit = ggml_get_op_params_f32(&activated, 3);
        const int64_t n = activated.ne[0];
        if (activated.src[1] != nullptr) {
            return match_projection(*activated.src[0], n, found_.gate) &&
                   match_projection(*activated.src[1], n, found_.up);
        }
        // Both in one product, the gate first unless they are swapped.
        if (!match_projection(*activated.src[0], 2 * n, found_.gate)) {
            return false;
        }
        found_.up = found_.gate;
        (ggml_get_op_params_i32(&activated, 1) != 0 ? found_.gate : found_.up).first_row += n;
        return true;
    }

    // A product, its bias, and a part of their rows.
    bool match_projection(const ggml_tensor & result, int64_t n_rows, Projection & projection) {
        const ggml_tensor * of = &result;
        if (of->op == GGML_OP_VIEW) {
            const ggml_tensor * whole = of->src[0];
            for (int i = 1; i < GGML_MAX_DIMS; ++i) {
                if (of->ne[i] != whole->ne[i] || of->nb[i] != whole->nb[i]) {
                    return false;
                }
            }
            if (of->nb[0] != sizeof(float) || of->view_src != whole) {
                return false;
            }
            projection.first_row = static_cast<int64_t>(of->view_offs / sizeof(float));
            of = whole;
        }
        if (result.ne[0] != n_rows || projection.first_row + n_rows > of->ne[0]) {
            return false;
        }
        note(of);
        if (!is_product(*of)) {
            const ggml_tensor * product = of->src[0];
            if (product == nullptr || !is_product(*product) || !adds_bias(*of, *product, found_.ids)) {
                return false;
            }
            projection.bias = of->src[1];
            of = product;
            note(of);
        }
        projection.node = of;
        return ids_of(*of) == found_.ids;
    }

    void note(const ggml_tensor * computed) {
        if (std::find(computed_.begin(), computed_.end(), computed) == computed_.end()) {
            computed_.push_back(computed);
        }
    }

    // All that is noted must come right before the last product.
    bool find_first() {
        size_t n_left = computed_.size() - 1;
        for (int i = down_ - 1; n_left > 0; --i) {
            if (i < 0) {
                return false;
            }
            const ggml_tensor & one = node(i);
            if (ggml_op_is_empty(one.op)) {
                continue;
            }
            if (std::find(computed_.begin(), computed_.end(), &one) == computed_.end() ||
                (one.flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
                return false;
            }
            for (Projection * projection : {&found_.gate, &found_.up}) {
                if (projection->node == &one) {
                    projection->products = products_(i);
                }
            }
            found_.first = i;
            --n_left;
        }
        return true;
    }

    bool have_same_input() const {
        const Projection &gate = found_.gate, &up = found_.up;
        const auto has_all_experts = [this](const Projection & projection) {
            return projection.node->src[0]->ne[2] == found_.down.node->src[0]->ne[2];
        };
        return found_.down.products != nullptr && gate.products != nullptr && has_all_experts(gate) &&
               (up.node == nullptr ||
                (up.products != nullptr && has_all_experts(up) && up.node->src[1] == gate.node->src[1] &&
                 up.products->order == gate.products->order && ggml_are_same_shape(up.node, gate.node)));
    }

    // The next node that something is computed for, from one after `i` on; -1: none.
    int next_after(int i) const {
        do {
            ++i;
        } while (i < graph_.n_nodes && ggml_op_is_empty(node(i).op));
        return i < graph_.n_nodes && (node(i).flags & GGML_TENSOR_FLAG_COMPUTE) != 0 ? i : -1;
    }

    // As much of what follows as there is: a bias, the routing weights, the sum.
    void match_end() {
        int next = next_after(found_.last);
        if (next >= 0 && adds_bias(node(next), node(found_.last), found_.ids)) {
            found_.down.bias = node(next).src[1];
            found_.last = next;
            next = next_after(next);
        }
        if (found_.ids == nullptr) {
            return;
        }
        const ggml_tensor & unweighted = node(found_.last);
        if (next >= 0 && node(next).op == GGML_OP_MUL && node(next).src[0] == &unweighted) {
            const ggml_tensor & weights = *node(next).src[1];
            if (weights.type == GGML_TYPE_F32 && weights.ne[0] == 1 && weights.ne[1] == unweighted.ne[1] &&
                weights.ne[2] == unweighted.ne[2] && weights.ne[3] == 1) {
                found_.routing_weights = &weights;
                found_.last = next;
            }
        }
        match_sum();
    }

    static bool is_slot(const ggml_tensor & view, const ggml_tensor & of, int64_t slot) {
        return view.op == GGML_OP_VIEW && view.src[0] == &of && view.ne[0] == of.ne[0] && view.ne[1] == of.ne[2] &&
               view.ne[2] == 1 && view.ne[3] == 1 && view.nb[0] == of.nb[0] && view.nb[1] == of.nb[2] &&
               view.view_offs == static_cast<size_t>(slot) * of.nb[1];
    }

    // All experts of a token, in turn, or none. In the warm-up there are more than are summed.
    void match_sum() {
        const ggml_tensor & experts = node(found_.last);
        const ggml_tensor * sum = nullptr;
        int last = found_.last;
        int64_t n = 1;
        for (int next = next_after(last); next >= 0 && n < experts.ne[1]; next = next_after(next)) {
            const ggml_tensor & add = node(next);
            if (add.op != GGML_OP_ADD || !is_slot(*add.src[1], experts, n) ||
                !(sum == nullptr ? is_slot(*add.src[0], experts, 0) : add.src[0] == sum)) {
                break;
            }
            sum = &add;
            last = next;
            ++n;
        }
        if (n > 1) {
            found_.n_summed = n;
            found_.last = last;
        }
    }

    // Whether what is computed before the last node is read within, and by nobody else.
    bool is_closed() const {
        std::vector<int32_t> n_uses(static_cast<size_t>(found_.last - found_.first), 0);
        for (int i = found_.first; i <= found_.last; ++i) {
            for (const ggml_tensor * source : node(i).src) {
                for (int j = found_.first; source != nullptr && j < i; ++j) {
                    n_uses[static_cast<size_t>(j - found_.first)] += source == &node(j) ? 1 : 0;
                }
            }
        }
        for (int i = found_.first; i < found_.last; ++i) {
            const int32_t n = n_uses[static_cast<size_t>(i - found_.first)];
            if ((node(i).flags & GGML_TENSOR_FLAG_OUTPUT) != 0 || n != ggml_node_get_use_count(&graph_, i)) {
                return false;
            }
        }
        return true;
    }

    const ggml_cgraph & graph_;
    const int down_;
    const std::function<const Products *(int)> & products_;
    FeedForwardNodes found_ = {};
    std::vector<const ggml_tensor *> computed_;  // before and with the last product
};

}  // namespace

std::optional<FeedForwardNodes> feed_forward_around(const ggml_cgraph & graph, int down,
                                                    const std::function<const Products *(int node)> & products) {
    return Matcher(graph, down, products).match();
}

bool is_product(const ggml_tensor & node) {
    return node.op == GGML_OP_MUL_MAT || node.op == GGML_OP_MUL_MAT_ID;
}

bool is_in_ram(const ggml_tensor & tensor) {
    ggml_backend_buffer_t buffer = buffer_of(tensor);
    return buffer != nullptr && ggml_backend_buffer_is_host(buffer);
}

bool are_weights_in_ram(const ggml_tensor & tensor) {
    return is_in_ram(tensor) && ggml_backend_buffer_get_usage(buffer_of(tensor)) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

}  // namespace overspill
