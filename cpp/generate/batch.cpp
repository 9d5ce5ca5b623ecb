#include "generate/batch.h"

#include "base/check_range.h"
#include "base/error.h"
#include "base/process.h"
#include "base/stopwatch.h"

#include <algorithm>
#include <string>
#include <utility>

namespace overspill {

std::shared_ptr<BatchGeneration> BatchGeneration::start(std::shared_ptr<Model> model,
                                                        std::vector<BatchRequest> requests, uint32_t n_parallel,
                                                        uint32_t n_ctx) {
    const auto batch = left_alone_by_forks(
        std::unique_ptr<BatchGeneration>(new BatchGeneration(model, std::move(requests), n_parallel, n_ctx)));
    model->add(batch);
    return batch;
}

BatchGeneration::BatchGeneration(std::shared_ptr<Model> model, std::vector<BatchRequest> requests, uint32_t n_parallel,
                                 uint32_t n_ctx)
    : model_(std::move(model)), n_ctx_(n_ctx) {
    check_range("n_ctx", n_ctx, uint32_t{1}, model_->n_ctx());
    constexpr uint32_t most_sequences = 256;  // llama.cpp's LLAMA_MAX_SEQ
    check_range("parallel", n_parallel, uint32_t{1}, most_sequences);
    for (size_t i = 0; i < requests.size(); ++i) {
        auto & [prompt, options] = requests[i];
        if (prompt.size() > n_ctx) {
            throw ContextFullError("prompt " + std::to_string(i) + " has " + std::to_string(prompt.size()) +
                                   " tokens, but the context holds " + std::to_string(n_ctx));
        }
        options.reuse = false;
        options.form.droppable.clear();
        options.keep_logits = false;
        waiting_.emplace_back(i, std::make_unique<Sequence>(model_, std::move(prompt), std::move(options)));
        waiting_.back().second->reserve(size_t{n_ctx} + 1);
    }
    if (!waiting_.empty()) {
        const auto n_slots = static_cast<uint32_t>(std::min<size_t>(n_parallel, waiting_.size()));
        slots_.resize(n_slots);
        context_ = model_->make_batch_context(n_slots, n_ctx);
    }
}

void BatchGeneration::fill_slots() {
    for (size_t i = 0; i < slots_.size() && !waiting_.empty(); ++i) {
        if (slots_[i]) {
            continue;
        }
        auto [request, sequence] = std::move(waiting_.front());
        waiting_.pop_front();
        sequence->accept_prompt();
        slots_[i] = Slot{std::move(sequence), {request}};
        slots_[i]->outcome.stats.n_prompt_tokens = slots_[i]->sequence->n_prompt();
        slots_[i]->outcome.stats.breakdown.n_graph_splits = context_->n_graph_splits();
        slots_[i]->outcome.stats.breakdown.n_major_page_faults = -1;  // whose they are, of several, cannot be told
    }
}

// One token of each sequence that is under way, and as much of new prompts as there is room for.
void BatchGeneration::step(const Interrupt::Poll & poll) {
    Stopwatch watch;
    fill_slots();
    batch_.clear();
    size_t room = context_->n_batch();
    for (const bool is_prompt : {false, true}) {
        for (size_t i = 0; i < slots_.size(); ++i) {
            if (!slots_[i] || (slots_[i]->n_decoded < slots_[i]->sequence->n_prompt()) != is_prompt) {
                continue;
            }
            Slot & slot = *slots_[i];
            const std::vector<int32_t> & tokens = slot.sequence->tokens();
            const size_t n = std::min(room, tokens.size() - slot.n_decoded);
            for (size_t j = 0; j < n; ++j) {
                const size_t at = slot.n_decoded + j;
                batch_.push_back(
                    {tokens[at], static_cast<uint32_t>(at), static_cast<uint32_t>(i), at + 1 == tokens.size()});
            }
            slot.n_decoded += n;
            slot.wants_logits = n > 0 && slot.n_decoded == tokens.size();
            slot.place = batch_.size() - 1;
            room -= n;
        }
    }
    Breakdown shared;
    {
        Stopwatch waiting;
        const Turn turn(model_->turns(), interrupt_);
        shared.wait_s = waiting.lap();
        if (interrupt_.cancelled() || (poll && poll())) {
            throw CancelledError("interrupted");
        }
        context_->decode(batch_, interrupt_, poll, shared);
        for (std::optional<Slot> & slot : slots_) {
            if (!slot || !slot->wants_logits) {
                continue;
            }
            slot->wants_logits = false;
            Token token;
            const bool is_full = slot->n_decoded == n_ctx_;
            Breakdown & times = slot->outcome.stats.breakdown;
            Breakdown own;
            Stopwatch finding;
            float * logits = context_->logits_of(slot->place);
            own.logits_s = finding.lap();
            const StopReason reason = slot->sequence->choose(logits, context_, is_full, token, own,
                                                             [&] { return interrupt_.should_stop(poll); });
            if (!slot->outcome.tokens.empty()) {
                times.add(own);
                times.add(shared);
            }
            slot->outcome.tokens.push_back(std::move(token));
            slot->outcome.stats.stop_reason = reason;
        }
    }
    const double seconds = watch.seconds();
    for (size_t i = 0; i < slots_.size(); ++i) {
        if (!slots_[i]) {
            continue;
        }
        GenerationStats & stats = slots_[i]->outcome.stats;
        const size_t n_tokens = slots_[i]->outcome.tokens.size();
        if (n_tokens <= 1) {
            stats.prefill_s += seconds;
        } else {
            stats.decode_s += seconds;
        }
        if (n_tokens == 1) {
            stats.time_to_first_token_s = stats.prefill_s;
        }
        stats.n_tokens = static_cast<int64_t>(n_tokens);
        if (stats.stop_reason != StopReason::none) {
            slots_[i]->sequence->release();
            context_->forget(static_cast<uint32_t>(i));
            ended_.push_back(std::move(slots_[i]->outcome));
            slots_[i].reset();
        }
    }
}

std::optional<BatchOutcome> BatchGeneration::next(const Interrupt::Poll & poll) {
    const std::lock_guard lock(step_);
    const auto is_under_way = [this] {
        return !waiting_.empty() ||
               std::any_of(slots_.begin(), slots_.end(), [](const auto & slot) { return slot.has_value(); });
    };
    try {
        while (context_ && ended_.empty() && is_under_way()) {
            step(poll);
        }
    } catch (const CancelledError &) {
        const bool by_close = interrupt_.cancelled();
        context_.reset();
        if (by_close) {
            return std::nullopt;
        }
        throw;
    } catch (...) {
        context_.reset();
        throw;
    }
    if (ended_.empty()) {
        context_.reset();
        return std::nullopt;
    }
    BatchOutcome outcome = std::move(ended_.front());
    ended_.pop_front();
    return outcome;
}

void BatchGeneration::close() {
    if (!step_.is_here()) {
        return;  // it is another process's
    }
    interrupt_.cancel();
    if (step_.held_here()) {
        return;  // the step ends by itself
    }
    const std::lock_guard lock(step_);
    context_.reset();
    waiting_.clear();
    slots_.clear();
    ended_.clear();
}

}  // namespace overspill
