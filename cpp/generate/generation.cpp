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
    // Where Python chooses, or looks at the logits, a step cannot be taken before it is asked for.
    options.look_ahead = options.look_ahead && !options.choose && !options.keep_logits &&
                         (!options.constraint || options.constraint->is_native());
    const auto generation =
        left_alone_by_forks(std::unique_ptr<Generation>(new Generation(model, std::move(prompt), std::move(options))));
    model->add(generation);
    return generation;
}

Generation::Generation(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options)
    : model_(std::move(model)),
      sequence_(model_, std::move(prompt), std::move(options)),
      ahead_([this] { return step({}); }) {
    GenerationOptions & checked = sequence_.options();
    context_ = model_->take_context(/*clear =*/!checked.reuse);
    if (!context_->can_drop()) {
        checked.form.droppable.clear();
    }
    const size_t n_prompt = sequence_.n_prompt();
    if (n_prompt > context_->n_ctx()) {
        const std::string n_ctx = std::to_string(context_->n_ctx());
        model_->give_back(std::move(context_));
        throw ContextFullError("the prompt has " + std::to_string(n_prompt) + " tokens, but the context holds " +
                               n_ctx + "; load the model with a larger n_ctx, or shorten the prompt");
    }
    context_->record_experts(checked.recorder);
    sequence_.reserve(size_t{context_->n_ctx()} + 1);
    stats_.n_prompt_tokens = n_prompt;
    stats_.breakdown.n_graph_splits = context_->n_graph_splits();
}

Generation::~Generation() {
    ahead_.stop(interrupt_);
    if (context_) {
        give_back();
    }
}

void Generation::give_back() {
    context_->record_experts(nullptr);
    model_->give_back(std::move(context_));
}

float * Generation::prefill(const Interrupt::Poll & poll, size_t & n_cached) {
    float * logits = nullptr;
    const auto n_prompt = static_cast<uint32_t>(sequence_.n_prompt());
    const bool reuse = sequence_.options().reuse;
    if (reuse) {
        const Turn turn(model_->turns(), interrupt_);
        n_cached = context_->keep(sequence_.tokens());
    }
    auto done = static_cast<uint32_t>(n_cached);
    // The next prompt may differ in its last tokens from this one, which ask for the reply.
    constexpr uint32_t n_of_question = 16;
    const uint32_t to_remember =
        reuse && context_->needs_to_remember() && n_prompt > done + n_of_question ? n_prompt - n_of_question : 0;
    while (done < n_prompt) {
        const uint32_t n = std::min(context_->n_batch(), (done < to_remember ? to_remember : n_prompt) - done);
        // Between two batches other streams have their turn, and close() its chance.
        const Turn turn(model_->turns(), interrupt_);
        // A batch asks between the pieces of its graph; where a GPU holds everything, there is only one.
        if (interrupt_.cancelled() || (poll && poll())) {
            throw CancelledError("interrupted");
        }
        logits = context_->decode(sequence_.tokens().data() + done, n, interrupt_, poll);
        done += n;
        if (done == to_remember) {
            context_->remember();
        }
    }
    sequence_.accept_prompt();
    return logits;
}

Step Generation::step(const Interrupt::Poll & poll) {
    const Stopwatch watch;
    Step step;
    float * logits = nullptr;
    if (first_) {
        logits = prefill(poll, step.n_cached);
        first_ = false;
        step.prefill_s = watch.seconds();
    } else {
        Stopwatch waiting;
        const Turn turn(model_->turns(), interrupt_);
        step.times.wait_s = waiting.lap();
        step.n_dropped = context_->n_decoded() == context_->n_ctx() ? make_room() : 0;
        logits = context_->decode(&sequence_.tokens().back(), 1, interrupt_, poll, /*all =*/false, &step.times);
    }
    const bool is_full = context_->n_decoded() == context_->n_ctx() && sequence_.options().form.droppable.empty();
    step.reason = sequence_.choose(logits, context_, is_full, step.token, step.times,
                                   [&] { return interrupt_.should_stop(poll); });
    if (sequence_.options().keep_logits) {
        step.token.context = context_;
        step.token.logits = logits;
        step.token.n_decodes = context_->n_decodes();
    }
    step.seconds = watch.seconds();
    return step;
}

// Drops the first span of the prompt that may be, and returns how many tokens that were; 0 if none may.
size_t Generation::make_room() {
    auto & droppable = sequence_.options().form.droppable;
    if (droppable.empty()) {
        return 0;
    }
    const auto [from, to] = droppable.front();
    if (!context_->drop(from, to)) {
        droppable.clear();
        return 0;
    }
    droppable.erase(droppable.begin());
    const uint32_t n = to - from;
    for (auto & [later_from, later_to] : droppable) {
        later_from -= n;
        later_to -= n;
    }
    sequence_.drop(from, to);
    return n;
}

std::optional<Token> Generation::next(const Interrupt::Poll & poll) {
    const std::lock_guard lock(step_);
    if (!context_) {
        return std::nullopt;
    }
    // Handing a step to another thread takes some microseconds, so it is done only for callers
    // that take longer than that between two tokens.
    constexpr auto worth_it = std::chrono::microseconds(50);
    const auto away = first_ ? std::chrono::steady_clock::duration{} : std::chrono::steady_clock::now() - returned_at_;
    const bool busy_caller = away > worth_it;
    try {
        Token token = deliver(ahead_.is_under_way() ? ahead_.take(poll, interrupt_) : step(poll),
                              std::chrono::duration<double>(away).count());
        if (context_ && busy_caller && sequence_.options().look_ahead) {
            sequence_.options().look_ahead = ahead_.start();
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
            stats_.prefill_s = step.prefill_s;
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
    ahead_.stop(interrupt_);
    {
        const std::lock_guard lock(stats_mutex_);
        stats_.breakdown.n_major_page_faults = page_faults();
        stats_.stop_reason = reason;
    }
    // What was asked of Python is let go of by the thread that came from there.
    sequence_.release();
    give_back();
}

void Generation::close(StopReason reason) {
    if (!origin_.is_here()) {
        return;  // it is another process's
    }
    closing_.store(true);
    interrupt_.cancel();
    if (step_.held_here()) {
        return;  // the step ends by itself
    }
    const std::lock_guard lock(step_);
    if (context_) {
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
