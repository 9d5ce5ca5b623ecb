// Included by the two headers beside it: whoever waits for an RPC server asks now and then whether to go on, since a
// server that hangs would keep it for ever.
// A connection that is given up is lost, as if the server had hung up.
#pragma once

#ifndef _WIN32

#ifdef __cplusplus
extern "C" {
#endif

// In ggml-base, by cmake/rpc_waiting.c: cpp/base/interrupt.cpp says who answers whether this thread was told to stop.
__attribute__((visibility("default"))) void overspill_answer_told_to_stop(int (*answer)(void));
__attribute__((visibility("default"))) int overspill_told_to_stop(void);

#ifdef __cplusplus
}

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

constexpr int overspill_asking_interval_ms = 100;

// The threads, one of each connection, that were given up on and do not know it yet.
struct overspill_given_up {
    std::mutex mutex;
    std::vector<std::thread::id> threads;
    std::atomic<bool> any{false};

    void add(std::thread::id thread) {
        const std::lock_guard lock(mutex);
        threads.push_back(thread);
        any.store(true);
    }
    void remove(std::thread::id thread) {
        const std::lock_guard lock(mutex);
        threads.erase(std::remove(threads.begin(), threads.end(), thread), threads.end());
        any.store(!threads.empty());
    }
    // Whether it was this thread, which is forgotten then.
    bool take() {
        if (!any.load()) {
            return false;
        }
        const std::lock_guard lock(mutex);
        const auto one = std::find(threads.begin(), threads.end(), std::this_thread::get_id());
        if (one == threads.end()) {
            return false;
        }
        threads.erase(one);
        any.store(!threads.empty());
        return true;
    }
};

inline overspill_given_up & overspill_lost_threads() {
    static auto * instance = new overspill_given_up;  // threads may ask until the process is gone
    return *instance;
}

#endif  // C++

#endif
