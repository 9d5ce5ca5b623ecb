#include "generate/evaluation.h"

#include "base/error.h"

#include <algorithm>
#include <limits>
#include <string>

namespace overspill {

float * Evaluation::decode(const std::vector<int32_t> & tokens, size_t from, bool all, const Interrupt::Poll & poll) {
    Interrupt interrupt;
    float * logits = nullptr;
    while (from < tokens.size()) {
        const auto n = static_cast<uint32_t>(std::min<size_t>(context_->n_batch(), tokens.size() - from));
        const std::lock_guard turn(model_->turns());
        if (poll && poll()) {
            throw CancelledError("interrupted");
        }
        logits = context_->decode(tokens.data() + from, n, interrupt, poll, all);
        from += n;
    }
    return logits;
}

LogitsView Evaluation::eval(const std::vector<int32_t> & tokens, bool all, const Interrupt::Poll & poll) {
    if (tokens.empty()) {
        throw std::invalid_argument("tokens must not be empty");
    }
    model_->check_tokens("tokens", tokens);
    if (model_->closed()) {
        throw ClosedError("the model is closed");
    }
    const std::lock_guard lock(step_);
    if (tokens_.size() + tokens.size() > model_->n_ctx()) {
        throw ContextFullError(std::to_string(tokens_.size()) + " tokens and " + std::to_string(tokens.size()) +
                               " more do not fit into the context of " + std::to_string(model_->n_ctx()) +
                               "; call reset(), or load the model with a larger n_ctx");
    }
    const auto n_rows = all ? static_cast<uint32_t>(tokens.size()) : 1;
    if (!context_ || n_rows > context_->n_outputs()) {
        if (context_ && context_.use_count() > 1) {
            throw ViewsInUseError("logits of " + std::to_string(n_rows) +
                                  " positions need a larger buffer, but arrays from eval() or model.logits are still "
                                  "in use; delete them, or keep copies instead");
        }
        context_.reset();  // its memory first
        context_ = model_->make_context(n_rows);
        try {
            decode(tokens_, 0, false, poll);
        } catch (...) {
            context_.reset();
            throw;
        }
    }
    try {
        float * logits = decode(tokens, 0, all, poll);
        tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
        return {context_, logits, n_rows, static_cast<size_t>(model_->n_vocab())};
    } catch (...) {
        // Of a batch that did not end, the KV cache may hold any part: the next call makes another.
        context_.reset();
        throw;
    }
}

void Evaluation::reset() {
    const std::lock_guard lock(step_);
    tokens_.clear();
    if (context_) {
        context_->clear(0);
    }
}

}  // namespace overspill
