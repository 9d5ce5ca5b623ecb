// The loop: one token per step, from the prompt to the reason it ends.
#pragma once

#include "context.h"
#include "sampler.h"
#include "utf8_buffer.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace overspill {

class Model;

enum class StopReason { none, eos, stop_string, max_tokens, context_full, closed, interrupted, error };
const char * stop_reason_name(StopReason reason);     // "eos", "stop_string", ...
StopReason stop_reason_of(const std::string & name);  // throws std::invalid_argument

struct GenerationOptions {
    SamplingOptions sampling;
    int64_t max_tokens = -1;             // -1: until the model or the context ends
    std::vector<std::string> stop = {};  // not empty strings
    bool logprobs = false;               // fill in Token::logprob
};

struct Token {
    int32_t id;
    std::string text;  // whole characters; what came before may have waited for this token
    std::optional<float> logprob;
};

struct GenerationStats {
    size_t n_prompt_tokens = 0;
    int64_t n_tokens = 0;
    double prefill_s = 0;
    double decode_s = 0;
    std::optional<double> time_to_first_token_s;
    StopReason stop_reason = StopReason::none;
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

class Generation : public std::enable_shared_from_this<Generation> {
  public:
    // Throws std::invalid_argument, ContextFullError if the prompt does not fit, ClosedError, Error.
    static std::shared_ptr<Generation> start(std::shared_ptr<Model> model, std::vector<int32_t> prompt,
                                             GenerationOptions options);
    ~Generation();
    Generation(const Generation &) = delete;
    Generation & operator=(const Generation &) = delete;

    // The next token; none when the generation has ended. Throws CancelledError if `poll`
    // stopped it, or Error; both end it.
    std::optional<Token> next(const Interrupt::Poll & poll);

    // Ends it, after the step that runs in another thread, which is cancelled. Idempotent; but
    // "interrupted" replaces "closed", since who leaves a loop because of a signal closes first.
    void close(StopReason reason);

    GenerationStats stats() const;

  private:
    Generation(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options);
    const float * prefill(const Interrupt::Poll & poll);
    Token take_token(const float * logits);
    void finish(StopReason reason);

    std::shared_ptr<Model> model_;
    std::vector<int32_t> prompt_;
    GenerationOptions options_;
    std::unique_ptr<Context> context_;  // empty once it has ended
    Sampler sampler_;
    Utf8Buffer characters_;
    StopStrings stops_;
    std::string bytes_;        // of one token, kept for its memory
    int32_t last_token_ = -1;  // sampled, not decoded yet
    Interrupt interrupt_;

    std::mutex step_;  // held during a step
    std::atomic<std::thread::id> stepping_{};
    mutable std::mutex stats_mutex_;
    GenerationStats stats_;
};

}  // namespace overspill
