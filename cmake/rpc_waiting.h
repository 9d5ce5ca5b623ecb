// Included by the two headers beside it: whoever waits for an RPC server asks now and then whether to go on, since a
// server that hangs would be waited for for ever.
//
// The question is a line of the log, which cpp/base/log.cpp answers in errno: that is the one way from here to whoever
// uses llama.cpp. A connection that is given up is lost, as if the server had hung up.
#pragma once

#ifndef _WIN32

#include "ggml-impl.h"

#include <poll.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

constexpr int overspill_asking_interval_ms = 100;

// Whether this thread was told to stop.
inline bool overspill_told_to_stop() {
    errno = 0;
    ggml_log_internal(GGML_LOG_LEVEL_NONE, "overspill: go on waiting?\n");
    return errno == ECANCELED;
}

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

#endif
