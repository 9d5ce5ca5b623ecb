#include "generate/engine.h"

#include "base/error.h"
#include "base/stopwatch.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <utility>

namespace overspill {

namespace {

using Clock = std::chrono::steady_clock;

// In which a thread that waits asks whether a signal has come.
constexpr auto interval = std::chrono::milliseconds(20);
// Whoever has not asked for so long is not held up by what others do.
constexpr auto away = std::chrono::seconds(1);
// So many tokens that are not asked for yet: while the thread of one is on its way back, the next batch has it all the
// same.
constexpr size_t most_ahead = 2;

double seconds_of(Clock::duration duration) {
    return std::chrono::duration<double>(duration).count();
}

bool needs_own_thread(const GenerationOptions & options) {
    return options.choose || options.keep_logits || (options.constraint && !options.constraint->is_native());
}

}  // namespace

Participant::Participant(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options)
    : sequence(std::move(model), std::move(prompt), std::move(options)),
      chooses_itself(needs_own_thread(sequence.options())),
      may_be_ahead(sequence.options().look_ahead && !chooses_itself && !sequence.options().recorder) {}

std::shared_ptr<Engine> Engine::of(Model & model) {
    return std::static_pointer_cast<Engine>(
        model.engine([&] { return left_alone_by_forks(std::make_unique<Engine>(model)); }));
}

void Engine::join(Participant & one) {
    const Lock lock(mutex_);
    if (one.has_left) {
        return;  // the model was closed
    }
    members_.push_back(&one);
    waiting_.push_back(&one);
    one.is_member = true;
}

Step Engine::step(Participant & one, const Interrupt::Poll & poll) {
    Lock lock(mutex_);
    const auto me = std::this_thread::get_id();
    if (model_.turns().held_here() || std::find(inside_.begin(), inside_.end(), me) != inside_.end()) {
        model_.turns().throw_in_a_step();
    }
    inside_.push_back(me);
    if (!one.is_member) {
        members_.push_back(&one);
        one.is_member = true;
    }
    one.wants = true;
    struct Done {
        Engine & engine;
        Participant & one;
        Lock & lock;
        ~Done() {
            if (!lock.owns_lock()) {
                lock.lock();
            }
            one.wants = false;
            one.seen_at = Clock::now();
            if (!one.sequence.options().eager) {
                engine.forget_waiting(one);
            }
            auto & inside = engine.inside_;
            inside.erase(std::find(inside.begin(), inside.end(), std::this_thread::get_id()));
            engine.pass_on();
        }
    } const done{*this, one, lock};
    one.asked_at = Clock::now();
    one.asked_by = me;
    arrived_.notify_all();
    bool is_stopped = false;
    while (true) {
        if (one.n_unread() > 0) {
            return one.take_step();
        }
        if (one.error) {
            std::rethrow_exception(one.error);
        }
        if (one.interrupt.cancelled() || is_stopped) {
            throw CancelledError("interrupted");
        }
        if (!one.seat && std::find(waiting_.begin(), waiting_.end(), &one) == waiting_.end()) {
            waiting_.push_back(&one);
        }
        const uint64_t n_before = n_runs_;
        if (!is_led_ && n_visitors_ == 0) {
            lead(lock, one, poll);
            if (one.n_unread() > 0 || one.error || n_runs_ != n_before) {
                continue;
            }
        }
        one.changed.wait_for(lock, interval);
        lock.unlock();  // the question may take the GIL
        is_stopped = poll && poll();
        lock.lock();
    }
}

// Wakes one that waits, if nobody leads.
void Engine::pass_on() {
    if (is_led_) {
        return;
    }
    for (Participant * one : members_) {
        if (one->wants && one->n_unread() == 0 && !one->error &&
            (one->seat || (!waiting_.empty() && waiting_.front() == one))) {
            one->changed.notify_all();
            return;
        }
    }
}

void Engine::cancel(Participant & one) {
    one.interrupt.cancel();
    const Lock lock(mutex_);
    one.changed.notify_all();
    if (one.is_in_run &&
        std::all_of(run_.begin(), run_.end(), [](const auto & other) { return other->interrupt.cancelled(); })) {
        run_interrupt_->cancel();
    }
}

void Engine::leave(Participant & one) {
    std::vector<std::shared_ptr<Context>> contexts;
    Lock lock(mutex_);
    if (one.has_left) {
        return;
    }
    one.has_left = true;
    members_.erase(std::remove(members_.begin(), members_.end(), &one), members_.end());
    forget_waiting(one);
    n_refused_ = 0;
    if (!one.is_in_run) {
        free_place(one);
        contexts = take_contexts();
        pass_on();
        lock.unlock();
        one.sequence.release();
    }
    for (auto & context : contexts) {
        give_back(std::move(context));
    }
}

Engine::Leading::Leading(Engine & engine, Lock & lock) : engine_(engine), lock_(lock) {
    engine.is_led_ = true;
}

Engine::Leading::~Leading() {
    if (!lock_.owns_lock()) {
        lock_.lock();
    }
    std::vector<std::shared_ptr<Participant>> gone;
    for (auto & one : engine_.run_) {
        one->is_in_run = false;
        if (one->has_left) {
            engine_.free_place(*one);
            gone.push_back(std::move(one));
        }
    }
    engine_.run_.clear();
    engine_.is_led_ = false;
    engine_.ended_.notify_all();
    std::vector<std::shared_ptr<Context>> contexts = engine_.take_contexts();
    if (gone.empty() && contexts.empty()) {
        return;
    }
    lock_.unlock();
    for (const auto & one : gone) {
        one->sequence.release();
    }
    gone.clear();
    for (auto & context : contexts) {
        engine_.give_back(std::move(context));
    }
    lock_.lock();
}

// One batch, if there is anything to decode.
void Engine::lead(Lock & lock, Participant & leader, const Interrupt::Poll & poll) {
    const Leading leading(*this, lock);
    run_interrupt_.emplace();
    try {
        seat_waiting(lock);
    } catch (const CancelledError &) {
        throw;  // the leader's thread was told to stop
    } catch (...) {
        // Whoever is first in the queue: there is no context for it.
        if (!lock.owns_lock()) {
            lock.lock();
        }
        if (!waiting_.empty()) {
            Participant & first = *waiting_.front();
            waiting_.pop_front();
            first.error = std::current_exception();
            first.changed.notify_all();
        }
        return;
    }
    if (!run_.empty()) {
        ++n_runs_;
        return;
    }
    wait_for_more(lock);
    choose_run();
    if (run_.empty()) {
        return;
    }
    ++n_runs_;
    lock.unlock();
    const Stopwatch watch;
    try {
        compute(leader, poll);
    } catch (const CancelledError &) {
        lock.lock();
        for (const auto & one : run_) {
            one->next.reset();
            one->failure = nullptr;
        }
        if (!run_interrupt_->cancelled() && !(run_.size() == 1 && run_.front()->interrupt.cancelled())) {
            throw;  // the leader's thread was told to stop
        }
        return;
    } catch (...) {
        const std::exception_ptr error = std::current_exception();
        lock.lock();
        for (const auto & one : run_) {
            one->error = one->error ? one->error : error;
            one->changed.notify_all();
        }
        return;
    }
    lock.lock();
    const double seconds = watch.seconds();
    if (!is_prompt_) {
        last_run_ = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    }
    publish(seconds);
}

// Waits a moment for streams that had a token just now, if they are more than those that are ready: a batch of few
// takes nearly as long as one of many.
void Engine::wait_for_more(Lock & lock) {
    if (members_.size() == 1) {
        return;
    }
    const auto now = Clock::now();
    const auto is_coming = [&](const Participant * one) {
        return one->seat && one->has_begun && !one->has_ended && !one->error && !one->wants &&
               now - one->seen_at < 2 * last_run_ && !is_ready(*one) &&
               std::find(inside_.begin(), inside_.end(), one->asked_by) == inside_.end();
    };
    const auto comes = [&] {
        const auto n_coming = std::count_if(members_.begin(), members_.end(), is_coming);
        const auto n_ready =
            std::count_if(members_.begin(), members_.end(), [this](const auto * one) { return is_ready(*one); });
        return n_ready > 0 && n_coming > n_ready;
    };
    if (comes()) {
        arrived_.wait_until(lock, now + last_run_ / 4, [&] { return !comes(); });
    }
}

bool Engine::is_ready(const Participant & one) const {
    if (!one.seat || one.has_left || one.has_ended || one.error || one.interrupt.cancelled()) {
        return false;
    }
    const bool is_eager = one.sequence.options().eager;
    const bool is_ahead =
        one.may_be_ahead && members_.size() > 1 && (is_eager || (one.has_begun && one.n_unread() < most_ahead));
    return ((one.wants && one.n_unread() == 0) || is_ahead) && one.n_pending() > 0;
}

// Fills in run_ with what is decoded next.
void Engine::choose_run() {
    std::vector<Participant *> & tokens = ready_tokens_;
    std::vector<Participant *> & prompts = ready_prompts_;
    tokens.clear();
    prompts.clear();
    // Of several contexts, the one that has waited longest.
    const Place * longest = nullptr;
    for (const Place & place : places_) {
        if (place.taken_by != nullptr && is_ready(*place.taken_by) &&
            (longest == nullptr || place.run_at < longest->run_at)) {
            longest = &place;
        }
    }
    if (longest == nullptr) {
        return;
    }
    const Context & context = *longest->seat.context;
    for (Place & place : places_) {
        place.run_at = place.seat.context.get() == &context ? n_runs_ + 1 : place.run_at;
    }
    for (Participant * one : members_) {
        if (is_ready(*one) && one->seat->context.get() == &context) {
            (one->n_pending() == 1 ? tokens : prompts).push_back(one);
        }
    }
    const auto now = Clock::now();
    is_shared_ = std::any_of(members_.begin(), members_.end(), [&](const Participant * one) {
        return one->has_begun && !one->has_ended && (one->wants || now - one->seen_at < away);
    });
    // Between two pieces of prompts, all have their next token.
    is_prompt_ = tokens.empty() || (!prompts.empty() && std::all_of(tokens.begin(), tokens.end(), [&](auto * one) {
                     return one->run_at > prompt_at_;
                 }));
    prompt_at_ = is_prompt_ ? n_runs_ + 1 : prompt_at_;
    std::vector<Participant *> & chosen = is_prompt_ ? prompts : tokens;
    if (!is_prompt_) {
        std::stable_sort(chosen.begin(), chosen.end(),
                         [](const Participant * a, const Participant * b) { return a->run_at < b->run_at; });
    }
    // Recorded experts are those of all tokens of a batch.
    const auto is_alone = [](Participant * one) { return one->sequence.options().recorder != nullptr; };
    if (is_alone(chosen.front())) {
        chosen.resize(1);
    } else {
        chosen.erase(std::remove_if(chosen.begin(), chosen.end(), is_alone), chosen.end());
    }
    if (!is_prompt_ && chosen.size() > 1) {
        chosen.resize(group_size_.of(static_cast<uint32_t>(chosen.size())));
    }
    size_t room = context.n_batch();
    if (is_prompt_ && is_shared_) {
        room = piece_size_.within(model_.max_pause_s(), context.n_batch());
    }
    for (Participant * one : chosen) {
        const size_t n_done = context.decoded(one->seat->sequence).size();
        // What a stream that lost its place has to decode again, is recorded already.
        const size_t end = n_done < one->n_recorded    ? one->n_recorded
                           : n_done < one->to_remember ? one->to_remember
                                                       : one->sequence.tokens().size();
        // At a full context, it makes room for the next token.
        const size_t n_left = (n_done < model_.n_ctx() ? std::min<size_t>(end, model_.n_ctx()) : end) - n_done;
        one->n_in_batch = std::min(room, n_left);
        room -= one->n_in_batch;
        if (one->n_in_batch > 0) {
            one->is_in_run = true;
            one->run_at = n_runs_ + 1;
            run_.push_back(one->shared_from_this());
        }
    }
    // llama.cpp decodes neighbours together.
    std::sort(run_.begin(), run_.end(),
              [](const auto & a, const auto & b) { return a->seat->sequence < b->seat->sequence; });
}

namespace {

// Drops the first span of the prompt that may be dropped.
void make_room(Participant & one, Context & context) {
    auto & droppable = one.sequence.options().form.droppable;
    if (droppable.empty()) {
        return;
    }
    const auto [from, to] = droppable.front();
    if (!context.drop(one.seat->sequence, from, to)) {
        droppable.clear();
        return;
    }
    droppable.erase(droppable.begin());
    const uint32_t n = to - from;
    for (auto & [later_from, later_to] : droppable) {
        later_from -= n;
        later_to -= n;
    }
    one.sequence.drop(from, to);
    one.n_dropped += n;
    one.n_recorded -= std::min<size_t>(one.n_recorded, n);
}

}  // namespace

// Decodes, and has tokens chosen.
void Engine::compute(Participant & leader, const Interrupt::Poll & poll) {
    const std::shared_ptr<Context> context = run_.front()->seat->context;
    Breakdown shared;
    Stopwatch waiting;
    const bool is_alone = run_.size() == 1;
    Interrupt & interrupt = is_alone ? run_.front()->interrupt : *run_interrupt_;
    const Turn turn(model_.turns(), interrupt);
    shared.wait_s = waiting.lap();
    // A batch asks between the pieces of its graph; where a GPU holds everything, there is only one.
    if (interrupt.cancelled() || (poll && poll())) {
        throw CancelledError("interrupted");
    }
    batch_.clear();
    bool has_moved = false;
    for (const auto & one : run_) {
        const uint32_t sequence = one->seat->sequence;
        if (context->decoded(sequence).size() == model_.n_ctx()) {
            make_room(*one, *context);
            has_moved = true;
        }
        const std::vector<int32_t> & tokens = one->sequence.tokens();
        const size_t n_done = context->decoded(sequence).size();
        if (n_done + one->n_in_batch > model_.n_ctx()) {
            one->failure = std::make_exception_ptr(
                ContextFullError("the context of " + std::to_string(model_.n_ctx()) + " tokens is full"));
            continue;
        }
        for (size_t at = n_done; at < n_done + one->n_in_batch; ++at) {
            batch_.push_back({tokens[at], sequence, at + 1 == tokens.size()});
        }
        one->last_in_batch = batch_.size() - 1;
        one->n_rows->fetch_add(1, std::memory_order_relaxed);
    }
    if (batch_.empty()) {
        return;
    }
    Participant & first = *run_.front();
    const bool records = context->decoded(first.seat->sequence).size() >= first.n_recorded;
    const auto & recorder = first.sequence.options().recorder;
    const auto stop_recording = [](Context * recorded) { recorded->record_experts(nullptr); };
    std::unique_ptr<Context, decltype(stop_recording)> recorded(nullptr, stop_recording);
    if (recorder && records) {
        context->record_experts(recorder);
        recorded.reset(context.get());
    }
    const Stopwatch watch;
    // llama.cpp moves what is left of a stream that has made room, with the decode; half of that cannot be told.
    Interrupt never;
    context->decode(batch_, has_moved ? never : interrupt, has_moved ? Interrupt::Poll() : poll, shared);
    if (recorder) {
        first.n_recorded = std::max(first.n_recorded, context->decoded(first.seat->sequence).size());
    }
    const auto n = static_cast<uint32_t>(batch_.size());
    is_prompt_ ? piece_size_.took(n, watch.seconds()) : group_size_.took(n, watch.seconds());
    for (const auto & one : run_) {
        if (one->to_remember > 0 && context->decoded(one->seat->sequence).size() == one->to_remember) {
            context->remember(one->seat->sequence);
            one->to_remember = 0;
        }
    }
    choose_tokens(leader, poll, shared);
}

void Engine::choose_tokens(Participant & leader, const Interrupt::Poll & poll, const Breakdown & shared) {
    const std::shared_ptr<Context> context = run_.front()->seat->context;
    const bool stays = context->n_sequences() == 1;  // until this stream's next step
    for (const auto & one : run_) {
        if (one->failure || one->n_pending() > 0) {
            continue;
        }
        Stopwatch finding;
        Step step;
        step.times = shared;
        step.row.logits = context->logits_of(one->last_in_batch);
        step.row.threads = context->threads();
        step.is_full = context->decoded(one->seat->sequence).size() == model_.n_ctx() &&
                       one->sequence.options().form.droppable.empty();
        if (one->chooses_itself && stays) {
            step.row.owner = context;
        } else if (one->chooses_itself) {
            // Other streams go on meanwhile, and llama.cpp writes their logits there.
            if (!one->row) {
                one->row = std::make_shared<std::vector<float>>(static_cast<size_t>(model_.n_vocab()));
            }
            std::copy_n(step.row.logits, one->row->size(), one->row->data());
            step.row.logits = one->row->data();
            step.row.owner = one->row;
        }
        step.times.logits_s += finding.lap();
        if (!one->chooses_itself) {
            const StepLogits row = std::exchange(step.row, {});
            try {
                step.reason = one->sequence.choose(row, step.is_full, step.token, step.times, [&] {
                    return one->interrupt.cancelled() || (one.get() == &leader && one->interrupt.should_stop(poll));
                });
            } catch (...) {
                one->failure = std::current_exception();
                continue;
            }
        }
        step.n_cached = one->has_begun ? 0 : one->n_cached;
        step.n_dropped = std::exchange(one->n_dropped, 0);
        one->has_begun = true;
        one->has_ended = step.reason != StopReason::none;
        one->next = std::move(step);
    }
}

void Engine::publish(double seconds) {
    const auto now = Clock::now();
    for (const auto & one : run_) {
        one->run_s += seconds;
        if (one->next) {
            Step & step = *one->next;
            const bool was_waited_for = one->wants && one->n_unread() == 0;
            const double run_s = std::exchange(one->run_s, 0);
            step.seconds = was_waited_for ? std::max(run_s, seconds_of(now - one->asked_at)) : run_s;
            step.times.wait_s += step.seconds - run_s;
            one->steps.push_back(std::move(step));
            one->next.reset();
        }
        one->error = one->failure ? std::exchange(one->failure, nullptr) : one->error;
        if (one->has_ended && !one->sequence.options().keeps_state) {
            free_place(*one);
        }
        if (one->n_unread() > 0 || one->error) {
            one->changed.notify_all();
        }
    }
}

}  // namespace overspill
