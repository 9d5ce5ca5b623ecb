// Which experts each layer uses, as llama.cpp's own nodes say: experts MODEL PROMPT_TOKENS TOKEN...
// The first PROMPT_TOKENS tokens are decoded in one batch, the others one by one. A line for each token and layer:
// their numbers, then the experts.
#include <ggml.h>
#include <llama.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

struct Batch {
    int64_t first, n;
};

bool look(ggml_tensor * node, bool is_question, void * data) {
    int layer = 0;
    if (std::sscanf(node->name, "ffn_moe_topk-%d", &layer) != 1) {
        return false;
    }
    if (!is_question) {
        const Batch & batch = *static_cast<const Batch *>(data);
        // The last layer may be computed for the last token alone.
        const int64_t first = batch.first + batch.n - node->ne[1];
        for (int64_t token = 0; token < node->ne[1]; ++token) {
            std::printf("%lld %d", static_cast<long long>(first + token), layer);
            for (int64_t k = 0; k < node->ne[0]; ++k) {
                const char * at = static_cast<const char *>(node->data) + token * static_cast<int64_t>(node->nb[1]) +
                                  k * static_cast<int64_t>(node->nb[0]);
                int32_t id = 0;
                std::memcpy(&id, at, sizeof(id));
                std::printf(" %d", id);
            }
            std::printf("\n");
        }
    }
    return true;
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: experts MODEL PROMPT_TOKENS TOKEN...\n");
        return 2;
    }
    const int n_prompt = std::atoi(argv[2]);
    std::vector<llama_token> tokens;
    for (int i = 3; i < argc; ++i) {
        tokens.push_back(std::atoi(argv[i]));
    }
    const int n_tokens = static_cast<int>(tokens.size());
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    model_params.use_extra_bufts = false;
    const std::unique_ptr<llama_model, decltype(&llama_model_free)> model(
        llama_model_load_from_file(argv[1], model_params), llama_model_free);
    Batch batch{0, 0};
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 512;
    params.n_batch = params.n_ubatch = static_cast<uint32_t>(n_prompt);
    params.n_threads = params.n_threads_batch = 1;
    params.swa_full = false;
    params.cb_eval = look;
    params.cb_eval_user_data = &batch;
    const std::unique_ptr<llama_context, decltype(&llama_free)> context(
        model ? llama_init_from_model(model.get(), params) : nullptr, llama_free);
    if (!context) {
        std::fprintf(stderr, "%s could not be loaded\n", argv[1]);
        return 1;
    }
    while (batch.first < n_tokens) {
        batch.n = batch.first == 0 ? n_prompt : 1;
        if (llama_decode(context.get(),
                         llama_batch_get_one(tokens.data() + batch.first, static_cast<int32_t>(batch.n))) != 0) {
            return 1;
        }
        batch.first += batch.n;
    }
}
