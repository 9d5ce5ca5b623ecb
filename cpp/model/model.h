// A loaded model, and the contexts that are decoded with.
#pragma once

#include "base/process.h"
#include "device/pinned_weights.h"
#include "device/rpc.h"
#include "model/context.h"
#include "model/memory_report.h"
#include "model/model_options.h"
#include "model/turns.h"

#include <llama.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace overspill {

// What uses a model's contexts, and ends when the model is closed.
class ModelUser {
  public:
    virtual ~ModelUser() = default;
    // Ends it. From any thread.
    virtual void end_with_model() = 0;
};

// What belongs to a model and is made by those above it.
class ModelPart {
  public:
    virtual ~ModelPart() = default;
    // Frees its memory when the model is closed, after the streams have ended.
    virtual void end_with_model() = 0;
};

class Model {
  public:
    // Throws ModelLoadError, CancelledError, Error, or std::invalid_argument.
    Model(const std::string & path, ModelOptions options);
    ~Model();
    Model(const Model &) = delete;
    Model & operator=(const Model &) = delete;

    // Ends the open streams and frees the memory. Afterwards everything but close(), closed() and
    // pinned() throws ClosedError.
    void close();
    bool closed() const;

    // llama.cpp's own, which lives as long as it is held. Throws ClosedError, or UnusableError.
    std::shared_ptr<llama_model> loaded() const;
    // The same of its vocabulary. Throws Error if the model has no tokenizer.
    std::shared_ptr<const llama_vocab> tokenizer() const;
    // What the file's metadata says of a number or string; empty if it has no such key.
    std::string metadata(const std::string & key) const;
    int32_t n_vocab() const { return n_vocab_; }
    uint32_t n_ctx() const { return options_.n_ctx; }  // 0 if it cannot generate
    // Streams that have a place in the context at the same time; 0: one, and more are made as they come.
    uint32_t n_parallel() const { return options_.n_parallel; }
    // How long a prompt that is read may hold up other streams.
    double max_pause_s() const { return options_.max_pause_s; }
    // For sequences that lose their places.
    size_t prompt_cache_bytes() const { return options_.prompt_cache_bytes; }
    int32_t n_threads() const { return options_.n_threads; }
    // Of the context that is kept for streams; empty if it cannot generate.
    const MemoryReport & memory() const { return memory_; }

    // What of the weights in RAM is registered with a GPU's driver by now. From any thread.
    PinnedMemory pinned() const { return pinned_->state(); }

    // Null if it has none, or is closed.
    std::shared_ptr<ExpertCache> expert_cache() const;
    // What was resident there when the model was closed; empty before.
    ExpertProfile expert_profile() const;

    // Throws std::invalid_argument, naming `argument`.
    void check_token(const std::string & argument, int32_t token) const;
    // The same of each, of which there must be one at least.
    void check_tokens(const std::string & argument, const std::vector<int32_t> & tokens) const;

    // --- for those who decode -------------------------------------------------------------

    // Held for every step: contexts share the thread pool and the devices.
    Turns & turns() { return turns_; }
    // Throws ClosedError, UnusableError, or Error if the model cannot generate text.
    void check_generates() const;
    // The one that decodes its streams, made by the first of them.
    std::shared_ptr<ModelPart> engine(const std::function<std::shared_ptr<ModelPart>()> & make);
    // The context for streams; not cleared, it may hold what streams before have decoded.
    std::shared_ptr<Context> take_context();
    // One that gives so many rows of logits per batch, and is not kept for reuse.
    std::shared_ptr<Context> make_context(uint32_t n_outputs);
    // One for several sequences of at most n_ctx tokens each, with a row of logits for each of them. Throws
    // OutOfMemoryError where a device has less memory than it takes.
    std::shared_ptr<Context> make_batch_context(uint32_t n_sequences, uint32_t n_ctx);
    // One whose nodes are asked after; see ContextOptions.
    std::shared_ptr<Context> make_timed_context(ggml_backend_sched_eval_callback on_node, void * data);
    // Keeps it for the next stream, or returns it.
    std::shared_ptr<Context> give_back(std::shared_ptr<Context> context);
    // To be ended when the model is closed. Throws ClosedError.
    void add(const std::shared_ptr<ModelUser> & user);

  private:
    void prepare_to_generate();
    void pin_weights();
    ContextOptions context_options(uint32_t n_outputs, std::shared_ptr<const RpcServers> servers) const;
    // Of the context that is made first.
    uint32_t usual_sequences() const { return options_.n_parallel == 0 ? 1 : options_.n_parallel; }
    ContextOptions stream_options(std::shared_ptr<const RpcServers> servers) const;
    std::shared_ptr<Context> make_context(const ContextOptions & options);

    std::string name_;
    ModelOptions options_;
    int32_t n_vocab_ = 0;
    uint32_t long_from_ = 0;       // as in ContextOptions
    std::string cannot_generate_;  // why not; empty if it can
    MemoryReport memory_;
    const std::shared_ptr<PinnedWeights> pinned_;  // undone by the model's deleter

    const Origin origin_;
    mutable std::mutex mutex_;                   // guards what follows; not held during native work
    std::shared_ptr<const RpcServers> servers_;  // held by the model's deleter, too
    std::shared_ptr<llama_model> model_;
    std::shared_ptr<ThreadPool> threads_;
    std::shared_ptr<ExpertCache> experts_;
    ExpertProfile profile_;
    // One is kept for the next stream, since making one takes long for a large model.
    std::shared_ptr<Context> idle_;
    std::vector<std::weak_ptr<ModelUser>> users_;
    std::shared_ptr<ModelPart> engine_;

    Turns turns_{"the model"};
};

}  // namespace overspill
