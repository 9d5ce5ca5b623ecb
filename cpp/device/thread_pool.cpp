#include "device/thread_pool.h"

#include "device/devices.h"
#include "device/out_of_memory.h"

#include <utility>

namespace overspill {

ThreadPool::ThreadPool(int32_t n_threads, std::string owner, bool adapts)
    : owner_(std::move(owner)), n_threads_(n_threads), adapts_(adapts && n_threads > 1), count_(n_threads) {
    const auto create = cpu_function<decltype(&ggml_threadpool_new)>("ggml_threadpool_new");
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    try {
        const Team::Scope scope(team_);
        const AssertionGuard guard;
        threads_.reset(create(&params));
    } catch (const AssertionFailed &) {
        throw Error("the system does not give " + std::to_string(n_threads) +
                    " threads; a smaller n_threads needs less");
    }
    backend_.reset(ggml_backend_dev_init(cpu_device(), nullptr));
    set_n_threads_ = cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads");
    cpu_function<decltype(&ggml_backend_cpu_set_threadpool)>("ggml_backend_cpu_set_threadpool")(backend_.get(),
                                                                                                threads_.get());
    constexpr size_t n_nodes = 1;
    ggml_init_params memory{};
    memory.mem_size = n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, /*grads =*/false);
    memory.no_alloc = true;
    graph_memory_.reset(ggml_init(memory));
    graph_ = ggml_new_graph_custom(graph_memory_.get(), n_nodes, /*grads =*/false);
    const auto call = [](ggml_tensor * /*node*/, int i, int n, void * data) {
        const auto & pool = *static_cast<const ThreadPool *>(data);
        (*pool.part_.load(std::memory_order_acquire))(static_cast<size_t>(i), static_cast<size_t>(n));
        pool.n_done_.fetch_add(1, std::memory_order_release);
    };
    ggml_build_forward_expand(graph_, ggml_custom_4d(graph_memory_.get(), GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, call,
                                                     GGML_N_TASKS_MAX, this));
    team_->end_others = [this] { threads_.reset(); };
}

void ThreadPool::Free::operator()(ggml_threadpool * threads) const {
    cpu_function<decltype(&ggml_threadpool_free)>("ggml_threadpool_free")(threads);
}

void ThreadPool::run(const Part & part) const {
    part_.store(&part, std::memory_order_release);
    use([&] {
        set_n_threads_(backend_.get(), n_decoding());
        ggml_backend_graph_compute(backend_.get(), graph_);
    });
    static_cast<void>(n_done_.load(std::memory_order_acquire));
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
