#include "base/waiting.h"

#include <algorithm>
#include <chrono>
#include <thread>

#ifdef __linux__
#include <sys/resource.h>

#include <ctime>
#endif

namespace overspill {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// The clock is read once in so many turns.
constexpr uint32_t turns_per_look = 32;
// A longer time between two looks has not been spent spinning: it is another wait, or the core was taken away.
constexpr auto longest_look = microseconds(10);
// Half of the time for which another program has a core, where it is wanted. Parts of a product that differ in length
// take less.
constexpr auto long_for_a_part = microseconds(1500);
// A thread gets its core back after about so long, beside some busy programs.
constexpr double longest_absence_s = 0.02;
// Threads that run at the same time wait less for each other.
constexpr auto patience = microseconds(100);
// How often a waiting thread asks whether its core is wanted, by yielding: it has to wait then, and only then.
constexpr auto time_between_yields = microseconds(50);
constexpr auto slow_yield = microseconds(20);
// How long the answer holds: each yield costs a turn of the scheduler where the core is wanted.
constexpr auto wanted_for = milliseconds(200);
// A sleep is a part of the wait so far, so that not much more is lost by it. Linux adds 50 µs to each.
constexpr int part_of_wait = 8;
constexpr auto shortest_sleep = microseconds(20);
constexpr auto longest_sleep = milliseconds(1);
// Whoever has waited for so long has nothing to do for now, such as a thread that is left out of decoding.
constexpr auto long_wait = milliseconds(100);
constexpr auto long_sleep = milliseconds(20);

struct Wait {
    uint32_t n_turns = 0;
    Clock::time_point began = {};
    Clock::time_point looked = {};
    Clock::time_point yielded = {};
    Clock::time_point wanted_until = {};
    Clock::duration in_long_waits = {};

    void look() {
        const auto now = Clock::now();
        if (now - looked > longest_look) {
            began = looked = now;
        }
        const auto after = now - began < patience ? now : rest(now);
        if (after - began > long_for_a_part) {
            in_long_waits += after - std::max(looked, began + long_for_a_part);
        }
        looked = after;
    }

    // Returns the time after it.
    Clock::time_point rest(Clock::time_point now) {
        if (now < wanted_until) {
            const auto waited = now - began;
            std::this_thread::sleep_for(
                waited > long_wait ? long_sleep
                                   : std::clamp<Clock::duration>(waited / part_of_wait, shortest_sleep, longest_sleep));
            return Clock::now();
        }
        if (now - yielded < time_between_yields) {
            return now;
        }
        std::this_thread::yield();
        yielded = Clock::now();
        if (yielded - now > slow_yield) {
            wanted_until = yielded + wanted_for;
        }
        return yielded;
    }
};

thread_local Wait wait;

double thread_time_s() {
#ifdef __linux__
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
#else
    return 0;
#endif
}

// How often the system has taken its core from this thread to run another one; 0 where it does not tell.
int64_t n_times_preempted() {
#ifdef __linux__
    rusage usage{};
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
#else
    return 0;
#endif
}

}  // namespace

void rest_while_waiting() {
    if (++wait.n_turns % turns_per_look == 0) {
        wait.look();
    }
}

Disturbance::Disturbance() : n_preempted_(n_times_preempted()), computed_s_(thread_time_s()) {
    wait.in_long_waits = {};
}

double Disturbance::lost_s() const {
    const double waited_s = std::chrono::duration<double>(wait.in_long_waits).count();
    // Whoever waits for a device or for the disk does not compute either, but gives up its core itself.
    const double most_s = longest_absence_s * static_cast<double>(n_times_preempted() - n_preempted_);
    return std::max(waited_s, std::min(most_s, watch_.seconds() - (thread_time_s() - computed_s_)));
}

}  // namespace overspill
