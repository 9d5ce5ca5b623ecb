// Which experts each layer used, written down where the CPU computes them.
#pragma once

#include "product/expert_replays.h"

#include <ggml.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace overspill {

// The number of the layer whose experts a product multiplies with, by the name of their weights; -1: none.
int32_t layer_of_experts(const ggml_tensor & product);

// A ring of tokens, each with the experts of all layers. One thread at a time decodes, and another one may read
// meanwhile; neither waits for the other.
//
// It belongs to one sequence: the tokens are those of a stream, in order. Of a batch that the ring has no room for,
// none is recorded.
class ExpertRecorder {
  public:
    // For `n_tokens` tokens that have not been read yet. Throws std::invalid_argument if a number is 0, n_used is over
    // 1024 or n_layers over 65536.
    ExpertRecorder(size_t n_layers, size_t n_used, size_t n_tokens);
    ExpertRecorder(const ExpertRecorder &) = delete;
    ExpertRecorder & operator=(const ExpertRecorder &) = delete;

    // --- who decodes

    // A batch begins, whose tokens are computed in pieces of n_ubatch.
    void start(size_t n_tokens, size_t n_ubatch);
    // A layer's experts (of a token, tokens) are known. Fewer tokens than the piece has are the batch's last ones: in
    // the last layer only those are computed whose logits are wanted.
    void note(size_t layer, const ggml_tensor & ids);
    // The batch has ended; it counts if it was computed.
    void finish(bool computed);

    // --- who reads

    size_t n_layers() const { return n_layers_; }
    size_t n_used() const { return n_used_; }
    // Tokens that can be read.
    size_t n_readable() const;
    // Moves so many of the oldest, at most n_readable(), to `ids`: (n, n_layers, n_used), with unknown_expert where a
    // layer was not computed here.
    void read(uint16_t * ids, size_t n);
    // Tokens that there was no room for.
    uint64_t n_lost() const { return n_lost_.load(std::memory_order_relaxed); }

  private:
    uint16_t * row(uint64_t token) { return ids_.data() + token % capacity_ * n_layers_ * n_used_; }
    bool is_noted(size_t layer, const ggml_tensor & ids, size_t first);

    const size_t n_layers_, n_used_, capacity_;
    std::vector<uint16_t> ids_;
    // Of all tokens ever; the difference is what can be read.
    std::atomic<uint64_t> n_written_{0}, n_read_{0};
    std::atomic<uint64_t> n_lost_{0};
    // Of the batch.
    bool is_recording_ = false;
    size_t n_tokens_ = 0, n_ubatch_ = 0;
    size_t first_of_piece_ = 0;
    size_t last_layer_ = 0;
    bool has_layer_ = false;  // in this batch
};

}  // namespace overspill
