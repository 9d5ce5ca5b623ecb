// A KV cache, and the decoding of tokens into it.
#pragma once

#include "placement.h"
#include "rpc.h"

#include <llama.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace overspill {

// What can stop a step: a flag that any thread sets, and a question asked now and then on the
// deciding thread (Python's: has a signal come?).
class Interrupt {
  public:
    // Ends the step that runs, and every later one. From any thread.
    void cancel() noexcept { cancelled_.store(true, std::memory_order_relaxed); }
    bool cancelled() const noexcept { return cancelled_.load(std::memory_order_relaxed); }

    // Asked at most every 50 ms during a step, on the thread that decodes; true ends the step.
    // Must not throw: it is called from within llama.cpp.
    using Poll = std::function<bool()>;

    // llama.cpp asks this before every operation of a graph on the CPU.
    bool should_stop(const Poll & poll);

  private:
    std::atomic<bool> cancelled_{false};
    unsigned n_asked_ = 0;
    std::chrono::steady_clock::time_point asked_at_{};
};

struct ContextOptions {
    uint32_t n_ctx;     // tokens, over 0
    uint32_t n_batch;   // tokens of a prompt per batch
    uint32_t n_ubatch;  // of which so many are computed at once
    int32_t n_threads;
    ggml_type type_k;  // of the KV cache
    ggml_type type_v;
    llama_flash_attn_type flash_attention;
    uint32_t n_outputs = 1;  // rows of logits that one batch may give, at most n_batch; memory is reserved for all
    bool dry_run = false;    // of a model that was not loaded: can only report its memory
    std::shared_ptr<const RpcServers> servers = {};  // those of the model
};

class Context {
  public:
    // Throws OutOfMemoryError or Error. Keeps the model and the threads alive.
    Context(std::shared_ptr<llama_model> model, std::shared_ptr<ggml_threadpool> threadpool,
            const ContextOptions & options);

    // False for models that have no memory of what they decoded, such as encoders and diffusion models.
    bool can_continue_text() const;

    // Forgets everything that was decoded.
    void clear();

    // Decodes at most n_batch tokens after those before, and returns the logits after the last
    // one: n_vocab floats; or, if `all` is set, a row after each of at most n_outputs tokens. They
    // may be written to, and stay where they are as long as the context lives; the next decode
    // overwrites them.
    // Throws CancelledError if interrupted, ContextFullError, or Error.
    float * decode(const int32_t * tokens, uint32_t n, Interrupt & interrupt, const Interrupt::Poll & poll,
                   bool all = false);
    // How often that was called: logits are those of the latest time.
    uint64_t n_decodes() const { return n_decodes_.load(std::memory_order_relaxed); }

    MemoryReport memory() const;

    const llama_model & model() const { return *model_; }
    uint32_t n_ctx() const { return n_ctx_; }
    uint32_t n_batch() const { return n_batch_; }
    uint32_t n_outputs() const { return n_outputs_; }
    uint32_t n_decoded() const { return n_decoded_; }

  private:
    struct Deleter {
        void operator()(llama_context * context) const { llama_free(context); }
    };

    std::shared_ptr<const RpcServers> servers_;
    std::shared_ptr<llama_model> model_;
    std::shared_ptr<ggml_threadpool> threadpool_;
    std::unique_ptr<llama_context, Deleter> context_;  // after what it needs, so that it goes first
    uint32_t n_ctx_;
    uint32_t n_batch_;
    uint32_t n_outputs_;
    uint32_t n_ubatch_;
    bool dry_run_;
    int32_t n_splits_ = 0;
    uint32_t n_decoded_ = 0;
    std::atomic<uint64_t> n_decodes_{0};
    std::vector<int8_t> wanted_;  // kept for its memory
    // Set during a decode only, for the callback.
    Interrupt * interrupt_ = nullptr;
    const Interrupt::Poll * poll_ = nullptr;
};

}  // namespace overspill
