// What belongs to the whole process: the stack of its main thread, and its forks. In the child of one, only the thread
// that forked runs, and what the others had locked stays locked.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace overspill {

// To be called once, before other threads run. `locks` are those that every model of a child needs as well, in the
// order in which they are taken where one holds several: nobody else has them when the process is forked.
void watch_forks(std::vector<std::mutex *> locks);

// Throws Error in a process that was forked after overspill was imported; `what` begins its text: "the device X".
void check_not_forked(const std::string & what);

// On the main thread, lets its stack have the room that native work needs. It grows when it is used, and the system
// ends a process whose stack cannot grow for want of memory; other threads' stacks have their room from the start.
void reserve_main_stack() noexcept;

// How often this process, or one that it comes from, was forked since.
uint32_t n_forks() noexcept;

// The process in which something was made.
class Origin {
  public:
    bool is_here() const noexcept { return n_forks_ == n_forks(); }
    // Throws Error in a process that was forked since; `what` begins its text.
    void check(const char * what) const;
    // Locks. Where a thread of the process before the fork may have the lock for ever, it throws Error instead.
    std::unique_lock<std::mutex> lock(std::mutex & mutex) const;

  private:
    const uint32_t n_forks_ = n_forks();
};

// Owns what has threads, locks or connections. A process that was forked since leaves it alone: its destructor would
// wait for threads that are not there.
template <typename T>
std::shared_ptr<T> left_alone_by_forks(std::unique_ptr<T> made) {
    return {made.release(), [origin = Origin()](T * object) {
                if (origin.is_here()) {
                    delete object;
                }
            }};
}

}  // namespace overspill
