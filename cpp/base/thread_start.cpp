#include "base/thread_start.h"

#include <cstdlib>
#include <exception>
#include <system_error>
#include <utility>

namespace overspill {

namespace {

// The first use of one variable takes the memory of all of this library's.
thread_local volatile int used = 0;

// More than all of that needs, and so much that the heap has it for others when it is given back.
bool has_memory() noexcept {
    void * volatile probe = std::malloc(8192);
    std::free(probe);
    return probe != nullptr;
}

}  // namespace

void take_thread_memory() noexcept {
    used = std::uncaught_exceptions();
}

bool ThreadStart::take_memory() noexcept {
    const bool has = has_memory();
    if (has) {
        take_thread_memory();
    }
    const std::lock_guard lock(mutex_);
    has_memory_ = has;
    changed_.notify_one();  // under the lock: the other thread may end this object then
    return has;
}

bool ThreadStart::wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return has_memory_.has_value(); });
    return *has_memory_;
}

std::thread start_thread(std::function<void()> work) {
    ThreadStart start;
    std::thread thread([&start, work = std::move(work)] {
        if (start.take_memory()) {
            work();
        }
    });
    if (!start.wait()) {
        thread.join();
        throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
    }
    return thread;
}

}  // namespace overspill
