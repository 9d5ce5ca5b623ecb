// What an engine's places hold, saved and restored: for sessions, and where a stream loses its place.
#include "generate/engine.h"

#include "base/error.h"
#include "base/stopwatch.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <new>
#include <utility>

namespace overspill {

namespace {

// So few tokens are read again rather than restored.
constexpr size_t few_tokens = 16;

// With a sequence that is hardly another's: its tokens are half of it.
size_t n_shared(const std::vector<int32_t> & one, const std::vector<int32_t> & tokens) {
    const auto end = std::mismatch(one.begin(), one.end(), tokens.begin(), tokens.end()).first;
    const auto n = static_cast<size_t>(end - one.begin());
    return 2 * n >= one.size() ? n : 0;
}

}  // namespace

// Does work on the places while no stream is seated or decoded.
void Engine::alone(const std::function<void()> & work) {
    Lock lock(mutex_);
    if (model_.turns().held_here() ||
        std::find(inside_.begin(), inside_.end(), std::this_thread::get_id()) != inside_.end()) {
        model_.turns().throw_in_a_step();
    }
    struct Visit {
        Engine & engine;
        explicit Visit(Engine & visited) : engine(visited) { ++engine.n_visitors_; }
        ~Visit() {
            --engine.n_visitors_;
            engine.pass_on();
        }
    } const visit(*this);
    while (is_led_) {
        ended_.wait_for(lock, std::chrono::milliseconds(20));
        lock.unlock();  // the question may take the GIL
        const bool is_stopped = told_to_stop();
        lock.lock();
        if (is_stopped) {
            throw CancelledError("interrupted");
        }
    }
    const Leading leading(*this, lock);
    const bool has_places = !places_.empty();
    lock.unlock();
    if (!has_places) {
        const std::shared_ptr<Context> context = model_.take_context();
        const Lock adding(mutex_);
        add_places(context);
    }
    const std::lock_guard turn(model_.turns());
    work();
}

void Engine::save(Participant & one) {
    {
        const Lock lock(mutex_);
        if (one.saved || !one.seat || one.has_left) {
            return;
        }
    }
    alone([&] {
        // Still; and after a step that was cancelled, a context may have lost what it had.
        if (one.seat && one.seat->context->decoded(one.seat->sequence).size() + 1 >= one.sequence.tokens().size()) {
            one.saved = one.seat->context->save(one.seat->sequence);
        }
    });
}

std::shared_ptr<const SequenceState> Engine::save(const std::vector<int32_t> & tokens) {
    model_.check_generates();
    std::shared_ptr<const SequenceState> saved;
    alone([&] {
        const Place * best = nullptr;
        uint64_t most = 0;
        for (const Place & place : places_) {
            const Context & context = *place.seat.context;
            const std::vector<int32_t> & decoded = context.decoded(place.seat.sequence);
            const uint64_t worth = decoded.empty()  ? 0
                                   : tokens.empty() ? context.used_at(place.seat.sequence)
                                                    : n_shared(decoded, tokens);
            if (worth > most) {
                most = worth;
                best = &place;
            }
        }
        if (!tokens.empty()) {
            saved = prompt_cache_.best([&](const SequenceState & one) { return n_shared(one.tokens, tokens); }, most);
        }
        if (!saved && best != nullptr) {
            saved = best->seat.context->save(best->seat.sequence);
        }
    });
    return saved;
}

void Engine::restore(const SequenceState & saved) {
    model_.check_generates();
    alone([&] {
        Place * oldest = nullptr;
        for (Place & place : places_) {
            const auto used_at = [](const Place & which) { return which.seat.context->used_at(which.seat.sequence); };
            const bool is_free = place.taken_by == nullptr && place.seat.context->n_ctx() >= saved.tokens.size();
            if (is_free && (oldest == nullptr || used_at(place) < used_at(*oldest))) {
                oldest = &place;
            }
        }
        if (oldest == nullptr) {
            throw Error("every place for a stream is taken: close one of the open streams first");
        }
        put_away(*oldest->seat.context, oldest->seat.sequence);
        oldest->seat.context->restore(oldest->seat.sequence, saved);
    });
}

// Has a place hold what a stream begins with, and returns how many of its tokens that is.
size_t Engine::take_over(Context & context, uint32_t sequence, Participant & one) {
    const std::vector<int32_t> & tokens = one.sequence.tokens();
    if (!one.sequence.options().reuse && !one.has_begun) {
        put_away(context, sequence);
        context.clear(sequence);
        return 0;
    }
    const auto saved = saved_for(context, sequence, one);
    const bool is_asked_for = saved == std::exchange(one.sequence.options().saved, nullptr);
    // What is left of it is most of what there was, or it is the same conversation.
    if (2 * context.n_kept_of(sequence, tokens) < context.decoded(sequence).size()) {
        put_away(context, sequence);
    }
    if (saved) {
        const Stopwatch watch;
        try {
            context.restore(sequence, *saved);
        } catch (const UnusableError &) {
            throw;
        } catch (const Error &) {
            if (is_asked_for) {
                throw;
            }
            prompt_cache_.remove(saved);  // it is read again
        }
        restored_bytes_per_s_ = static_cast<double>(saved->n_bytes()) / std::max(watch.seconds(), 1e-6);
        if (context.n_kept_of(sequence, tokens) == saved->tokens.size()) {
            prompt_cache_.remove(saved);  // it is all here, and kept again when it goes
        }
    }
    return context.keep(sequence, tokens);
}

// The saved sequence that is to take the place of what is there; null if that is as good.
std::shared_ptr<const SequenceState> Engine::saved_for(const Context & context, uint32_t sequence, Participant & one) {
    const std::vector<int32_t> & tokens = one.sequence.tokens();
    const size_t n_here = context.n_kept_of(sequence, tokens);
    const auto count = [&](const SequenceState & saved) {
        return saved.tokens.size() > context.n_ctx() ? 0 : context.n_kept_of(saved, tokens);
    };
    std::shared_ptr<const SequenceState> best = one.sequence.options().saved;
    size_t most = best ? count(*best) : 0;
    if (most <= n_here) {
        best = nullptr;
        most = n_here;
    }
    const double token_s = piece_size_.seconds_per_token();
    const auto count_cheap = [&](const SequenceState & saved) {
        const size_t n = count(saved);
        const double seconds = static_cast<double>(saved.n_bytes()) / restored_bytes_per_s_;
        const bool is_cheaper = n > n_here && (token_s == 0 || seconds < token_s * static_cast<double>(n - n_here));
        return is_cheaper ? n : 0;
    };
    const auto cached = prompt_cache_.is_on() ? prompt_cache_.best(count_cheap, most + few_tokens) : nullptr;
    return cached ? cached : best;
}

// Keeps a sequence that is about to be lost, if there is a budget for that.
void Engine::put_away(Context & context, uint32_t sequence) {
    const std::vector<int32_t> & tokens = context.decoded(sequence);
    const auto goes_back = [&](const SequenceState & saved, size_t n) { return context.goes_back(saved, n); };
    if (!prompt_cache_.is_on() || !context.may_come_back(sequence) || tokens.size() <= few_tokens ||
        prompt_cache_.has(tokens, goes_back) || !prompt_cache_.make_room(context.state_bytes(sequence))) {
        return;
    }
    try {
        prompt_cache_.add(context.save(sequence), goes_back);
    } catch (const std::bad_alloc &) {  // of RAM there is less than the budget
    }
}

// To the model, or away, after what it holds was kept.
void Engine::give_back(std::shared_ptr<Context> context) noexcept {
    try {
        context = model_.give_back(std::move(context));
        if (!context || !prompt_cache_.is_on() || model_.closed() || model_.turns().held_here()) {
            return;
        }
        const std::lock_guard turn(model_.turns());
        for (uint32_t sequence = 0; sequence < context->n_sequences(); ++sequence) {
            put_away(*context, sequence);
        }
    } catch (const std::exception &) {  // of a model that cannot be used, or a thread that was told to stop
    }
}

}  // namespace overspill
