#include "thread_tests.h"

#include "checks.h"

#include "base/waiting.h"
#include "device/thread_count.h"
#include "device/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/resource.h>
#endif

using namespace overspill;

// Each part is done once, by a thread of its own, and all are done when run() returns.
void test_thread_pool() {
    constexpr size_t n_threads = 3;
    const ThreadPool pool(n_threads, "a test");
    std::vector<size_t> parts(n_threads);
    for (size_t repeat = 0; repeat < 200; ++repeat) {
        const auto part = [&](size_t i, size_t n) { parts[i] = repeat + n; };
        pool.run(std::ref(part));
        check(parts == std::vector<size_t>(n_threads, repeat + n_threads), "each part is done, of so many");
    }
}

namespace {

// A machine on which half of the threads take all of the memory's speed, and a step base_s. Where it is busy,
// `best_busy` of them are fastest; with more, a step takes a quarter longer for each doubling.
struct Machine {
    int32_t n_most;
    double base_s;
    int32_t best_busy;
    std::mt19937 random{7};

    double step_s(int32_t n, bool is_busy) const {
        const int32_t n_running = is_busy ? std::min(n, best_busy) : n;
        const double alone_s = base_s * std::max(1.0, 0.5 * n_most / n_running);
        return alone_s * (1 + 0.25 * std::log2(static_cast<double>(n) / n_running));
    }

    // Decodes for so many seconds, and returns how long the steps took beside those of the best number.
    double decode(ThreadCount & count, double seconds, bool is_busy) {
        std::uniform_real_distribution<double> chance(0, 1);
        double took_s = 0, best_s = 0;
        while (took_s < seconds) {
            const double usual_s = step_s(count.now(), is_busy);
            const double spread = is_busy ? 0.2 * std::min(1.0, std::sqrt(0.01 / usual_s)) : 0;
            const double noise = 1 + spread * (2 * chance(random) - 1);
            const double step = usual_s * noise;
            count.took(step, 1, is_busy ? step * chance(random) : 0);
            took_s += step;
            best_s += step_s(is_busy ? best_busy : n_most, is_busy) * noise;
        }
        return took_s / best_s;
    }
};

}  // namespace

void test_thread_count() {
    for (const int32_t n_most : {1, 2, 3, 4, 6, 8, 12, 16, 64, 128}) {
        for (const double base_s : {0.0005, 0.004, 0.03}) {
            for (const int32_t best : std::set<int32_t>{(n_most + 7) / 8, (n_most + 1) / 2, n_most}) {
                Machine machine{n_most, base_s, best};
                ThreadCount count(n_most);
                const std::string what = std::to_string(n_most) + " threads, best " + std::to_string(best);
                for (int i = 0; i < 3; ++i) {
                    check(machine.decode(count, 2, false) < 1.001 || i > 0, what + ": all of them where none is busy");
                    // A second; where each step takes long, the trials of a few of them take longer.
                    const double soon_s = std::max(1.0, 60 * machine.step_s(best, true));
                    machine.decode(count, soon_s, true);
                    check(machine.decode(count, 10 * soon_s, true) < 1.25,
                          what + ": about as fast as the best, beside others");
                    machine.decode(count, soon_s, false);
                    check(count.now() == n_most, what + ": all of them soon after");
                }
            }
        }
    }
    // Single disturbances, which every system has, make no trials.
    ThreadCount count(16);
    for (int i = 0; i < 10000; ++i) {
        count.took(0.004, 1, i % 20 == 0 ? 0.003 : 0);
        check(count.now() == 16, "a disturbance now and then leaves all threads");
    }
    // Steps of several tokens take longer, which says nothing about threads; those between them do not hold it up.
    const auto fewer_are_faster = [](int32_t n) { return 0.001 * n; };
    for (int i = 0; i < 10000; ++i) {
        const double seconds = fewer_are_faster(count.now());
        count.took(seconds, 1, seconds / 2);
    }
    check(count.now() < 16, "fewer are taken where they are faster");
    for (int i = 0; i < 10000; ++i) {
        const uint32_t n_tokens = 1 + static_cast<uint32_t>(i % 2);
        count.took(n_tokens * 0.016 / count.now(), n_tokens, 0);
    }
    check(count.now() == 16, "all come back among steps of other numbers of tokens");
    // A stream that begins on a busy machine: its prompt, and few steps, each of which is long.
    ThreadCount anew(2);
    anew.took(0.155, 4, 0.087);
    for (int i = 0; i < 5; ++i) {
        anew.took(anew.now() == 2 ? 0.150 : 0.020, 1, anew.now() == 2 ? 0.090 : 0.016);
    }
    check(anew.now() == 1, "a stream that begins adapts within some steps");
    for (int i = 0; i < 20; ++i) {
        anew.took(0.020, 1, 0.016);
        check(anew.now() == 1, "and does not at once try again what was slower");
    }
}

// Whoever spins for long gives up its core where another thread wants it.
void test_resting() {
#ifdef __linux__
    // Given up by itself, and not taken away.
    const auto n_sleeps = [] {
        rusage usage{};
        getrusage(RUSAGE_THREAD, &usage);
        return static_cast<int64_t>(usage.ru_nvcsw);
    };
    std::atomic<bool> is_done{false};
    std::atomic<size_t> n_rested{0};
    const size_t n_threads = 2 * std::thread::hardware_concurrency() + 2;
    std::vector<std::thread> spinning;
    for (size_t i = 0; i < n_threads; ++i) {
        spinning.emplace_back([&] {
            const int64_t n_before = n_sleeps();
            bool has_rested = false;
            while (!is_done.load()) {
                for (int turn = 0; turn < 1000; ++turn) {
                    rest_while_waiting();
                }
                if (!has_rested && n_sleeps() > n_before) {
                    has_rested = true;
                    ++n_rested;
                }
            }
        });
    }
    // None of them ever would, if it only spun.
    for (int i = 0; i < 1000 && n_rested.load() < n_threads; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    is_done.store(true);
    for (std::thread & one : spinning) {
        one.join();
    }
    check(n_rested.load() == n_threads, "threads that spin beside others for long sleep now and then");
#endif
}
