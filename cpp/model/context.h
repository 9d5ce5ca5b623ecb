// A KV cache of one sequence of tokens or several, and the decoding of tokens into it.
#pragma once

#include "base/interrupt.h"
#include "device/expert_cache.h"
#include "device/pinned_weights.h"
#include "device/rpc.h"
#include "device/thread_pool.h"
#include "model/breakdown.h"
#include "model/memory_report.h"
#include "model/sequence_state.h"
#include "product/expert_recorder.h"
#include "product/product_graphs.h"

#include <llama.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace overspill {

struct ContextOptions {
    uint32_t n_ctx;     // tokens of each sequence, over 0
    uint32_t n_batch;   // tokens of a prompt per batch
    uint32_t n_ubatch;  // of which so many are computed at once
    int32_t n_threads;
    ggml_type type_k;  // of the KV cache
    ggml_type type_v;
    llama_flash_attn_type flash_attention;
    uint32_t n_outputs = 1;  // rows of logits that one batch may give, at most n_batch; memory is reserved for all
    uint32_t n_sequences = 1;
    bool dry_run = false;                            // of a model that was not loaded: can only report its memory
    std::shared_ptr<const RpcServers> servers = {};  // those of the model
    int32_t offload_min_batch = 0;                   // as in ModelOptions
    const ProductSet * products = nullptr;           // null: the CPU computes llama.cpp's
    bool can_be_freed_half_done = true;              // after an assertion has failed in it
    std::shared_ptr<ExpertCache> experts = {};       // the model's, if it has one
    uint32_t long_from = 0;                          // keys are rotated otherwise in contexts of more tokens; 0: never
    // Asked before and after nodes of the graph: a synchronisation per piece of it, for diagnosis alone.
    ggml_backend_sched_eval_callback on_node = nullptr;
    void * on_node_data = nullptr;
};

struct BatchToken {
    int32_t token;
    uint32_t sequence;
    bool wants_logits;
};

class Context {
  public:
    // Throws OutOfMemoryError or Error. Keeps the model and the threads alive.
    Context(std::shared_ptr<llama_model> model, std::shared_ptr<ThreadPool> threads, const ContextOptions & options);
    ~Context();
    Context(const Context &) = delete;
    Context & operator=(const Context &) = delete;

    // False for models that have no memory of what they decoded, such as encoders and diffusion models.
    bool can_continue_text() const;

    // Forgets a sequence.
    void clear(uint32_t sequence);

    // Keeps of what was decoded of a sequence the longest beginning that it has in common with `tokens`, less than all
    // of them, forgets the rest, and returns how many tokens it has kept. That may be none, for memories that cannot go
    // back.
    size_t keep(uint32_t sequence, const std::vector<int32_t> & tokens);
    // Of memories that cannot go far back (sliding windows, recurrent layers), remembers the present, for keep().
    void remember(uint32_t sequence);
    // Whether it has such a memory.
    bool needs_to_remember() const { return partial_memory_; }

    // What it knows of a sequence; nothing that is decoded later changes that. Throws Error.
    std::shared_ptr<SequenceState> save(uint32_t sequence) const;
    // In place of what is there. Throws ContextFullError, or Error where the cache is of another form; then the
    // sequence is empty.
    void restore(uint32_t sequence, const SequenceState & saved);
    // How many of the tokens of a saved sequence, or of one that is there, can be kept for a prompt.
    size_t n_kept_of(const SequenceState & saved, const std::vector<int32_t> & prompt) const;
    size_t n_kept_of(uint32_t sequence, const std::vector<int32_t> & prompt) const;
    // Whether a saved sequence that is restored here can go back to its first n tokens.
    bool goes_back(const SequenceState & saved, size_t n) const { return saved.n_kept(n, form_, window()) == n; }
    // Bytes that saving it takes.
    size_t state_bytes(uint32_t sequence) const;
    // Whether a prompt may begin with it: it was kept or restored for one.
    bool may_come_back(uint32_t sequence) const { return sequences_[sequence].may_come_back; }

    // Forgets the tokens in [from, to) and moves the later ones up; false if the memory cannot do that.
    bool can_drop() const;
    bool drop(uint32_t sequence, uint32_t from, uint32_t to);

    // Decodes at most n_batch tokens after those before, of the first sequence, and returns the logits after the last
    // one: n_vocab floats; or, if `all` is set, a row after each of at most n_outputs tokens. They
    // may be written to, and stay where they are as long as the context lives; the next decode
    // overwrites them.
    // Throws CancelledError if interrupted, ContextFullError, UnusableError, or Error. Then the tokens before are still
    // there, or the sequence is empty.
    float * decode(const int32_t * tokens, uint32_t n, Interrupt & interrupt, const Interrupt::Poll & poll,
                   bool all = false, Breakdown * times = nullptr);
    // The same for tokens of several sequences, each after those before of its own, at most n_batch; those of one
    // sequence follow each other. logits_of() has their logits until the next decode.
    void decode(const std::vector<BatchToken> & tokens, Interrupt & interrupt, const Interrupt::Poll & poll,
                Breakdown & times);
    // Of a token that wanted them, by its place in the batch.
    float * logits_of(size_t place);

    // From the next decode on, writes down which experts the CPU computes for its tokens, which are of one sequence;
    // null: no longer. Not during a decode.
    void record_experts(std::shared_ptr<ExpertRecorder> recorder);

    MemoryReport memory() const;
    // Weights that are mapped from the file and multiplied from there, or copied to where they are.
    std::vector<MappedTensor> mapped_weights() const;
    // Pieces of the graph of one token, each on one device.
    int32_t n_graph_splits() const { return n_splits_; }

    // Those of the CPU, for whoever has the model's turn.
    std::shared_ptr<const ThreadPool> threads() const { return threads_; }
    uint32_t n_ctx() const { return n_ctx_; }
    uint32_t n_batch() const { return n_batch_; }
    uint32_t n_outputs() const { return n_outputs_; }
    uint32_t n_sequences() const { return static_cast<uint32_t>(sequences_.size()); }
    // What is in the KV cache of a sequence.
    const std::vector<int32_t> & decoded(uint32_t sequence) const { return sequences_[sequence].tokens; }
    // When tokens of a sequence were decoded the last time, as the number of that decode in this process; 0: never.
    uint64_t used_at(uint32_t sequence) const { return sequences_[sequence].used_at; }

  private:
    struct Decoded {
        std::vector<int32_t> tokens = {};
        bool is_incomplete = false;            // a decode failed, and may have left something behind
        size_t n_remembered = 0;               // tokens that had been decoded then
        std::vector<uint8_t> remembered = {};  // the state of windows and recurrent layers
        uint64_t used_at = 0;
        bool may_come_back = false;
    };
    class Asking;
    template <typename Work>
    auto guarded(Work && work) const;
    size_t go_back(uint32_t sequence, size_t n);
    size_t window() const;
    bool has_before(uint32_t sequence, size_t n) const;
    void add(const BatchToken & token);
    void restore_after_failure() noexcept;
    void decode_batch(Interrupt & interrupt, const Interrupt::Poll & poll, Breakdown * times);
    void compute_with(int32_t n_threads);
    struct Deleter {
        void operator()(llama_context * context) const { llama_free(context); }
    };

    std::shared_ptr<const RpcServers> servers_;
    std::shared_ptr<ExpertRecorder> recorder_;
    std::unique_ptr<ProductGraphs> products_;
    std::shared_ptr<llama_model> model_;
    std::shared_ptr<ThreadPool> threads_;
    std::shared_ptr<ExpertCache> experts_;
    std::unique_ptr<llama_context, Deleter> context_;  // after what it needs, so that it goes first
    uint32_t n_ctx_;
    uint32_t n_batch_;
    uint32_t n_outputs_;
    uint32_t n_ubatch_;
    bool dry_run_;
    int32_t offload_min_batch_;
    bool can_be_freed_half_done_;
    int32_t n_splits_ = 0;
    int32_t n_threads_;  // that compute what is decoded, as llama.cpp was last told
    CacheForm form_;
    bool partial_memory_;
    std::vector<Decoded> sequences_;
    struct BatchDeleter {
        void operator()(llama_batch * batch) const {
            llama_batch_free(*batch);
            delete batch;
        }
    };
    std::unique_ptr<llama_batch, BatchDeleter> batch_;
    // Set during a decode only, for the callback.
    Interrupt * interrupt_ = nullptr;
    const Interrupt::Poll * poll_ = nullptr;
};

}  // namespace overspill
