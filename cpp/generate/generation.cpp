#include "generate/generation.h"

#include "base/error.h"
#include "base/stopwatch.h"

#include <algorithm>
#include <string>
#include <utility>

#ifndef _WIN32
#include <sys/resource.h>
#endif

namespace overspill {

namespace {

// Of the process, which had to wait for a disk; -1 where the system does not tell.
int64_t major_page_faults() {
#ifdef _WIN32
    return -1;
#else
    rusage usage{};
    return getrusage(RUSAGE_SELF, &usage) == 0 ? int64_t{usage.ru_majflt} : -1;
#endif
}

}  // namespace

std::shared_ptr<Generation> Generation::start(std::shared_ptr<Model> model, std::vector<int32_t> prompt,
                                              GenerationOptions options) {
    const auto generation =
        left_alone_by_forks(std::unique_ptr<Generation>(new Generation(model, std::move(prompt), std::move(options))));
    model->add(generation);
    if (generation->part_->sequence.options().eager) {
        generation->engine_->join(*generation->part_);
    }
    return generation;
}

Generation::Generation(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options)
    : model_(std::move(model)), ahead_([this] { return step({}); }, [this] { engine_->cancel(*part_); }) {
    model_->check_generates();
    engine_ = Engine::of(*model_);
    part_ = std::make_shared<Participant>(model_, std::move(prompt), std::move(options));
    const size_t n_prompt = part_->sequence.n_prompt();
    if (n_prompt > model_->n_ctx()) {
        throw ContextFullError("the prompt has " + std::to_string(n_prompt) + " tokens, but the context holds " +
                               std::to_string(model_->n_ctx()) +
                               "; load the model with a larger n_ctx, or shorten the prompt");
    }
    looks_ahead_ = part_->may_be_ahead;
    part_->sequence.reserve(size_t{model_->n_ctx()} + 1);
    stats_.n_prompt_tokens = n_prompt;
    stats_.breakdown.n_graph_splits = model_->memory().n_splits;
}

Generation::~Generation() {
    ahead_.stop();
    engine_->leave(*part_);
}

Step Generation::step(const Interrupt::Poll & poll) {
    Step step = engine_->step(*part_, poll);
    if (part_->chooses_itself) {
        const Stopwatch watch;
        Sequence & sequence = part_->sequence;
        const StepLogits row = std::exchange(step.row, {});
        step.reason = sequence.choose(row, step.is_full, step.token, step.times,
                                      [&] { return part_->interrupt.should_stop(poll); });
        if (sequence.options().keep_logits) {
            step.token.owner = row.owner;
            step.token.logits = row.logits;
            step.token.n_logits = static_cast<size_t>(model_->n_vocab());
            step.token.n_rows = part_->n_rows;
            step.token.n_rows_then = part_->n_rows->load();
        }
        step.seconds += watch.seconds();
    }
    return step;
}

std::optional<Token> Generation::next(const Interrupt::Poll & poll) {
    const std::lock_guard lock(step_);
    if (has_ended_) {
        return std::nullopt;
    }
    // Handing a step to another thread takes some microseconds, so it is done only for callers
    // that take longer than that between two tokens.
    constexpr auto worth_it = std::chrono::microseconds(50);
    const auto away = first_ ? std::chrono::steady_clock::duration{} : std::chrono::steady_clock::now() - returned_at_;
    const bool busy_caller = away > worth_it;
    try {
        Token token = deliver(ahead_.is_under_way() ? ahead_.take(poll) : step(poll),
                              std::chrono::duration<double>(away).count());
        first_ = false;
        if (!has_ended_ && busy_caller && looks_ahead_) {
            looks_ahead_ = ahead_.start();
        }
        returned_at_ = std::chrono::steady_clock::now();
        return token;
    } catch (const CancelledError &) {
        const bool by_close = closing_.load();
        finish(by_close ? StopReason::closed : StopReason::interrupted);
        if (by_close) {
            return std::nullopt;
        }
        throw;
    } catch (...) {
        finish(StopReason::error);
        throw;
    }
}

Token Generation::deliver(Step step, double caller_s) {
    {
        const std::lock_guard lock(stats_mutex_);
        stats_.n_cached_tokens += step.n_cached;
        stats_.n_dropped_tokens += step.n_dropped;
        if (stats_.n_tokens++ == 0) {
            stats_.prefill_s = step.seconds;
            stats_.time_to_first_token_s = step.seconds;
            n_page_faults_before_ = major_page_faults();
        } else {
            stats_.decode_s += step.seconds;
            stats_.breakdown.add(step.times);
            stats_.breakdown.caller_s += caller_s;
        }
    }
    if (step.reason != StopReason::none) {
        finish(step.reason);
    }
    return std::move(step.token);
}

void Generation::finish(StopReason reason) {
    ahead_.stop();
    {
        const std::lock_guard lock(stats_mutex_);
        stats_.breakdown.n_major_page_faults = page_faults();
        stats_.stop_reason = reason;
    }
    has_ended_ = true;
    if (part_->sequence.options().keeps_state && reason != StopReason::error) {
        try {
            engine_->save(*part_);
        } catch (...) {
            not_saved_ = std::current_exception();
        }
    }
    engine_->leave(*part_);
}

std::shared_ptr<const SequenceState> Generation::take_state() {
    if (step_.held_here()) {
        return nullptr;  // it was closed by a sampler, and ends with the step
    }
    const std::lock_guard lock(step_);
    if (not_saved_) {
        std::rethrow_exception(std::exchange(not_saved_, nullptr));
    }
    // A prompt that was not read to its end is worth less than what there is.
    return has_ended_ && stats().n_tokens > 0 ? std::exchange(part_->saved, nullptr) : nullptr;
}

void Generation::close(StopReason reason) {
    if (!origin_.is_here()) {
        return;  // it is another process's
    }
    closing_.store(true);
    engine_->cancel(*part_);
    if (step_.held_here()) {
        return;  // the step ends by itself
    }
    const std::lock_guard lock(step_);
    if (!has_ended_) {
        finish(reason);
        return;
    }
    const std::lock_guard stats_lock(stats_mutex_);
    if (stats_.stop_reason == StopReason::closed && reason == StopReason::interrupted) {
        stats_.stop_reason = reason;
    }
}

// Since the first token.
int64_t Generation::page_faults() const {
    const int64_t now = stats_.n_tokens > 0 ? major_page_faults() : 0;
    return now < 0 ? now : now - n_page_faults_before_;
}

GenerationStats Generation::stats() const {
    const auto lock = origin_.lock(stats_mutex_);
    GenerationStats stats = stats_;
    if (stats.stop_reason == StopReason::none) {
        stats.breakdown.n_major_page_faults = page_faults();
    }
    return stats;
}

}  // namespace overspill
