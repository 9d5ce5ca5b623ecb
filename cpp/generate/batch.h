// Many prompts at once: their sequences are decoded together, and one that ends makes room for the next.
#pragma once

#include "base/interrupt.h"
#include "generate/generation_stats.h"
#include "generate/sequence.h"
#include "model/model.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace overspill {

struct BatchRequest {
    std::vector<int32_t> prompt;
    GenerationOptions options;
};

struct BatchOutcome {
    size_t request = 0;  // which
    std::vector<Token> tokens = {};
    GenerationStats stats = {};
};

class BatchGeneration : public ModelUser {
  public:
    // At most n_parallel of them at a time, n_ctx tokens each. Throws std::invalid_argument, ContextFullError if a
    // prompt does not fit, ClosedError, OutOfMemoryError, Error.
    static std::shared_ptr<BatchGeneration> start(std::shared_ptr<Model> model, std::vector<BatchRequest> requests,
                                                  uint32_t n_parallel, uint32_t n_ctx);

    // The next reply that ends; none when all have. Throws CancelledError if `poll` stopped it, Error, or what a
    // chooser threw; each ends it.
    std::optional<BatchOutcome> next(const Interrupt::Poll & poll);

    // Ends it, after the step that runs, which is cancelled. Idempotent.
    void close();
    void end_with_model() override { close(); }

  private:
    struct Slot {
        std::unique_ptr<Sequence> sequence;
        BatchOutcome outcome;
        size_t n_decoded = 0;
        size_t place = 0;  // in the batch, of the token whose logits are wanted
        bool wants_logits = false;
    };
    BatchGeneration(std::shared_ptr<Model> model, std::vector<BatchRequest> requests, uint32_t n_parallel,
                    uint32_t n_ctx);
    void fill_slots();
    void step(const Interrupt::Poll & poll);

    std::shared_ptr<Model> model_;
    std::shared_ptr<Context> context_;  // empty once it has ended
    uint32_t n_ctx_;
    std::deque<std::pair<size_t, std::unique_ptr<Sequence>>> waiting_;
    std::vector<std::optional<Slot>> slots_;
    std::deque<BatchOutcome> ended_;
    std::vector<BatchToken> batch_;
    Interrupt interrupt_;
    Turns step_{"the batch"};  // held during a step
};

}  // namespace overspill
