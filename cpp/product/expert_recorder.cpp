#include "product/expert_recorder.h"

#include "base/check_range.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace overspill {

namespace {

uint16_t expert_in(const ggml_tensor & ids, size_t k, size_t token) {
    const int32_t id =
        *reinterpret_cast<const int32_t *>(static_cast<const char *>(ids.data) + token * ids.nb[1] + k * ids.nb[0]);
    return id < 0 || id >= unknown_expert ? unknown_expert : static_cast<uint16_t>(id);
}

}  // namespace

int32_t layer_of_experts(const ggml_tensor & product) {
    constexpr const char * prefix = "blk.";
    const char * name = product.src[0]->name;
    if (product.op != GGML_OP_MUL_MAT_ID || std::strncmp(name, prefix, std::strlen(prefix)) != 0 ||
        std::strstr(name, "_exps") == nullptr) {
        return -1;
    }
    char * end = nullptr;
    const long layer = std::strtol(name + std::strlen(prefix), &end, 10);
    return *end == '.' && layer >= 0 && layer <= std::numeric_limits<uint16_t>::max() ? static_cast<int32_t>(layer)
                                                                                      : -1;
}

ExpertRecorder::ExpertRecorder(size_t n_layers, size_t n_used, size_t n_tokens)
    : n_layers_(n_layers), n_used_(n_used), capacity_(n_tokens) {
    constexpr size_t most_layers = 65536, most_used = 1024, most_tokens = size_t{1} << 31;
    check_range<size_t>("n_layers", n_layers, 1, most_layers);
    check_range<size_t>("n_used", n_used, 1, most_used);
    check_range<size_t>("n_tokens", n_tokens, 1, most_tokens);
    ids_.resize(n_layers * n_used * n_tokens);
}

void ExpertRecorder::start(size_t n_tokens, size_t n_ubatch) {
    const uint64_t written = n_written_.load(std::memory_order_relaxed);
    is_recording_ = n_tokens <= capacity_ - (written - n_read_.load(std::memory_order_acquire));
    if (!is_recording_) {
        n_lost_.fetch_add(n_tokens, std::memory_order_relaxed);
        return;
    }
    n_tokens_ = n_tokens;
    n_ubatch_ = std::max<size_t>(1, n_ubatch);
    first_of_piece_ = 0;
    has_layer_ = false;
    for (size_t i = 0; i < n_tokens; ++i) {
        std::fill_n(row(written + i), n_layers_ * n_used_, unknown_expert);
    }
}

void ExpertRecorder::note(size_t layer, const ggml_tensor & ids) {
    if (!is_recording_ || layer >= n_layers_) {
        return;
    }
    const auto n = static_cast<size_t>(ids.ne[1]);
    const auto first_in = [&] {
        const size_t n_of_piece = std::min(n_ubatch_, n_tokens_ - first_of_piece_);
        return n < n_of_piece ? n_tokens_ - n : first_of_piece_;
    };
    // Layers are computed in order, so one that does not come later is the next piece's; unless it is the same once
    // more, where only some of its products are computed here.
    if (has_layer_ && layer <= last_layer_ && !(layer == last_layer_ && is_noted(layer, ids, first_in()))) {
        first_of_piece_ = std::min(first_of_piece_ + n_ubatch_, n_tokens_);
    }
    has_layer_ = true;
    last_layer_ = layer;
    const size_t first = first_in();
    if (n > n_tokens_ - first) {
        return;
    }
    const uint64_t written = n_written_.load(std::memory_order_relaxed);
    const size_t n_used = std::min(n_used_, static_cast<size_t>(ids.ne[0]));
    for (size_t i = 0; i < n; ++i) {
        uint16_t * to = row(written + first + i) + layer * n_used_;
        for (size_t k = 0; k < n_used; ++k) {
            to[k] = expert_in(ids, k, i);
        }
    }
}

bool ExpertRecorder::is_noted(size_t layer, const ggml_tensor & ids, size_t first) {
    const auto n = static_cast<size_t>(ids.ne[1]);
    const uint64_t written = n_written_.load(std::memory_order_relaxed);
    const size_t n_used = std::min(n_used_, static_cast<size_t>(ids.ne[0]));
    for (size_t i = 0; i < n && first + i < n_tokens_; ++i) {
        const uint16_t * known = row(written + first + i) + layer * n_used_;
        for (size_t k = 0; k < n_used; ++k) {
            if (known[k] != expert_in(ids, k, i)) {
                return false;
            }
        }
    }
    return true;
}

void ExpertRecorder::finish(bool computed) {
    if (is_recording_ && computed) {
        n_written_.fetch_add(n_tokens_, std::memory_order_release);
    }
    is_recording_ = false;
}

size_t ExpertRecorder::n_readable() const {
    return static_cast<size_t>(n_written_.load(std::memory_order_acquire) - n_read_.load(std::memory_order_relaxed));
}

void ExpertRecorder::read(uint16_t * ids, size_t n) {
    const uint64_t first = n_read_.load(std::memory_order_relaxed);
    const size_t n_of_token = n_layers_ * n_used_;
    n = std::min(n, n_readable());
    for (size_t i = 0; i < n; ++i) {
        std::copy_n(row(first + i), n_of_token, ids + i * n_of_token);
    }
    n_read_.store(first + n, std::memory_order_release);
}

}  // namespace overspill
