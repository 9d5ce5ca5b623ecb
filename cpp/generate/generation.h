// The loop: one token per step, from the prompt to the reason it ends.
#pragma once

#include "base/utf8_buffer.h"
#include "model/context.h"
#include "sample/grammar.h"
#include "sample/sampler.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace overspill {

class Model;

enum class StopReason { none, eos, stop_string, max_tokens, context_full, closed, interrupted, error };
const char * stop_reason_name(StopReason reason);     // "eos", "stop_string", ...
StopReason stop_reason_of(const std::string & name);  // throws std::invalid_argument

// What a chooser is shown: the logits of the step, which it may write to, and all tokens so far.
// Both stay where they are as long as their owner is held.
struct ChooserView {
    float * logits;
    const std::shared_ptr<Context> & context;
    const std::shared_ptr<std::vector<int32_t>> & tokens;
};
// Returns the token to take, or none to leave it to the sampler.
using Chooser = std::function<std::optional<int32_t>(const ChooserView & view)>;

struct GenerationOptions {
    std::shared_ptr<Sampler> sampler = {};  // whoever else holds it sees its state move; none: the default options
    int64_t max_tokens = -1;                // -1: until the model or the context ends
    std::vector<std::string> stop = {};     // not empty strings
    int32_t n_logprobs = -1;  // -1: none; 0: fill in Token::logprob; n: and the n most likely, at most 1000
    std::shared_ptr<Constraint> constraint = {};
    Chooser choose = {};
    bool keep_logits = false;         // fill in Token::logits
    bool look_ahead = true;           // work on the next token while the caller is busy with this one
    bool reuse = false;               // do not decode again what the stream before has in common with the prompt
    std::vector<int32_t> named = {};  // special tokens whose names are part of the text
    // When the context is full: spans [from, to) of the prompt's tokens that may be dropped, in their order, one each
    // time.
    std::vector<std::pair<uint32_t, uint32_t>> droppable = {};
};

struct Token {
    int32_t id = -1;
    std::string text = {};  // whole characters; what came before may have waited for this token
    std::optional<float> logprob = {};
    std::vector<std::pair<int32_t, float>> top_logprobs = {};
    std::shared_ptr<Context> context = {};  // of the logits, if they are kept
    float * logits = nullptr;
    uint64_t n_decodes = 0;  // what the context's is as long as the logits are this token's
};

struct GenerationStats {
    size_t n_prompt_tokens = 0;
    size_t n_cached_tokens = 0;   // of the prompt, not decoded again
    size_t n_dropped_tokens = 0;  // to make room
    int64_t n_tokens = 0;
    double prefill_s = 0;
    double decode_s = 0;
    std::optional<double> time_to_first_token_s;
    StopReason stop_reason = StopReason::none;
    Breakdown breakdown = {};  // of decode_s, and of the caller's time meanwhile
};

// Holds text back while it may be the beginning of a stop string.
class StopStrings {
  public:
    explicit StopStrings(std::vector<std::string> stops);

    // Takes new text and returns what may go out; true in `found` if a stop string came up,
    // which cuts the text off there.
    std::string push(std::string text, bool & found);
    std::string flush();

  private:
    std::vector<std::string> stops_;
    std::string held_;
};

// A prompt and the reply to it, as far as it has come: what turns logits into tokens and tokens into text.
class Sequence {
  public:
    // Throws std::invalid_argument. Keeps the model alive.
    Sequence(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options);

    // Before the first token, so that penalties count the prompt.
    void accept_prompt();
    // Takes the next token and says whether it is the last. `is_full` if no token has room after this one.
    StopReason choose(float * logits, const std::shared_ptr<Context> & context, bool is_full, Token & token,
                      Breakdown & times);
    // Lets go of what was asked of Python.
    void release();
    // Forgets tokens of the prompt.
    void drop(uint32_t from, uint32_t to);

    const std::vector<int32_t> & tokens() const { return *tokens_; }
    size_t n_prompt() const { return n_prompt_; }
    GenerationOptions & options() { return options_; }
    // It never moves then, so that a chooser can look at it from Python.
    void reserve(size_t n) { tokens_->reserve(n); }

  private:
    int32_t choose_id(float * logits, const std::shared_ptr<Context> & context, Token & token, Breakdown & times);
    bool is_named(int32_t token) const;

    std::shared_ptr<Model> model_;
    std::shared_ptr<std::vector<int32_t>> tokens_;  // prompt and reply
    size_t n_prompt_;
    GenerationOptions options_;
    Utf8Buffer characters_;
    StopStrings stops_;
    std::string bytes_;  // of one token, kept for its memory
    Logprobs logprobs_;  // the same
};

class Generation : public std::enable_shared_from_this<Generation> {
  public:
    // Throws std::invalid_argument, ContextFullError if the prompt does not fit, ClosedError, Error.
    static std::shared_ptr<Generation> start(std::shared_ptr<Model> model, std::vector<int32_t> prompt,
                                             GenerationOptions options);
    ~Generation();
    Generation(const Generation &) = delete;
    Generation & operator=(const Generation &) = delete;

    // The next token; none when the generation has ended. Throws CancelledError if `poll`
    // stopped it, Error, or what the chooser threw; each ends it.
    std::optional<Token> next(const Interrupt::Poll & poll);

    // Ends it, after the step that runs, which is cancelled. Idempotent; but "interrupted"
    // replaces "closed", since who leaves a loop because of a signal closes first.
    void close(StopReason reason);

    GenerationStats stats() const;

  private:
    // What a step came to. It counts once the caller has it.
    struct Step {
        Token token = {};
        StopReason reason = StopReason::none;
        size_t n_cached = 0;
        size_t n_dropped = 0;
        double prefill_s = 0;
        double seconds = 0;
        Breakdown times = {};
    };

    Generation(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options);
    Step step(const Interrupt::Poll & poll);
    float * prefill(const Interrupt::Poll & poll, size_t & n_cached);
    size_t make_room();
    Token deliver(Step step, double caller_s);
    void finish(StopReason reason);
    int64_t page_faults() const;

    void start_ahead();
    Step take_ahead(const Interrupt::Poll & poll);
    void work_ahead();
    void stop_ahead();

    std::shared_ptr<Model> model_;
    Sequence sequence_;
    std::shared_ptr<Context> context_;  // empty once it has ended
    Interrupt interrupt_;
    bool first_ = true;
    std::chrono::steady_clock::time_point returned_at_{};

    std::mutex step_;  // held during a step
    std::atomic<std::thread::id> stepping_{};
    std::atomic<bool> closing_{false};
    mutable std::mutex stats_mutex_;
    GenerationStats stats_;
    int64_t n_page_faults_before_ = 0;  // the first token

    // The step ahead, and the thread that takes it; started when it is first of use.
    enum class Ahead { idle, wanted, done, over };
    bool is_ahead_ = false;  // whether one was started and not taken; changed during a step only
    std::thread ahead_thread_;
    std::mutex ahead_mutex_;  // guards what follows
    std::condition_variable ahead_changed_;
    Ahead ahead_ = Ahead::idle;
    Step ahead_step_;
    std::exception_ptr ahead_error_;
};

}  // namespace overspill
