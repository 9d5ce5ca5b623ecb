#include "gguf/gguf_check.h"

#include "base/error.h"

#include <ggml.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_set>
#include <variant>
#include <vector>

namespace overspill {

namespace {

constexpr uint64_t max_layers = 512;    // LLAMA_MAX_LAYERS
constexpr uint64_t max_experts = 1024;  // LLAMA_MAX_EXPERTS
constexpr uint64_t max_width = 1 << 22;
constexpr uint64_t max_heads = 1 << 16;
constexpr uint64_t max_tokens = 1 << 22;
constexpr uint64_t max_int = INT32_MAX;

// What an architecture's own key may be, since upstream allocates by it, counts up to it, or divides by it.
struct Limits {
    const char * key;
    uint64_t least;
    uint64_t most;
    bool per_layer = false;  // may be a list
};

constexpr Limits limits_of_keys[] = {
    {"block_count", 1, max_layers},
    {"leading_dense_block_count", 0, max_layers},
    {"nextn_predict_layers", 0, max_layers},
    {"n_deepstack_layers", 0, max_layers},
    {"decoder_block_count", 0, max_layers},
    {"posnet.block_count", 0, max_layers},
    {"convnext.block_count", 0, max_layers},
    {"hash_layer_count", 0, max_layers},
    {"attention.shared_kv_layers", 0, max_layers},
    {"interleave_moe_layer_step", 0, max_layers},
    {"moe_every_n_layers", 0, max_layers},
    {"full_attention_interval", 1, max_layers},
    {"rescale_every_n_layers", 0, max_int},
    {"num_loops", 0, max_layers},
    {"hrm.layers_per_stack", 1, max_layers},
    {"hrm.h_cycles", 1, max_layers},
    {"hrm.l_cycles", 1, max_layers},
    {"context_length", 0, max_int},
    {"rope.scaling.original_context_length", 0, max_int},
    {"attention.temperature_length", 0, max_int},
    {"attention.sliding_window", 0, max_int},
    {"attention.indexer.top_k", 0, max_int},
    {"attention.indexer.block_size", 0, max_int},
    {"attention.indexer.local_blocks", 0, max_int},
    {"vocab_size", 0, max_tokens},
    {"embedding_length", 1, max_width},
    {"embedding_length_out", 0, max_width},
    {"embedding_length_per_layer_input", 0, max_width},
    {"features_length", 0, max_width},
    {"feed_forward_length", 0, max_width, true},
    {"expert_feed_forward_length", 0, max_width, true},
    {"expert_shared_feed_forward_length", 0, max_width, true},
    {"expert_chunk_feed_forward_length", 0, max_width},
    {"expert_latent_length", 0, max_width},
    {"moe_latent_size", 0, max_width},
    {"target_hidden_size", 0, max_width},
    {"posnet.embedding_length", 0, max_width},
    {"convnext.embedding_length", 0, max_width},
    {"dense_2_feat_in", 0, max_width},
    {"dense_2_feat_out", 0, max_width},
    {"dense_3_feat_in", 0, max_width},
    {"dense_3_feat_out", 0, max_width},
    {"expert_count", 0, max_experts},
    {"expert_used_count", 0, max_experts, true},
    {"expert_shared_count", 0, max_experts},
    {"expert_group_count", 0, max_experts},
    {"expert_group_used_count", 0, max_experts},
    {"experts_per_group", 1, max_experts},
    {"attention.head_count", 0, max_heads, true},
    {"attention.head_count_kv", 0, max_heads, true},
    {"attention.indexer.head_count", 0, max_heads},
    {"attention.output_group_count", 1, max_heads},
    {"attention.group_norm_groups", 1, max_width},
    {"attention.relative_buckets_count", 0, max_width},
    {"attention.key_length", 0, max_width},
    {"attention.value_length", 0, max_width},
    {"attention.key_length_swa", 0, max_width},
    {"attention.value_length_swa", 0, max_width},
    {"attention.key_length_mla", 0, max_width},
    {"attention.value_length_mla", 0, max_width},
    {"attention.key_length_mla_swa", 0, max_width},
    {"attention.value_length_mla_swa", 0, max_width},
    {"attention.indexer.key_length", 0, max_width},
    {"attention.q_lora_rank", 0, max_width},
    {"attention.kv_lora_rank", 0, max_width},
    {"attention.kv_lora_rank_swa", 0, max_width},
    {"attention.decay_lora_rank", 0, max_width},
    {"attention.iclr_lora_rank", 0, max_width},
    {"attention.value_residual_mix_lora_rank", 0, max_width},
    {"attention.gate_lora_rank", 0, max_width},
    {"attention.output_lora_rank", 0, max_width},
    {"adapters.count", 0, max_experts},
    {"adapters.lora_rank", 0, max_width, true},
    {"rope.dimension_count", 1, max_width},
    {"rope.dimension_count_swa", 1, max_width},
    {"rope.dimension_sections", 0, max_width, true},
    {"hyper_connection.count", 0, 64},
    {"hyper_connection.sinkhorn_iterations", 0, 1000},
    {"hyper_connection.low_rank", 0, max_width},
    {"token_shift_count", 0, 16},
    {"time_mix_extra_dim", 0, max_width},
    {"time_decay_extra_dim", 0, max_width},
    {"wkv.head_size", 1, max_width},
    {"kda.head_dim", 1, max_width},
    {"shortconv.l_cache", 1, max_width},
    {"ssm.conv_kernel", 0, max_width},
    {"ssm.inner_size", 0, max_width},
    {"ssm.state_size", 0, max_width},
    {"ssm.time_step_rank", 0, max_width},
    {"ssm.group_count", 0, max_width},
    {"ple.ngram_size", 0, 64},
    {"ple.heads_per_ngram", 0, 64},
    {"ple.conv_kernel", 0, max_width},
    {"block_size", 1, max_int},
    {"conv_kernel_size", 1, max_width},
    {"conv_group_size", 1, max_width},
    {"selector_rank", 0, max_width},
    {"selector_top_k", 0, max_int},
};

[[noreturn]] void refuse(const GgufHeader & file, const std::string & why) {
    if (file.is_replaced()) {  // it was looked at before, and is not damaged
        throw std::invalid_argument("overrides: " + beginning_of(why));
    }
    throw ModelLoadError(file.path() + ": is damaged: " + beginning_of(why));
}

// The architecture's keys begin with it; none if there is no such name, which upstream says itself.
std::optional<std::string> prefix_of(const GgufHeader & file) {
    const int64_t id = gguf_find_key(&file.context(), "general.architecture");
    if (id < 0 || gguf_get_kv_type(&file.context(), id) != GGUF_TYPE_STRING) {
        return std::nullopt;
    }
    return std::string(gguf_get_val_str(&file.context(), id)) + ".";
}

// The numbers under a key, of which it has one or one for each layer; none if it is not there.
std::vector<uint64_t> numbers_of(const GgufHeader & file, const std::string & key, const Limits & limits) {
    const int64_t id = gguf_find_key(&file.context(), key.c_str());
    if (id < 0) {
        return {};
    }
    const std::string range = std::to_string(limits.least) + " to " + std::to_string(limits.most);
    std::vector<uint64_t> numbers;
    const auto add = [&](auto number) {
        using Number = decltype(number);
        // Upstream takes what is negative for its unsigned counterpart.
        if constexpr (std::is_signed_v<Number>) {
            if (number < 0) {
                refuse(file, key + " is " + std::to_string(number) + "; it must be " + range);
            }
        }
        if (static_cast<uint64_t>(number) < limits.least || static_cast<uint64_t>(number) > limits.most) {
            refuse(file, key + " is " + std::to_string(number) + "; it must be " + range);
        }
        numbers.push_back(static_cast<uint64_t>(number));
    };
    const GgufValue value = file.value(id);
    const auto * list = std::get_if<GgufArray>(&value);
    if (list != nullptr && limits.per_layer && list->length <= max_layers) {
        const auto add_all = [&](const auto * found) {
            if (found != nullptr) {
                std::for_each(found->begin(), found->end(), add);
            }
            return found != nullptr;
        };
        if (add_all(std::get_if<std::vector<uint64_t>>(&list->values)) ||
            add_all(std::get_if<std::vector<int64_t>>(&list->values))) {
            return numbers;
        }
    } else if (const auto * natural = std::get_if<uint64_t>(&value)) {
        add(*natural);
        return numbers;
    } else if (const auto * number = std::get_if<int64_t>(&value)) {
        add(*number);
        return numbers;
    }
    refuse(file, key + " is a " + std::string(gguf_type_name(gguf_get_kv_type(&file.context(), id))) +
                     "; it must be an integer from " + range);
}

// Weights are multiplied with, which upstream does not check: it would call a function that is not there.
void check_weights(const GgufHeader & file) {
    const gguf_context * header = &file.context();
    for (int64_t id = 0; id < gguf_get_n_tensors(header); ++id) {
        const ggml_type type = gguf_get_tensor_type(header, id);
        const std::string name = gguf_get_tensor_name(header, id);
        // Tables that lead from tokens to experts, or to tokens of another vocabulary, are of integers.
        const bool is_table = name.find("tid2eid") != std::string::npos || name.find("d2t") != std::string::npos;
        if (type != GGML_TYPE_F32 && ggml_get_type_traits(type)->to_float == nullptr && !is_table) {
            refuse(file, "the tensor " + name + " is of type " + ggml_type_name(type) +
                             ", of which weights cannot be; convert the model anew");
        }
    }
}

// Where a layer attends, it has heads: upstream divides by their number.
void check_heads(const GgufHeader & file, const std::string & prefix, const char * name, const char * tensor) {
    const std::string key = prefix + name;
    const std::vector<uint64_t> heads = numbers_of(file, key, {name, 0, max_heads, true});
    const gguf_context * header = &file.context();
    for (size_t layer = 0; layer < max_layers && !heads.empty(); ++layer) {
        const std::string start = "blk." + std::to_string(layer) + ".";
        if (heads[std::min(layer, heads.size() - 1)] == 0 &&
            gguf_find_tensor(header, (start + tensor + ".weight").c_str()) >= 0 &&
            // Recurrent layers may have matrices of these names.
            gguf_find_tensor(header, (start + "ssm_a").c_str()) < 0) {
            refuse(file, key + " is 0 for layer " + std::to_string(layer) + ", which has " + tensor);
        }
    }
}

// The assertions of upstream's llama_model_base::load_hparams, and what it divides by or never ends with.
void check_hyperparameters(const GgufHeader & file) {
    const std::optional<std::string> found = prefix_of(file);
    if (!found) {
        return;
    }
    const std::string & prefix = *found;
    const gguf_context * header = &file.context();
    for (const Limits & limits : limits_of_keys) {
        numbers_of(file, prefix + limits.key, limits);
    }
    const auto number = [&](const char * name, uint64_t otherwise) { return file.count(prefix + name, otherwise); };
    const auto require = [&](bool holds, const char * name, const std::string & must) {
        if (!holds) {
            refuse(file, prefix + name + " is " + std::to_string(number(name, 0)) + "; it must be " + must);
        }
    };
    const uint64_t n_layers = number("block_count", 1);
    const uint64_t n_experts = number("expert_count", 0);
    require(number("nextn_predict_layers", 0) <= n_layers, "nextn_predict_layers",
            "at most block_count, which is " + std::to_string(n_layers));
    if (prefix.rfind("ernie", 0) == 0) {
        require(number("interleave_moe_layer_step", 1) > 0, "interleave_moe_layer_step", "1 to 512");
    }
    check_heads(file, prefix, "attention.head_count", "attn_q");
    check_heads(file, prefix, "attention.head_count", "attn_qkv");
    check_heads(file, prefix, "attention.head_count_kv", "attn_k");
    for (int64_t id = 0; id < gguf_get_n_tensors(header); ++id) {
        if (std::string_view(gguf_get_tensor_name(header, id)).find(".ssm_") != std::string_view::npos) {
            for (const char * name :
                 {"ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count"}) {
                require(number(name, 1) > 0, name, "1 to " + std::to_string(max_width));
            }
            break;
        }
    }
    if (prefix.rfind("hunyuan", 0) == 0 && n_experts <= 1) {
        return;  // upstream takes those as dense
    }
    uint64_t n_experts_used = 0;
    for (const uint64_t n : numbers_of(file, prefix + "expert_used_count", {"", 0, max_experts, true})) {
        n_experts_used = std::max(n_experts_used, n);
    }
    if (n_experts_used > n_experts || (n_experts_used > 0) != (n_experts > 0)) {
        refuse(file, prefix + "expert_used_count is " + std::to_string(n_experts_used) + "; it must be " +
                         (n_experts == 0 ? "0, like expert_count" : "1 to " + std::to_string(n_experts)));
    }
    const uint64_t n_groups = number("expert_group_count", 0);
    require(n_groups == 0 || n_groups < n_experts, "expert_group_count",
            "less than expert_count, which is " + std::to_string(n_experts));
    if (n_groups > 1) {
        const uint64_t n_groups_used = number("expert_group_used_count", 0);
        require(n_experts % n_groups == 0, "expert_group_count",
                "a divisor of expert_count, which is " + std::to_string(n_experts));
        require(n_groups_used > 0 && n_groups_used < n_groups, "expert_group_used_count",
                "1 to " + std::to_string(n_groups - 1));
    }
    const int64_t scaling = gguf_find_key(header, (prefix + "rope.scaling.type").c_str());
    if (scaling >= 0 && gguf_get_kv_type(header, scaling) == GGUF_TYPE_STRING) {
        const std::string type = gguf_get_val_str(header, scaling);
        if (type != "none" && type != "linear" && type != "yarn" && type != "longrope") {
            refuse(file, prefix + "rope.scaling.type is \"" + type + "\"; it must be none, linear, yarn or longrope");
        }
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
    if (n_tokens > max_tokens) {
        refuse(file, "its vocabulary has " + std::to_string(n_tokens) + " tokens; it must be at most " +
                         std::to_string(max_tokens));
    }
    // Some tokenizers call themselves for each byte of a token when they are made, or work for each pair of them.
    constexpr size_t longest_token = 4096;
    constexpr uint64_t most_pairs = 1 << 30;
    uint64_t n_pairs = 0;
    std::unordered_set<std::string_view> tokens;
    tokens.reserve(n_tokens);
    for (size_t i = 0; i < n_tokens; ++i) {
        const std::string_view token = gguf_get_arr_str(header, key, i);
        n_pairs += token.size() * token.size();
        if (token.size() > longest_token || n_pairs > most_pairs) {
            refuse(file, "token " + std::to_string(i) + " of its vocabulary has " + std::to_string(token.size()) +
                             " bytes; it must be at most " + std::to_string(longest_token) + ", and few that long");
        }
        // Upstream gives empty ones a name by their number.
        if (!token.empty() && !tokens.insert(token).second) {
            refuse(file, "its vocabulary has the token \"" + std::string(token) + "\" twice");
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
    const std::vector<std::string> files = header.files();
    if (vocab_only) {
        return;
    }
    check_hyperparameters(header);
    check_weights(header);
    for (size_t part = 1; part < files.size(); ++part) {
        check_weights(GgufHeader(files[part]));
    }
}

void check_figures(const GgufHeader & header) {
    check_hyperparameters(header);
}

}  // namespace overspill
