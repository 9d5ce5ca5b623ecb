// The places of an engine's streams: sequences of its contexts.
#include "generate/engine.h"

#include "base/error.h"

#include <algorithm>
#include <utility>

namespace overspill {

namespace {

using Clock = std::chrono::steady_clock;

// Whoever has not asked for a token for so long gives its place to one that waits for it.
constexpr auto long_away = std::chrono::milliseconds(250);
// Places that are made for streams as they come.
constexpr uint32_t most_places = 16;

}  // namespace

void Engine::forget_waiting(Participant & one) {
    waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), &one), waiting_.end());
}

void Engine::free_place(Participant & one) {
    for (Place & place : places_) {
        place.taken_by = place.taken_by == &one ? nullptr : place.taken_by;
    }
    one.seat.reset();
}

// If nobody needs them any more.
std::vector<std::shared_ptr<Context>> Engine::take_contexts() {
    if (!members_.empty() || is_led_) {
        return {};
    }
    return remove_unused_places();
}

uint32_t Engine::n_needed(const Participant & one) const {
    const int64_t n_most = one.sequence.options().max_tokens;
    const auto n_ctx = static_cast<int64_t>(model_.n_ctx());
    const auto n_prompt = static_cast<int64_t>(one.sequence.n_prompt());
    return static_cast<uint32_t>(n_most < 0 ? n_ctx : std::min(n_ctx, n_prompt + std::min(n_most, n_ctx)));
}

void Engine::seat_waiting(Lock & lock) {
    while (!waiting_.empty()) {
        Participant & first = *waiting_.front();
        if (first.interrupt.cancelled()) {
            waiting_.pop_front();  // its own thread says so
            continue;
        }
        Place * place = place_for(first);
        if (place != nullptr) {
            waiting_.pop_front();
            seat_one(lock, first, *place);
            if (!run_.empty()) {
                return;
            }
        } else if (!make_places(lock) && !evict_idle()) {
            return;
        }
    }
}

// A free one: where the stream goes on with what was decoded there, or else what was used least recently.
Engine::Place * Engine::place_for(const Participant & one) {
    const std::vector<int32_t> & tokens = one.sequence.tokens();
    const bool reuse = one.sequence.options().reuse || one.has_begun;
    Place * oldest = nullptr;
    Place * best = nullptr;
    size_t most = 0;
    for (Place & place : places_) {
        const Context & context = *place.seat.context;
        if (place.taken_by != nullptr || context.n_ctx() < n_needed(one)) {
            continue;
        }
        const std::vector<int32_t> & decoded = context.decoded(place.seat.sequence);
        const auto used_at = [](const Place & which) { return which.seat.context->used_at(which.seat.sequence); };
        if (oldest == nullptr || used_at(place) < used_at(*oldest)) {
            oldest = &place;
        }
        const auto [end, unused] = std::mismatch(decoded.begin(), decoded.end(), tokens.begin(), tokens.end());
        const auto n_common = static_cast<size_t>(end - decoded.begin());
        if (reuse && n_common > most && 2 * n_common >= decoded.size()) {
            most = n_common;
            best = &place;
        }
    }
    return best != nullptr ? best : oldest;
}

void Engine::seat_one(Lock & lock, Participant & one, Place & place) {
    place.taken_by = &one;
    const std::shared_ptr<Participant> held = one.shared_from_this();
    one.is_in_run = true;
    run_.push_back(held);
    std::shared_ptr<Context> & context = place.seat.context;
    const uint32_t sequence = place.seat.sequence;
    lock.unlock();
    // Then it stays in run_, which ends the round.
    const auto give_up = [&] {
        lock.lock();
        free_place(one);
        one.to_remember = 0;
        const auto is_gone = [](const Place & which) { return !which.seat.context; };
        places_.erase(std::remove_if(places_.begin(), places_.end(), is_gone), places_.end());
    };
    try {
        if (context->n_sequences() == 1 && context.use_count() > 1) {
            // Logits of the stream before are still looked at: this one would write over them.
            context.reset();
            context = model_.take_context();
        }
        const Turn turn(model_.turns(), one.interrupt);
        const GenerationOptions & options = one.sequence.options();
        const size_t n_kept = take_over(*context, sequence, one);
        one.n_cached = one.has_begun ? one.n_cached : n_kept;
        // The next prompt may differ in its last tokens from this one, which ask for the reply.
        constexpr size_t n_of_question = 16;
        const size_t n_prompt = one.sequence.n_prompt();
        const bool remembers = options.reuse && context->needs_to_remember() && n_prompt > n_kept + n_of_question;
        one.to_remember = remembers ? n_prompt - n_of_question : 0;
        if (!context->can_drop()) {
            one.sequence.options().form.droppable.clear();
        }
    } catch (const CancelledError &) {
        give_up();
        if (one.interrupt.cancelled() || one.has_left) {
            return;  // its own thread says so
        }
        waiting_.push_front(&one);
        throw;
    } catch (...) {
        give_up();
        one.error = std::current_exception();
        one.changed.notify_all();
        return;
    }
    lock.lock();
    one.seat = place.seat;
    if (!one.has_left) {
        one.is_in_run = false;
        run_.clear();
    }
}

// Whether there are more places now than before, for streams that come together.
bool Engine::make_places(Lock & lock) {
    if (places_.empty()) {
        lock.unlock();
        const std::shared_ptr<Context> context = model_.take_context();
        lock.lock();
        add_places(context);
        return true;
    }
    if (model_.n_parallel() > 0) {
        return false;
    }
    // Streams that have decoded little move to the new places, which reads their tokens again; others stay.
    Run moving;
    size_t n_staying = 0;
    for (const Place & place : places_) {
        const Context & context = *place.seat.context;
        Participant * one = place.taken_by;
        if (one == nullptr) {
            continue;
        }
        // One that chooses its token just now is not looked at.
        const bool can_move =
            context.decoded(place.seat.sequence).size() <= context.n_batch() && (one->wants || !one->chooses_itself);
        if (can_move) {
            moving.push_back(one->shared_from_this());
        } else {
            ++n_staying;
        }
    }
    const auto n_eager = static_cast<size_t>(std::count_if(
        waiting_.begin(), waiting_.end(), [](Participant * one) { return one->sequence.options().eager; }));
    const size_t n_wanted = std::min(moving.size() + waiting_.size(),
                                     std::max<size_t>(most_places - std::min<size_t>(most_places, n_staying), n_eager));
    uint32_t n = 1;
    while (n < n_wanted) {
        n *= 2;
    }
    n = std::min(n, uint32_t{256});
    uint32_t n_most = 0;
    for (const auto & one : moving) {
        n_most = std::max(n_most, n_needed(*one));
    }
    for (size_t i = 0; i < waiting_.size() && i < n; ++i) {
        n_most = std::max(n_most, n_needed(*waiting_[i]));
    }
    // With some room, so that not each longer stream asks for new places.
    uint32_t n_ctx = 256;
    while (n_ctx < n_most) {
        n_ctx *= 2;
    }
    n_ctx = std::min(n_ctx, model_.n_ctx());
    if (n <= moving.size() || (n_refused_ != 0 && n >= n_refused_)) {
        return false;
    }
    lock.unlock();
    std::shared_ptr<Context> context;
    uint32_t n_tried = n;
    for (; n > moving.size() && !context; n /= 2) {
        n_tried = n;
        try {
            context = model_.make_batch_context(n, n_ctx);
        } catch (const ClosedError &) {
            throw;
        } catch (const UnusableError &) {
            throw;
        } catch (const CancelledError &) {
            throw;
        } catch (const Error &) {  // too little memory, in some words
        }
    }
    lock.lock();
    if (!context) {
        n_refused_ = n_tried;
        const bool could_have_one =
            waiting_.empty() || std::any_of(places_.begin(), places_.end(), [&](const Place & place) {
                return place.seat.context->n_ctx() >= n_needed(*waiting_.front());
            });
        if (could_have_one) {
            return false;
        }
        // The usual one, which all places that there are were made beside.
        lock.unlock();
        context = model_.take_context();
        moving.clear();
        lock.lock();
    }
    for (auto one = moving.rbegin(); one != moving.rend(); ++one) {
        if (!(*one)->has_left) {
            free_place(**one);
            waiting_.push_front(one->get());
        }
    }
    std::vector<std::shared_ptr<Context>> unused = remove_unused_places();
    add_places(context);
    lock.unlock();
    moving.clear();
    for (auto & one : unused) {
        give_back(std::move(one));
    }
    lock.lock();
    return true;
}

void Engine::add_places(const std::shared_ptr<Context> & context) {
    for (uint32_t i = 0; i < context->n_sequences(); ++i) {
        places_.push_back({{context, i}});
    }
}

// Returns the contexts that no stream has a place in.
std::vector<std::shared_ptr<Context>> Engine::remove_unused_places() {
    std::vector<std::shared_ptr<Context>> unused;
    const auto is_used = [this](const std::shared_ptr<Context> & which) {
        return std::any_of(places_.begin(), places_.end(), [&](const Place & place) {
            return place.seat.context == which && place.taken_by != nullptr;
        });
    };
    for (auto place = places_.begin(); place != places_.end();) {
        if (is_used(place->seat.context)) {
            ++place;
        } else {
            if (place->seat.sequence == 0) {
                unused.push_back(place->seat.context);
            }
            place = places_.erase(place);
        }
    }
    return unused;
}

// Takes a place from the stream that was not asked for the longest time, for one that is; it queues again when it is.
bool Engine::evict_idle() {
    const auto asking =
        std::find_if(waiting_.begin(), waiting_.end(), [](const Participant * one) { return one->wants; });
    const auto now = Clock::now();
    if (asking == waiting_.end()) {
        return false;
    }
    // Those of many prompts are not in each other's way: they are decoded to their ends, and then leave.
    const bool is_eager = (*asking)->sequence.options().eager;
    Participant * found = nullptr;
    for (const Place & place : places_) {
        Participant * one = place.taken_by;
        if (one != nullptr && place.seat.context->n_ctx() >= n_needed(**asking) &&
            !(is_eager && one->sequence.options().eager) && !one->wants && !one->is_in_run &&
            now - one->seen_at > long_away && (found == nullptr || one->seen_at < found->seen_at)) {
            found = one;
        }
    }
    if (found == nullptr) {
        return false;
    }
    Participant * first = *asking;
    waiting_.erase(asking);
    waiting_.push_front(first);
    free_place(*found);
    return true;
}

}  // namespace overspill
