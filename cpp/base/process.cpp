#include "base/process.h"

#include "base/error.h"
#include "base/log.h"

#include <ggml-threading.h>

#include <atomic>

#ifndef _WIN32
#include <pthread.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace overspill {

namespace {

std::atomic<uint32_t> forks{0};

constexpr const char * how_to_start_processes =
    "start processes with multiprocessing.get_context(\"spawn\"), and load the model in each of them";

#ifndef _WIN32
// Locks that every model of the child needs as well: nobody else has them when the process is forked.
void before_fork() {
    ggml_critical_section_start();
    log_mutex().lock();
}

void after_fork() {
    log_mutex().unlock();
    ggml_critical_section_end();
}

void after_fork_in_child() {
    after_fork();
    forks.fetch_add(1, std::memory_order_relaxed);
}
#endif

}  // namespace

void watch_forks() {
#ifndef _WIN32
    pthread_atfork(before_fork, after_fork, after_fork_in_child);
#endif
}

void return_freed_memory() {
#ifdef __GLIBC__
    // Otherwise glibc raises its thresholds to 32 and 64 MiB, and each of its arenas keeps so much: after 60 loads of a
    // model of 13 MB by 12 threads, a process had 229 MB, and has 78 MB with these.
    constexpr int large_bytes = 4 << 20;
    mallopt(M_MMAP_THRESHOLD, large_bytes);
    mallopt(M_TRIM_THRESHOLD, 2 * large_bytes);
#endif
}

void check_not_forked(const std::string & what) {
    if (n_forks() > 0) {
        throw Error(what + " cannot be used in a process that was forked after overspill was imported: " +
                    how_to_start_processes);
    }
}

uint32_t n_forks() noexcept {
    return forks.load(std::memory_order_relaxed);
}

void Origin::check(const char * what) const {
    if (!is_here()) {
        throw Error(std::string(what) + " was made before this process was forked, and its threads are not here: " +
                    how_to_start_processes);
    }
}

std::unique_lock<std::mutex> Origin::lock(std::mutex & mutex) const {
    if (is_here()) {
        return std::unique_lock(mutex);
    }
    std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) {
        check("what this belongs to");
    }
    return lock;
}

}  // namespace overspill
