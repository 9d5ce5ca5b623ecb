#include "generate/look_ahead.h"

#include "base/assertions.h"
#include "base/thread_start.h"

#include <chrono>
#include <system_error>
#include <utility>

namespace overspill {

bool LookAhead::start() {
    is_under_way_ = true;
    {
        const std::lock_guard lock(mutex_);
        state_ = State::wanted;
    }
    if (thread_.joinable()) {
        changed_.notify_all();
        return true;
    }
    try {
        thread_ = start_thread([this] { work(); });
    } catch (const std::system_error &) {
        is_under_way_ = false;
    }
    return is_under_way_;
}

void LookAhead::work() {
    const AssertionGuard guard;
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] { return state_ == State::wanted || state_ == State::over; });
        if (state_ == State::over) {
            return;
        }
        lock.unlock();
        Step done;
        std::exception_ptr error;
        try {
            done = take_step_();
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        step_ = std::move(done);
        error_ = error;
        if (state_ == State::wanted) {
            state_ = State::done;
        }
        changed_.notify_all();
    }
}

Step LookAhead::take(const Interrupt::Poll & poll) {
    constexpr auto interval = std::chrono::milliseconds(50);
    bool stopped = false;
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, interval, [this] { return state_ == State::done; })) {
        lock.unlock();  // the question may take the GIL
        if (!stopped && poll && poll()) {
            stopped = true;
            cancel_();
        }
        lock.lock();
    }
    state_ = State::idle;
    is_under_way_ = false;
    if (error_) {
        std::rethrow_exception(std::exchange(error_, nullptr));
    }
    if (stopped) {
        throw CancelledError("interrupted");  // though the step came to its end
    }
    return std::move(step_);
}

void LookAhead::stop() {
    if (!thread_.joinable()) {
        return;
    }
    cancel_();  // what it works on will not be wanted
    {
        const std::lock_guard lock(mutex_);
        state_ = State::over;
    }
    changed_.notify_all();
    thread_.join();
}

}  // namespace overspill
