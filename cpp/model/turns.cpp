#include "model/turns.h"

#include "base/error.h"

#include <algorithm>
#include <chrono>

namespace overspill {

void Turns::lock(const Interrupt * interrupt) {
    if (held_here()) {
        throw Error(
            "the model is busy with a step on this very thread: a signal handler or a callback "
            "that runs during a step cannot use the model");
    }
    constexpr auto interval = std::chrono::milliseconds(20);  // in which a cancelled step gives up
    std::unique_lock lock(mutex_);
    const uint64_t ticket = n_asked_++;
    waiting_.push_back(ticket);
    const auto my_turn = [&] { return !taken_ && waiting_.front() == ticket; };
    if (interrupt == nullptr) {
        next_.wait(lock, my_turn);
    }
    while (interrupt != nullptr && !next_.wait_for(lock, interval, my_turn)) {
        if (interrupt->cancelled()) {
            waiting_.erase(std::find(waiting_.begin(), waiting_.end(), ticket));
            next_.notify_all();
            throw CancelledError("interrupted");
        }
    }
    waiting_.erase(waiting_.begin());
    taken_ = true;
    owner_.store(std::this_thread::get_id(), std::memory_order_relaxed);
}

void Turns::unlock() {
    {
        const std::lock_guard lock(mutex_);
        owner_.store({}, std::memory_order_relaxed);
        taken_ = false;
    }
    next_.notify_all();
}

}  // namespace overspill
