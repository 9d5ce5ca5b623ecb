#include "gguf/gguf_check.h"

#include "base/error.h"

#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

namespace overspill {

namespace {

// The assertions of upstream's llama_model_base::load_hparams, which would end the process.
void check_hyperparameters(const GgufHeader & file) {
    const gguf_context * header = &file.context();
    const int64_t architecture = gguf_find_key(header, "general.architecture");
    if (architecture < 0 || gguf_get_kv_type(header, architecture) != GGUF_TYPE_STRING) {
        return;  // upstream says so itself
    }
    const std::string prefix = std::string(gguf_get_val_str(header, architecture)) + ".";
    const auto number = [&](const char * name, uint64_t otherwise) { return file.count(prefix + name, otherwise); };
    const auto require = [&](bool holds, const char * name) {
        if (!holds) {
            throw ModelLoadError(file.path() + ": is damaged: " + prefix + name + " has a value that cannot be");
        }
    };
    constexpr uint64_t max_layers = 512;    // LLAMA_MAX_LAYERS
    constexpr uint64_t max_experts = 1024;  // LLAMA_MAX_EXPERTS
    const uint64_t n_layers = number("block_count", 1);
    const uint64_t n_experts = number("expert_count", 0);
    require(n_layers > 0 && n_layers <= max_layers, "block_count");
    require(number("nextn_predict_layers", 0) <= n_layers, "nextn_predict_layers");
    require(n_experts <= max_experts, "expert_count");
    if (prefix.rfind("hunyuan", 0) == 0 && n_experts <= 1) {
        return;  // upstream takes those as dense
    }
    // Some models have an array, one number per layer, which is not looked into.
    const int64_t used = gguf_find_key(header, (prefix + "expert_used_count").c_str());
    if (used < 0 || gguf_get_kv_type(header, used) != GGUF_TYPE_ARRAY) {
        const uint64_t n_experts_used = number("expert_used_count", 0);
        require(n_experts_used <= n_experts && (n_experts_used > 0) == (n_experts > 0), "expert_used_count");
    }
    const uint64_t n_groups = number("expert_group_count", 0);
    require(n_groups == 0 || n_groups < n_experts, "expert_group_count");
    if (n_groups > 1) {
        const uint64_t n_groups_used = number("expert_group_used_count", 0);
        require(n_experts % n_groups == 0, "expert_group_count");
        require(n_groups_used > 0 && n_groups_used < n_groups, "expert_group_used_count");
    }
    const int64_t scaling = gguf_find_key(header, (prefix + "rope.scaling.type").c_str());
    if (scaling >= 0 && gguf_get_kv_type(header, scaling) == GGUF_TYPE_STRING) {
        const std::string type = gguf_get_val_str(header, scaling);
        require(type == "none" || type == "linear" || type == "yarn" || type == "longrope", "rope.scaling.type");
    }
}

// Upstream asserts that no token is there twice.
void check_vocabulary(const GgufHeader & file) {
    const gguf_context * header = &file.context();
    const int64_t key = gguf_find_key(header, "tokenizer.ggml.tokens");
    if (key < 0 || gguf_get_kv_type(header, key) != GGUF_TYPE_ARRAY ||
        gguf_get_arr_type(header, key) != GGUF_TYPE_STRING) {
        return;  // upstream says so itself
    }
    const size_t n_tokens = gguf_get_arr_n(header, key);
    std::unordered_set<std::string_view> tokens;
    tokens.reserve(n_tokens);
    for (size_t i = 0; i < n_tokens; ++i) {
        const std::string_view token = gguf_get_arr_str(header, key, i);
        // Upstream gives empty ones a name by their number.
        if (!token.empty() && !tokens.insert(token).second) {
            throw ModelLoadError(file.path() + ": is damaged: its vocabulary has the token \"" + std::string(token) +
                                 "\" twice");
        }
    }
}

}  // namespace

void check_loadable(const GgufHeader & header, bool vocab_only) {
    if (!vocab_only && gguf_get_n_tensors(&header.context()) == 0) {
        throw ModelLoadError(header.path() +
                             ": holds a vocabulary and no weights, so it cannot generate text; "
                             "vocab_only loads it to tokenize");
    }
    check_vocabulary(header);
    if (!vocab_only) {
        check_hyperparameters(header);
    }
    const std::vector<std::string> files = header.files();
    for (size_t part = 1; part < files.size(); ++part) {
        check_gguf_file(files[part]);
    }
}

}  // namespace overspill
