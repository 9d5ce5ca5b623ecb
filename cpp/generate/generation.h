// The loop: one token per step, from the prompt to the reason it ends.
#pragma once

#include "base/interrupt.h"
#include "base/process.h"
#include "generate/engine.h"
#include "generate/generation_options.h"
#include "generate/generation_stats.h"
#include "generate/look_ahead.h"
#include "generate/participant.h"
#include "generate/step.h"
#include "model/model.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace overspill {

class Generation : public ModelUser {
  public:
    // Throws std::invalid_argument, ContextFullError if the prompt does not fit, ClosedError, Error.
    static std::shared_ptr<Generation> start(std::shared_ptr<Model> model, std::vector<int32_t> prompt,
                                             GenerationOptions options);
    ~Generation() override;
    Generation(const Generation &) = delete;
    Generation & operator=(const Generation &) = delete;

    // The next token; none when the generation has ended. Throws CancelledError if `poll`
    // stopped it, Error, or what the chooser threw; each ends it.
    std::optional<Token> next(const Interrupt::Poll & poll);

    // Ends it, after the step that runs, which is cancelled. Idempotent; but "interrupted"
    // replaces "closed", since who leaves a loop because of a signal closes first.
    void close(StopReason reason);
    void end_with_model() override { close(StopReason::closed); }

    // What the KV cache had of prompt and reply when it ended, if it was to be kept; null if it was not, after an
    // error, and the second time. Throws what saving it threw.
    std::shared_ptr<const SequenceState> take_state();

    GenerationStats stats() const;

  private:
    Generation(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options);
    Step step(const Interrupt::Poll & poll);
    Token deliver(Step step, double caller_s);
    void finish(StopReason reason);
    int64_t page_faults() const;

    std::shared_ptr<Model> model_;
    std::shared_ptr<Engine> engine_;
    std::shared_ptr<Participant> part_;
    bool has_ended_ = false;
    bool first_ = true;
    bool looks_ahead_;
    std::chrono::steady_clock::time_point returned_at_{};

    Turns step_{"the stream"};  // held during a step
    std::atomic<bool> closing_{false};
    const Origin origin_;
    mutable std::mutex stats_mutex_;
    GenerationStats stats_;
    int64_t n_page_faults_before_ = 0;  // the first token
    std::exception_ptr not_saved_;

    LookAhead ahead_;
};

}  // namespace overspill
