// Decoding by hand: tokens in, logits out, with a context of its own.
#pragma once

#include "base/interrupt.h"
#include "model/context.h"
#include "model/model.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace overspill {

// Rows of logits. They stay readable as long as their owner is held, and are those of the decode in question until the
// next one.
struct LogitsView {
    std::shared_ptr<void> owner;
    float * logits = nullptr;
    size_t n_rows = 0;
    size_t n_vocab = 0;
};

class Evaluation {
  public:
    explicit Evaluation(std::shared_ptr<Model> model) : model_(std::move(model)) {}

    // Decodes tokens after those before. The logits after the last, or with `all` after each.
    // A batch with more rows than before needs another buffer: throws ViewsInUseError if views
    // of the present one are held.
    // Also throws std::invalid_argument, CancelledError, ContextFullError, ClosedError, Error; then the tokens
    // before are still there, but the logits are gone.
    LogitsView eval(const std::vector<int32_t> & tokens, bool all, const Interrupt::Poll & poll);

    // Forgets all tokens.
    void reset();

  private:
    float * decode(const std::vector<int32_t> & tokens, size_t from, bool all, const Interrupt::Poll & poll);

    std::shared_ptr<Model> model_;
    Turns step_{"the model's eval()"};  // held during a step
    std::shared_ptr<Context> context_;
    std::vector<int32_t> tokens_;  // all that were decoded
};

}  // namespace overspill
