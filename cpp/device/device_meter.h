// How fast a device computes: what the planner's predictions are made of. Graphs of one token, as llama.cpp computes
// them, and operations of a prompt's batches.
#pragma once

#include "base/error.h"
#include "base/process.h"
#include "device/devices.h"
#include "device/rpc.h"
#include "device/thread_pool.h"
#include "device/weights.h"
#include "product/product_graphs.h"

#include <ggml-cpp.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace overspill {

struct MeterOptions {
    int32_t n_threads = 1;                   // of the CPU
    uint64_t working_set_bytes = 128 << 20;  // of weights that are cycled through, so that no cache holds them
    std::vector<std::string> gpus = {};  // that hold parts of the model, too: they decide the buffers of the CPU's part
    double budget_s = 0.08;  // for each measurement, after a first run; 0: one run more, else at least three
};

struct WeightRate {
    double bytes_per_s;
    std::string buffer_type;  // in which the weights were, llama.cpp's choice
    std::string kernels;      // that multiplied: "llama.cpp", or the instruction set of our products
};

struct LinkRates {
    double to_device_bytes_per_s;
    double from_device_bytes_per_s;
};

// Takes turns if several threads use it. No method takes long, so there is no way to interrupt one. Where an assertion
// of llama.cpp fails in one, it throws UnusableError, and so do all from then on. In a process that was forked since it
// was made, they throw Error.
class DeviceMeter {
  public:
    // `device` by llama.cpp's name. Throws std::invalid_argument, or Error if the device cannot be used.
    DeviceMeter(const std::string & device, MeterOptions options);

    // What the CPU multiplies with from now on; at first as "auto" and nullopt have it.
    // `kernels`: "auto" for the best of ours, "llama.cpp", or an instruction set of ours. `repack`: whether weights are
    // in llama.cpp's repacked layouts, where it has one; nullopt: where a model's are by default. With true,
    // llama.cpp's no_host. Throws std::invalid_argument.
    void use_products(const std::string & kernels, std::optional<bool> repack);

    // Reading cold weights for `n_tokens` at once, which use the same experts: bytes of weights over the time of the
    // operation, its fixed cost included. Large matrices are measured by a part of their rows, and of their experts.
    // Throws Error if there is no memory, or the device cannot do it.
    WeightRate weight_rate(const std::string & type, int64_t n_in, int64_t n_out, int64_t n_experts, int64_t n_used,
                           int64_t n_tokens = 1);

    // Attention of one token to a KV cache of `n_kv` tokens, flash attention as llama.cpp has it: bytes of the cache
    // over the time. Throws Error if the device has none for this type.
    double attention_bytes_per_s(const std::string & type, int64_t n_heads, int64_t n_heads_kv, int64_t head_width,
                                 int64_t n_kv);

    // Floating-point operations per second of the product of a batch with the same weights, in the device's own memory:
    // 2 n_in n_out for each token and expert that it uses. Each expert gets its share of the rows. Measured by as many
    // of the matrix's rows as take some hundredths of a second.
    double batch_flops(const std::string & type, int64_t n_in, int64_t n_out, int64_t n_experts, int64_t n_used,
                       int64_t n_tokens);

    // The same of causal flash attention of a batch to its own tokens: 4 head_width for each head and each pair of a
    // token and one that it looks at. Measured by as many heads.
    double attention_flops(const std::string & type, int64_t n_heads, int64_t n_heads_kv, int64_t head_width,
                           int64_t n_tokens);

    // One of a chain of small operations on a vector of `n_embd` floats.
    double operation_s(int64_t n_embd);

    // What it costs that the computation moves from the CPU to the device and back: waiting, launching, copies of
    // n_embd floats, one there and two back. 0 for the CPU.
    double visit_s(int64_t n_embd);

    // What an exchange of a token with experts in the device's memory costs: n_embd floats from RAM and the numbers of
    // n_used experts there, their gated feed-forward of n_ff floats, the launch, and n_embd floats of each back. 0 for
    // the CPU. Throws Error if there is no memory, or the device cannot do it.
    double exchange_s(const std::string & type, int64_t n_embd, int64_t n_ff, int64_t n_used);

    // Reading memory from one end to the other, with n_threads: what no computation on the CPU can be faster than.
    // Throws std::invalid_argument for other devices.
    double memory_bytes_per_s();

    // Copies of `n_bytes`, of fewer over a slow link, between the device and memory that no cache holds: ordinary
    // memory, or what the device's driver gives out as pinned, where it does. Infinity for the CPU.
    LinkRates link_rates(uint64_t n_bytes, bool pinned);

  private:
    struct Weights;
    struct Attention;
    using Build = std::function<ggml_tensor *(ggml_context *, size_t)>;
    // Seconds of one operation, given how many there are and how one is built.
    using Timing = std::function<double(size_t, const Build &)>;
    struct BatchTime {
        double n_operations;
        double seconds;
    };
    using MeasureBatch = std::function<BatchTime(int64_t, const Timing &)>;

    // Lets go of what a device holds, unless its driver would fail, since an assertion has failed before: then it
    // stays.
    template <typename Deleter>
    struct UnlessBroken {
        const DeviceMeter * meter;
        template <typename Held>
        void operator()(Held * held) const {
            if (!meter->is_broken()) {
                Deleter()(held);
            }
        }
    };
    // Of one of ggml-cpp.h's pointers.
    template <typename Pointer>
    using Held = std::unique_ptr<typename Pointer::element_type, UnlessBroken<typename Pointer::deleter_type>>;
    using HeldBuffer = Held<ggml_backend_buffer_ptr>;
    template <typename Pointer>
    Held<Pointer> held(typename Pointer::pointer made) const {
        return {made, {this}};
    }
    bool is_broken() const;
    template <typename Work>
    auto measure(const char * activity, Work && work);

    ggml_backend_buffer_t working_set(ggml_backend_buffer_type_t type);
    std::vector<ggml_tensor *> fill(ggml_backend_buffer_t buffer, const std::function<ggml_tensor *()> & make);
    HeldBuffer allocate(ggml_context * context);
    void compute(ggml_cgraph * graph);
    Error no_memory() const;
    void check_server() const { servers_->check(name_ + " was measured"); }
    double graph_s(size_t n_operations, size_t n_distinct, double budget_s, const Build & build);
    double average_s(size_t n_operations, size_t n_distinct, const Build & build);
    void set_products(const ProductSet * set);
    bool is_product_ours(const Build & build);
    double batch_rate(int64_t n, int64_t unit, const MeasureBatch & measure);
    Weights lay_out(WeightUse use);
    static Attention checked_attention(const std::string & type, int64_t n_heads, int64_t n_heads_kv,
                                       int64_t head_width);
    double attention_s(const Attention & use, const std::vector<ggml_fp16_t> & mask_values, const Timing & seconds);

    const Origin origin_;
    std::mutex mutex_;
    std::string name_;
    MeterOptions options_;
    ggml_backend_dev_t device_;
    std::vector<ggml_backend_dev_t> gpus_;
    std::unique_ptr<const RpcServers> servers_;
    std::unique_ptr<const ThreadPool> threads_;
    const ProductSet * product_set_ = nullptr;  // null: llama.cpp's
    std::unique_ptr<ProductGraphs> products_;
    std::optional<bool> repack_;
    ggml_backend_ptr cpu_;
    Held<ggml_backend_ptr> other_;  // null if the device is the CPU
    ggml_backend_t backend_;        // the device's
    std::map<ggml_backend_buffer_type_t, HeldBuffer> working_sets_;
};

}  // namespace overspill
