#include "base/interrupt.h"

#include <rpc_waiting.h>  // in cmake/

namespace overspill {

namespace {

std::atomic<bool (*)() noexcept> answer_of_told_to_stop{nullptr};

}  // namespace

bool told_to_stop() noexcept {
    const auto answer = answer_of_told_to_stop.load(std::memory_order_relaxed);
    return answer != nullptr && answer();
}

void answer_told_to_stop(bool (*answer)() noexcept) {
    answer_of_told_to_stop.store(answer, std::memory_order_relaxed);
#ifndef _WIN32
    overspill_answer_told_to_stop([] { return static_cast<int>(told_to_stop()); });
#endif
}

bool Interrupt::should_stop(const Poll & poll) {
    // Reading the clock before each of a small model's operations would cost a percent.
    constexpr unsigned asks_per_reading = 8;
    return cancelled() || (poll && ++n_asked_ % asks_per_reading == 0 && poll_now(poll));
}

bool Interrupt::should_stop_piece(const Poll & poll) {
    return cancelled() || (poll && poll_now(poll));
}

bool Interrupt::poll_now(const Poll & poll) {
    constexpr auto interval = std::chrono::milliseconds(50);
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_at_ < interval) {
        return false;
    }
    asked_at_ = now;
    return poll();
}

}  // namespace overspill
