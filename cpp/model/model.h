// A loaded model: its vocabulary, and the contexts that streams decode with.
#pragma once

#include "model/context.h"
#include "model/placement.h"
#include "sample/grammar.h"
#include "text/chat_template.h"

#include <llama.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace overspill {

class BatchGeneration;
class Generation;

struct ModelOptions {
    Placement placement = {};
    uint32_t n_ctx = 0;          // tokens; 0: what the model was trained for, at most 8192
    uint32_t n_batch = 512;      // 1 to 65536
    uint32_t n_ubatch = 0;       // tokens that are computed at once, 1 to n_batch; 0: n_batch
    int32_t n_threads = 1;       // 1 to 512
    std::string type_k = "f16";  // of the KV cache's keys: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl
    std::string type_v = "f16";  // of its values; quantized ones need flash attention
    std::string flash_attention = "auto";  // auto, on, off
    std::string load_mode = "mmap";        // mmap, read, mlock, mmap+mlock, direct-io
    // Weights on the CPU in the order that its matrix products like best: auto (not beside a GPU, which reads them for
    // large batches), on, off.
    std::string repack = "auto";
    bool vocab_only = false;
    bool check_tensors = false;
    // Only find out how much memory it would take: nothing is loaded, and it cannot generate.
    bool dry_run = false;
    // Given the share that is loaded, 0 to 1; false cancels. Called on the loading thread, must not throw.
    std::function<bool(float)> progress = {};
};

// A lock that is served in the order of asking, so that a stream in a tight loop does not
// starve the others. Asking twice on one thread throws Error, where a mutex would wait for
// ever: a signal handler may run in the middle of a step.
class Turns {
  public:
    // Throws CancelledError if it is cancelled before its turn has come; null waits as long as it takes.
    void lock(const Interrupt * interrupt = nullptr);
    void unlock();
    bool held_here() const { return owner_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }

  private:
    std::mutex mutex_;
    std::condition_variable next_;
    uint64_t n_asked_ = 0;
    std::vector<uint64_t> waiting_;  // tickets, the first served next; few, and its memory is kept
    bool taken_ = false;
    std::atomic<std::thread::id> owner_{};
};

// A turn that is waited for, and given up when the step is cancelled: whoever cancels it may be the one who has
// the turn now.
class Turn {
  public:
    Turn(Turns & turns, const Interrupt & interrupt) : turns_(turns) { turns_.lock(&interrupt); }
    ~Turn() { turns_.unlock(); }
    Turn(const Turn &) = delete;
    Turn & operator=(const Turn &) = delete;

  private:
    Turns & turns_;
};

// Appends a token's bytes, which need not be whole characters. Special tokens have none unless
// `special` is set, which gives their name. `token` must be in the vocabulary.
void append_token_bytes(const llama_vocab & vocab, int32_t token, bool special, std::string & bytes);

class Model {
  public:
    // Throws ModelLoadError, CancelledError, Error, or std::invalid_argument.
    Model(const std::string & path, ModelOptions options);
    ~Model();
    Model(const Model &) = delete;
    Model & operator=(const Model &) = delete;

    // Ends the open streams and frees the memory. Afterwards everything but close() and
    // closed() throws ClosedError.
    void close();
    bool closed() const;

    // --- vocabulary: from any thread -----------------------------------------------------

    std::vector<int32_t> tokenize(std::string_view text, bool add_special, bool parse_special) const;
    std::string detokenize(const std::vector<int32_t> & tokens, bool skip_special) const;
    std::string token_bytes(int32_t token, bool special) const;
    std::map<std::string, int32_t> special_tokens() const;
    // What the file's metadata says of a number or string; empty if it has no such key.
    std::string metadata(const std::string & key) const;
    bool is_end_of_generation(int32_t token) const;
    int32_t n_vocab() const { return n_vocab_; }
    uint32_t n_ctx() const { return options_.n_ctx; }  // 0 if it cannot generate
    uint32_t n_ctx_train() const { return n_ctx_train_; }
    int32_t n_threads() const { return options_.n_threads; }
    // Of the context that is kept for streams; empty if it cannot generate.
    const MemoryReport & memory() const { return memory_; }

    // The token sequences that DRY takes for breakers: every way in which a token can end, or begin, with
    // one of these texts, followed by the tokens of the rest of it. Takes long for large vocabularies.
    std::vector<std::vector<int32_t>> dry_breakers(const std::vector<std::string> & texts) const;
    std::unique_ptr<Grammar> grammar(const std::string & gbnf, const Grammar::Start & start) const;
    // The model's own, or one in Jinja. Throws Error if there is none, or it has mistakes.
    std::unique_ptr<ChatTemplate> chat_template(const std::string & source) const;
    bool has_chat_template() const;

    // Throws std::invalid_argument, naming `argument`.
    void check_token(const std::string & argument, int32_t token) const;

    // --- for Generation ------------------------------------------------------------------

    // Held for every step: contexts share the thread pool and the devices.
    Turns & turns() { return turns_; }
    // A context for one stream; not cleared, it may hold what the stream before has decoded. Throws Error if the
    // model cannot generate text.
    std::shared_ptr<Context> take_context(bool clear);
    // One that gives so many rows of logits per batch, and is not kept for reuse.
    std::shared_ptr<Context> make_context(uint32_t n_outputs);
    // One for several sequences of at most n_ctx tokens each, with a row of logits for each of them.
    std::shared_ptr<Context> make_batch_context(uint32_t n_sequences, uint32_t n_ctx);
    // One whose nodes are asked after; see ContextOptions.
    std::shared_ptr<Context> make_timed_context(ggml_backend_sched_eval_callback on_node, void * data);
    void give_back(std::shared_ptr<Context> context);
    void add(const std::shared_ptr<Generation> & generation);
    void add(const std::shared_ptr<BatchGeneration> & batch);

  private:
    std::shared_ptr<llama_model> loaded() const;                     // throws ClosedError
    const llama_vocab & tokenizer(const llama_model & model) const;  // throws Error if there is none
    void prepare_to_generate();
    template <typename Open>
    void add_to(std::vector<std::weak_ptr<Open>> & all, const std::shared_ptr<Open> & one);  // throws ClosedError
    ContextOptions context_options(uint32_t n_outputs, std::shared_ptr<const RpcServers> servers) const;
    std::shared_ptr<Context> make_context(const ContextOptions & options);

    std::string name_;
    ModelOptions options_;
    int32_t n_vocab_ = 0;
    uint32_t n_ctx_train_ = 0;
    std::string cannot_generate_;  // why not; empty if it can
    MemoryReport memory_;

    mutable std::mutex mutex_;                   // guards what follows; not held during native work
    std::shared_ptr<const RpcServers> servers_;  // held by the model's deleter, too
    std::shared_ptr<llama_model> model_;
    std::shared_ptr<ggml_threadpool> threadpool_;
    // One is kept for the next stream, since making one takes long for a large model.
    std::shared_ptr<Context> idle_;
    std::vector<std::weak_ptr<Generation>> generations_;
    std::vector<std::weak_ptr<BatchGeneration>> batches_;

    Turns turns_;
};

}  // namespace overspill
