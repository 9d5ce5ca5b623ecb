#include "base/process.h"

#include "base/error.h"

#include <ggml-threading.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

#ifndef _WIN32
#include <pthread.h>
#endif
#ifdef __linux__
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace overspill {

namespace {

std::atomic<uint32_t> forks{0};

constexpr const char * how_to_start_processes =
    "start processes with multiprocessing.get_context(\"spawn\"), and load the model in each of them";

#ifndef _WIN32
// Never destroyed: the process may be forked until it is gone.
std::vector<std::mutex *> & locks_of_all() {
    static auto * instance = new std::vector<std::mutex *>;
    return *instance;
}

void before_fork() {
    ggml_critical_section_start();
    for (std::mutex * one : locks_of_all()) {
        one->lock();
    }
}

void after_fork() {
    std::for_each(locks_of_all().rbegin(), locks_of_all().rend(), [](std::mutex * one) { one->unlock(); });
    ggml_critical_section_end();
}

void after_fork_in_child() {
    after_fork();
    forks.fetch_add(1, std::memory_order_relaxed);
}
#endif

#ifdef __linux__
// Of 107 KiB is one frame of a product of matrices, and llama.cpp's are above it.
constexpr size_t stack_bytes = 512 * 1024;

// The first byte of the frame is as far as the stack grows; the pages between take no memory until they are used.
__attribute__((noinline)) void use_stack() noexcept {
    std::array<volatile char, stack_bytes> frame;  // NOLINT: nothing but its first byte is touched
    frame[0] = 0;
}
#endif

}  // namespace

void reserve_main_stack() noexcept {
#ifdef __linux__
    rlimit limit{};
    if (getpid() == syscall(SYS_gettid) && getrlimit(RLIMIT_STACK, &limit) == 0 && limit.rlim_cur / 4 >= stack_bytes) {
        use_stack();
    }
#endif
}

void watch_forks([[maybe_unused]] std::vector<std::mutex *> locks) {
#ifndef _WIN32
    locks_of_all() = std::move(locks);
    pthread_atfork(before_fork, after_fork, after_fork_in_child);
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
