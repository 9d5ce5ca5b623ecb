// The next step of a generation, taken on a thread of its own while the caller is busy with the present one.
#pragma once

#include "base/interrupt.h"
#include "generate/step.h"

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace overspill {

class LookAhead {
  public:
    // `cancel` ends a step that is being taken; from any thread.
    LookAhead(std::function<Step()> take_step, std::function<void()> cancel)
        : take_step_(std::move(take_step)), cancel_(std::move(cancel)) {}
    LookAhead(const LookAhead &) = delete;
    LookAhead & operator=(const LookAhead &) = delete;

    // Starts on the next step; false if no thread is to be had. The first time, it starts the thread.
    bool start();
    // Whether one was started and not taken.
    bool is_under_way() const { return is_under_way_; }
    // That step, when it is done. Where `poll` says stop, cancels it and throws CancelledError.
    Step take(const Interrupt::Poll & poll);
    // Ends the thread, if there is one, and cancels what it works on. To be called before this goes.
    void stop();

  private:
    enum class State { idle, wanted, done, over };
    void work();

    std::function<Step()> take_step_;
    std::function<void()> cancel_;
    bool is_under_way_ = false;
    std::thread thread_;
    std::mutex mutex_;  // guards what follows
    std::condition_variable changed_;
    State state_ = State::idle;
    Step step_;
    std::exception_ptr error_;
};

}  // namespace overspill
