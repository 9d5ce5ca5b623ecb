// Between the pieces of a graph: llama.cpp asks nobody there, but computes each with a function of its backend. These
// functions are wrapped, so that a prompt can be ended in the middle of a batch, each model has its own say in which
// batches a device takes over, and the CPU computes products as ours.
#pragma once

#include "base/interrupt.h"
#include "product/product_graphs.h"

#include <cstdint>
#include <mutex>

namespace overspill {

// From now on, what devices compute asks the scope of its thread. Of devices that became known since the last call,
// too. Cheap; from any thread.
void hook_devices();
// Held for that; for whoever forks the process.
std::mutex & hooking_mutex() noexcept;

// What llama.cpp computes or plans on this thread while this exists. The innermost counts.
class ComputeScope {
  public:
    // From `offload_min_batch` tokens on, devices take over operations with weights in RAM; 0: as the backend has it.
    // With `products`, the CPU computes what they put in place of a graph.
    ComputeScope(int32_t offload_min_batch, ProductGraphs * products)
        : ComputeScope(offload_min_batch, products, nullptr, nullptr) {}
    // What is computed is aborted before the first piece for which the interrupt says so.
    ComputeScope(int32_t offload_min_batch, ProductGraphs * products, Interrupt & interrupt,
                 const Interrupt::Poll & poll)
        : ComputeScope(offload_min_batch, products, &interrupt, &poll) {}
    ~ComputeScope();
    ComputeScope(const ComputeScope &) = delete;
    ComputeScope & operator=(const ComputeScope &) = delete;

    // --- for the wrapped functions

    bool should_stop() const { return interrupt_ != nullptr && interrupt_->should_stop_piece(*poll_); }
    int32_t offload_min_batch() const { return offload_min_batch_; }
    ProductGraphs * products() const { return products_; }

  private:
    ComputeScope(int32_t offload_min_batch, ProductGraphs * products, Interrupt * interrupt,
                 const Interrupt::Poll * poll);

    int32_t offload_min_batch_;
    ProductGraphs * products_;
    Interrupt * interrupt_;
    const Interrupt::Poll * poll_;
    const ComputeScope * outer_;
};

}  // namespace overspill
