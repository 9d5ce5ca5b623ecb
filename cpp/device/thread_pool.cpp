#include "device/thread_pool.h"

#include "device/devices.h"
#include "device/out_of_memory.h"

#include <utility>

namespace overspill {

ThreadPool::ThreadPool(int32_t n_threads, std::string owner) : owner_(std::move(owner)) {
    const auto create = cpu_function<decltype(&ggml_threadpool_new)>("ggml_threadpool_new");
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    try {
        const Team::Scope scope(team_);
        const AssertionGuard guard;
        threads_ = create(&params);
    } catch (const AssertionFailed &) {
        throw Error("the system does not give " + std::to_string(n_threads) +
                    " threads; a smaller n_threads needs less");
    }
    team_->end_others = [this] {
        cpu_function<decltype(&ggml_threadpool_free)>("ggml_threadpool_free")(std::exchange(threads_, nullptr));
    };
}

ThreadPool::~ThreadPool() {
    if (threads_ != nullptr) {
        team_->end_others();
    }
}

void ThreadPool::check() const {
    if (failed() && is_for_want_of_memory(team_->why())) {
        throw ram_refused(owner_ + " cannot be used any more, and must be loaded anew: ");
    }
    if (failed()) {
        throw UnusableError(owner_ + " cannot be used any more, since llama.cpp failed while " + team_->why());
    }
}

}  // namespace overspill
