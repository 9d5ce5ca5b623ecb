#include "model/turns.h"

#include "base/error.h"

#include <algorithm>
#include <chrono>

namespace overspill {

void Turns::lock(const Interrupt * interrupt) {
    origin_.check(what_);
    if (held_here()) {
        throw_in_a_step();
    }
    constexpr auto interval = std::chrono::milliseconds(20);  // in which a cancelled step gives up
    const auto me = std::this_thread::get_id();               // which waits once at a time
    std::unique_lock lock(mutex_);
    waiting_.push_back(me);
    const auto my_turn = [&] { return !taken_ && waiting_.front() == me; };
    while (!my_turn() && !next_.wait_for(lock, interval, my_turn)) {
        lock.unlock();  // the question may run code of Python's
        const bool give_up = (interrupt != nullptr && interrupt->cancelled()) || told_to_stop();
        lock.lock();
        if (give_up) {
            waiting_.erase(std::find(waiting_.begin(), waiting_.end(), me));
            next_.notify_all();
            throw CancelledError("interrupted");
        }
    }
    waiting_.erase(waiting_.begin());
    taken_ = true;
    owner_.store(me, std::memory_order_relaxed);
}

void Turns::throw_in_a_step() const {
    throw Error(std::string(what_) +
                " is in the middle of a step on this very thread: a signal handler or a callback that runs during a "
                "step cannot use it");
}

bool Turns::try_lock() {
    if (!origin_.is_here()) {
        return false;
    }
    const std::lock_guard lock(mutex_);
    if (taken_ || !waiting_.empty()) {
        return false;
    }
    taken_ = true;
    owner_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    return true;
}

void Turns::unlock() {
    {
        const std::lock_guard lock(mutex_);
        owner_.store({}, std::memory_order_relaxed);
        taken_ = false;
    }
    next_.notify_all();
}

bool Turns::held_here() const {
    const auto me = std::this_thread::get_id();
    if (owner_.load(std::memory_order_relaxed) == me) {
        return true;
    }
    const std::lock_guard lock(mutex_);
    return std::find(waiting_.begin(), waiting_.end(), me) != waiting_.end();
}

}  // namespace overspill
