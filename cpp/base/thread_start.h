// Starting threads where memory is short. What a thread keeps for itself (its variables, and what it throws) is taken
// at its first use, and the system's library ends the process if it cannot be had.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>

namespace overspill {

// Takes that memory, so that an exception for want of memory can be thrown on this thread later. Cheap when it is
// taken.
void take_thread_memory() noexcept;

// One thread that starts another: the new one looks for that memory first of all, and says whether it has it.
class ThreadStart {
  public:
    // On the new thread. False: there is none, and the thread must end.
    bool take_memory() noexcept;
    // On the thread that has started it; waits for the answer.
    bool wait();

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::optional<bool> has_memory_;
};

// Throws std::system_error where the system has no thread, or no memory for one.
std::thread start_thread(std::function<void()> work);

}  // namespace overspill
