// Whose step of a model it is.
#pragma once

#include "base/interrupt.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace overspill {

// A lock that is served in the order of asking, so that a stream in a tight loop does not
// starve the others. Asking twice on one thread throws Error, where a mutex would wait for
// ever: a signal handler may run in the middle of a step.
class Turns {
  public:
    // Throws CancelledError if it is cancelled before its turn has come; null waits as long as it takes.
    void lock(const Interrupt * interrupt = nullptr);
    void unlock();
    bool held_here() const { return owner_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }

  private:
    std::mutex mutex_;
    std::condition_variable next_;
    uint64_t n_asked_ = 0;
    std::vector<uint64_t> waiting_;  // tickets, the first served next; few, and its memory is kept
    bool taken_ = false;
    std::atomic<std::thread::id> owner_{};
};

// A turn that is waited for, and given up when the step is cancelled: whoever cancels it may be the one who has
// the turn now.
class Turn {
  public:
    Turn(Turns & turns, const Interrupt & interrupt) : turns_(turns) { turns_.lock(&interrupt); }
    ~Turn() { turns_.unlock(); }
    Turn(const Turn &) = delete;
    Turn & operator=(const Turn &) = delete;

  private:
    Turns & turns_;
};

}  // namespace overspill
