// The threads that compute on the CPU.
#pragma once

#include "base/assertions.h"
#include "base/waiting.h"
#include "device/thread_count.h"

#include <ggml-cpp.h>
#include <ggml-cpu.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>

namespace overspill {

class ThreadPool {
  public:
    // `owner` is what computes with it, for messages: "the model x.gguf". `adapts` is whether fewer of them decode
    // while other programs have their cores. Throws Error if there are no such threads to be had.
    ThreadPool(int32_t n_threads, std::string owner, bool adapts = false);
    ~ThreadPool() = default;
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool & operator=(const ThreadPool &) = delete;

    ggml_threadpool * get() const { return threads_.get(); }
    int32_t size() const { return n_threads_; }

    // How many of them decode a token; where that adapts, by what decoded() is told of the one before.
    int32_t n_decoding() const { return count_.now(); }
    bool adapts() const { return adapts_; }
    void decoded(uint32_t n_tokens, double seconds, const Disturbance & disturbance) {
        count_.took(seconds, n_tokens, disturbance.lost_s());
    }

    // Whether an assertion of llama.cpp has failed in use(): the threads are gone then.
    bool failed() const noexcept { return team_->failed(); }
    // Throws UnusableError if so.
    void check() const;

    // Does work of llama.cpp that may compute with the threads; one thread does at a time. Throws UnusableError if an
    // assertion fails in it, and from then on. For other work, check() and an AssertionGuard will do.
    template <typename Work>
    auto use(Work && work) const {
        check();
        const Team::Scope scope(team_);
        const AssertionGuard guard;
        try {
            // llama.cpp catches exceptions in some of its functions.
            if constexpr (std::is_void_v<decltype(work())>) {
                work();
                check();
            } else {
                auto result = work();
                check();
                return result;
            }
        } catch (const AssertionFailed &) {
            check();
            throw;
        }
    }

    using Part = std::function<void(size_t i, size_t n)>;
    // Calls part(i, n) on each of the n threads that decode, at the same time; it must not throw. As use() does.
    void run(const Part & part) const;

  private:
    std::shared_ptr<Team> team_ = std::make_shared<Team>();
    std::string owner_;
    int32_t n_threads_;
    bool adapts_;
    ThreadCount count_;
    struct Free {
        void operator()(ggml_threadpool * threads) const;
    };
    std::unique_ptr<ggml_threadpool, Free> threads_;
    ggml_backend_ptr backend_;
    ggml_backend_set_n_threads_t set_n_threads_ = nullptr;
    ggml_context_ptr graph_memory_;
    ggml_cgraph * graph_ = nullptr;  // of one node, which calls what run() was given
    // They order what is written before run(), by the parts, and after it. ggml's own barriers do so as well, but
    // ThreadSanitizer does not see those.
    mutable std::atomic<const Part *> part_{nullptr};
    mutable std::atomic<int32_t> n_done_{0};
};

}  // namespace overspill
