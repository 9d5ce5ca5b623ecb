// The least that a decode loop on llama.h can be, behind C functions for ctypes: no sampler, no text, no options.
// What our stream takes longer than this is its own cost.
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <llama.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

namespace {

template <auto free>
struct Deleter {
    template <typename T>
    void operator()(T * object) const {
        free(object);
    }
};

struct Loop {
    std::unique_ptr<llama_model, Deleter<llama_model_free>> model;
    std::unique_ptr<ggml_threadpool, Deleter<ggml_threadpool_free>> threadpool;
    std::unique_ptr<llama_context, Deleter<llama_free>> context;  // the first to go
};

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" {

// Null if it does not load. `patterns[i]` goes to the device of the name `devices[i]`.
Loop * minimal_loop_open(const char * path, uint32_t n_ctx, int32_t n_threads, int32_t n_gpu_layers,
                         const char ** patterns, const char ** devices, size_t n_overrides) {
    auto loop = std::make_unique<Loop>();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = n_gpu_layers;
    std::vector<llama_model_tensor_buft_override> overrides;
    for (size_t i = 0; i < n_overrides; ++i) {
        overrides.push_back({patterns[i], ggml_backend_dev_buffer_type(ggml_backend_dev_by_name(devices[i]))});
    }
    overrides.push_back({nullptr, nullptr});
    model_params.tensor_buft_overrides = overrides.data();
    loop->model.reset(llama_model_load_from_file(path, model_params));
    if (!loop->model) {
        return nullptr;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = n_ctx;
    params.n_batch = std::min(n_ctx, 512U);
    params.n_ubatch = params.n_batch;
    params.n_outputs_max = 1;
    params.swa_full = false;
    params.n_threads = n_threads;
    params.n_threads_batch = n_threads;
    loop->context.reset(llama_init_from_model(loop->model.get(), params));
    ggml_threadpool_params pool = ggml_threadpool_params_default(n_threads);
    loop->threadpool.reset(ggml_threadpool_new(&pool));
    if (!loop->context || !loop->threadpool) {
        return nullptr;
    }
    llama_attach_threadpool(loop->context.get(), loop->threadpool.get(), loop->threadpool.get());
    return loop.release();
}

void minimal_loop_close(Loop * loop) {
    const std::unique_ptr<Loop> owner(loop);
}

// Decodes the prompt, and n - 1 tokens after it: the most likely ones, which it puts into `tokens`, if `greedy` is set,
// and otherwise those that are in there, whose logits nobody looks at. Puts the seconds until the logits after the
// prompt into `seconds`, and those of each decode after it; false if one fails.
bool minimal_loop_run(Loop * loop, const int32_t * prompt, int32_t n_prompt, int32_t n, bool greedy, int32_t * tokens,
                      double * seconds) {
    llama_context * context = loop->context.get();
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(loop->model.get()));
    llama_memory_clear(llama_get_memory(context), false);
    std::vector<int32_t> input(prompt, prompt + n_prompt);
    llama_batch batch = llama_batch_get_one(input.data(), n_prompt);
    double before = now_s();
    for (int32_t i = 0; i < n; ++i) {
        if (llama_decode(context, batch) != 0) {
            return false;
        }
        const float * logits = llama_get_logits_ith(context, -1);
        if (greedy) {
            tokens[i] = static_cast<int32_t>(std::max_element(logits, logits + n_vocab) - logits);
        }
        batch = llama_batch_get_one(&tokens[i], 1);
        const double after = now_s();
        seconds[i] = after - before;
        before = after;
    }
    return true;
}

}  // extern "C"
