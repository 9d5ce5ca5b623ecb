// Whose step of a model it is.
#pragma once

#include "base/interrupt.h"
#include "base/process.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace overspill {

// A lock that is served in the order of asking, so that a stream in a tight loop does not
// starve the others. Asking twice on one thread throws Error, where a mutex would wait for
// ever: a signal handler may run in the middle of a step, or while one is waited for. So does asking in a process that
// was forked since.
class Turns {
  public:
    // `what` takes turns, for messages: "the model".
    explicit Turns(const char * what) : what_(what) {}

    // Throws CancelledError if it is cancelled before its turn has come, or this thread was told to stop; null only
    // asks for the latter.
    void lock(const Interrupt * interrupt = nullptr);
    // Without waiting; false if a thread has the turn, or waits for it, or in a process that was forked since.
    bool try_lock();
    void unlock();
    // What lock() throws then.
    [[noreturn]] void throw_in_a_step() const;
    // Whether this thread has the turn, or is waiting for it.
    bool held_here() const;
    // Whether it has the turn.
    bool owned_here() const { return owner_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }
    // Whether the process was not forked since.
    bool is_here() const noexcept { return origin_.is_here(); }

  private:
    const char * what_;
    const Origin origin_;
    mutable std::mutex mutex_;
    std::condition_variable next_;
    std::vector<std::thread::id> waiting_;  // the first is served next; few, and its memory is kept
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
