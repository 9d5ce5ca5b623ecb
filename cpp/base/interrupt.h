// What stops a step before its end.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>

namespace overspill {

// Whether this thread should give up waiting for another thread or another machine, since a signal has come. Whoever
// waits asks this every so often.
bool told_to_stop() noexcept;
// Who answers that. To be called once, before other threads run; until then the answer is no.
void answer_told_to_stop(bool (*answer)() noexcept);

// A flag that any thread sets, and a question asked now and then on the deciding thread (Python's: has a signal come?).
class Interrupt {
  public:
    // Ends the step that runs, and every later one. From any thread.
    void cancel() noexcept { cancelled_.store(true, std::memory_order_relaxed); }
    bool cancelled() const noexcept { return cancelled_.load(std::memory_order_relaxed); }

    // Asked at most every 50 ms during a step, on the thread that decodes; true ends the step.
    // Must not throw: it is called from within llama.cpp.
    using Poll = std::function<bool()>;

    // llama.cpp asks this before every operation of a graph on the CPU.
    bool should_stop(const Poll & poll);
    // The same before a piece of a graph on another device, which may take a second.
    bool should_stop_piece(const Poll & poll);

  private:
    bool poll_now(const Poll & poll);

    std::atomic<bool> cancelled_{false};
    unsigned n_asked_ = 0;
    std::chrono::steady_clock::time_point asked_at_{};
};

}  // namespace overspill
