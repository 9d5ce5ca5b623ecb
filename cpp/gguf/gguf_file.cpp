#include "gguf/gguf_file.h"

#include "base/activity.h"
#include "base/error.h"
#include "base/error_capture.h"

#include <ggml.h>
#include <gguf.h>
#include <llama.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string_view>
#include <unordered_set>

namespace overspill {

namespace {

namespace fs = std::filesystem;

struct GgufDeleter {
    void operator()(gguf_context * context) const { gguf_free(context); }
};
using GgufContext = std::unique_ptr<gguf_context, GgufDeleter>;

// Paths come in UTF-8, on Windows too.
fs::path native_path(const std::string & path) {
#ifdef _WIN32
    return fs::u8path(path);
#else
    return fs::path(path);
#endif
}

// Returns the size in bytes.
uint64_t check_file(const std::string & path) {
    std::error_code code;
    const fs::path native = native_path(path);
    const fs::file_status status = fs::status(native, code);
    if (status.type() == fs::file_type::not_found) {
        throw ModelLoadError(path + ": no such file");
    }
    if (status.type() == fs::file_type::directory) {
        throw ModelLoadError(path + ": is a directory; give the .gguf file in it");
    }
    if (status.type() != fs::file_type::regular) {
        // A pipe could be waited for without end.
        throw ModelLoadError(path + ": is not a regular file" + (code ? " (" + code.message() + ")" : ""));
    }
    const uint64_t size = fs::file_size(native, code);
    std::ifstream file(native, std::ios::binary);
    if (code || !file) {
        throw ModelLoadError(path + ": cannot be read (" + std::strerror(errno) + ")");
    }
    if (size == 0) {
        throw ModelLoadError(path + ": is empty");
    }
    std::array<char, 24> header{};
    file.read(header.data(), header.size());
    if (file.gcount() < 4 || std::memcmp(header.data(), "GGUF", 4) != 0) {
        throw ModelLoadError(path + ": is not a GGUF file (it does not start with \"GGUF\")");
    }
    if (file.gcount() < static_cast<std::streamsize>(header.size())) {
        throw ModelLoadError(path + ": is truncated within the GGUF header (" + std::to_string(size) + " bytes)");
    }
    int64_t n_tensors = 0;
    int64_t n_keys = 0;
    std::memcpy(&n_tensors, header.data() + 8, sizeof n_tensors);
    std::memcpy(&n_keys, header.data() + 16, sizeof n_keys);
    // A tensor's entry has at least 24 bytes, a key's 13: more than the file can hold is damage,
    // and upstream would reserve memory for it first.
    const auto fits = [size](int64_t count, uint64_t n_bytes) {
        return count >= 0 && static_cast<uint64_t>(count) <= size / n_bytes;
    };
    if (!fits(n_tensors, 24) || !fits(n_keys, 13)) {
        throw ModelLoadError(path + ": is damaged or truncated: its header announces " + std::to_string(n_tensors) +
                             " tensors and " + std::to_string(n_keys) + " keys, more than its " + std::to_string(size) +
                             " bytes can hold");
    }
    return size;
}

GgufContext open_header(const std::string & path) {
    const Activity activity("reading a GGUF header");
    const ErrorCapture errors;
    GgufContext context(gguf_init_from_file(path.c_str(), {/*no_alloc =*/true, /*ctx =*/nullptr}));
    if (!context) {
        throw ModelLoadError(path + ": is damaged or truncated: " + errors.reason("the GGUF header cannot be read"));
    }
    return context;
}

template <typename Stored, typename Wide>
std::vector<Wide> copy_of(const gguf_context * context, int64_t key) {
    const auto * first = static_cast<const Stored *>(gguf_get_arr_data(context, key));
    // Not in braces, which would make two flags of the pointers.
    return std::vector<Wide>(first, first + gguf_get_arr_n(context, key));
}

GgufNumbers numbers_of(const gguf_context * context, int64_t key) {
    constexpr size_t most = 4096;
    if (gguf_get_arr_n(context, key) > most) {
        return {};
    }
    switch (gguf_get_arr_type(context, key)) {
        case GGUF_TYPE_UINT8: return copy_of<uint8_t, uint64_t>(context, key);
        case GGUF_TYPE_INT8: return copy_of<int8_t, int64_t>(context, key);
        case GGUF_TYPE_UINT16: return copy_of<uint16_t, uint64_t>(context, key);
        case GGUF_TYPE_INT16: return copy_of<int16_t, int64_t>(context, key);
        case GGUF_TYPE_UINT32: return copy_of<uint32_t, uint64_t>(context, key);
        case GGUF_TYPE_INT32: return copy_of<int32_t, int64_t>(context, key);
        case GGUF_TYPE_UINT64: return copy_of<uint64_t, uint64_t>(context, key);
        case GGUF_TYPE_INT64: return copy_of<int64_t, int64_t>(context, key);
        case GGUF_TYPE_FLOAT32: return copy_of<float, double>(context, key);
        case GGUF_TYPE_FLOAT64: return copy_of<double, double>(context, key);
        case GGUF_TYPE_BOOL: return copy_of<int8_t, bool>(context, key);
        default: return {};
    }
}

GgufValue value_of(const gguf_context * context, int64_t key) {
    switch (gguf_get_kv_type(context, key)) {
        case GGUF_TYPE_UINT8: return uint64_t{gguf_get_val_u8(context, key)};
        case GGUF_TYPE_INT8: return int64_t{gguf_get_val_i8(context, key)};
        case GGUF_TYPE_UINT16: return uint64_t{gguf_get_val_u16(context, key)};
        case GGUF_TYPE_INT16: return int64_t{gguf_get_val_i16(context, key)};
        case GGUF_TYPE_UINT32: return uint64_t{gguf_get_val_u32(context, key)};
        case GGUF_TYPE_INT32: return int64_t{gguf_get_val_i32(context, key)};
        case GGUF_TYPE_UINT64: return uint64_t{gguf_get_val_u64(context, key)};
        case GGUF_TYPE_INT64: return int64_t{gguf_get_val_i64(context, key)};
        case GGUF_TYPE_FLOAT32: return double{gguf_get_val_f32(context, key)};
        case GGUF_TYPE_FLOAT64: return gguf_get_val_f64(context, key);
        case GGUF_TYPE_BOOL: return gguf_get_val_bool(context, key);
        case GGUF_TYPE_STRING: return std::string(gguf_get_val_str(context, key));
        default:
            return GgufArray{gguf_type_name(gguf_get_arr_type(context, key)), gguf_get_arr_n(context, key),
                             numbers_of(context, key)};
    }
}

// A split model's number, or `otherwise`; the keys are u16, but nobody promises it.
uint64_t count_of(const gguf_context * context, const char * key, uint64_t otherwise) {
    const int64_t id = gguf_find_key(context, key);
    if (id < 0) {
        return otherwise;
    }
    const GgufValue value = value_of(context, id);
    if (const auto * number = std::get_if<uint64_t>(&value)) {
        return *number;
    }
    if (const auto * number = std::get_if<int64_t>(&value); number != nullptr && *number >= 0) {
        return static_cast<uint64_t>(*number);
    }
    return otherwise;
}

// The assertions of upstream's llama_model_base::load_hparams, which would end the process.
void check_hyperparameters(const std::string & path, const gguf_context * header) {
    const int64_t architecture = gguf_find_key(header, "general.architecture");
    if (architecture < 0 || gguf_get_kv_type(header, architecture) != GGUF_TYPE_STRING) {
        return;  // upstream says so itself
    }
    const std::string prefix = std::string(gguf_get_val_str(header, architecture)) + ".";
    const auto number = [&](const char * name, uint64_t otherwise) {
        return count_of(header, (prefix + name).c_str(), otherwise);
    };
    const auto require = [&](bool holds, const char * name) {
        if (!holds) {
            throw ModelLoadError(path + ": is damaged: " + prefix + name + " has a value that cannot be");
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
void check_vocabulary(const std::string & path, const gguf_context * header) {
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
            throw ModelLoadError(path + ": is damaged: its vocabulary has the token \"" + std::string(token) +
                                 "\" twice");
        }
    }
}

std::vector<std::string> parts_of(const std::string & path, const gguf_context * header) {
    const uint64_t n_parts = count_of(header, "split.count", 1);
    const uint64_t part = count_of(header, "split.no", 0);
    if (n_parts <= 1) {
        return {path};
    }
    if (n_parts > 65535) {
        throw ModelLoadError(path + ": is damaged: it says that it is one of " + std::to_string(n_parts) + " files");
    }
    const auto n = static_cast<int>(n_parts);
    std::vector<char> buffer(path.size() + 64);
    if (part != 0) {
        throw ModelLoadError(path + ": is part " + std::to_string(part + 1) + " of a model in " + std::to_string(n) +
                             " files; give the first one (-00001-of-...)");
    }
    if (llama_split_prefix(buffer.data(), buffer.size(), path.c_str(), 0, n) <= 0) {
        throw ModelLoadError(
            path + ": is the first of " + std::to_string(n) +
            " files, but is not named like it (NAME-00001-of-0000N.gguf), so the others cannot be found");
    }
    const std::string prefix = buffer.data();
    std::vector<std::string> files;
    for (int i = 0; i < n; ++i) {
        llama_split_path(buffer.data(), buffer.size(), prefix.c_str(), i, n);
        files.emplace_back(buffer.data());
    }
    return files;
}

}  // namespace

GgufFile read_gguf(const std::string & path) {
    GgufFile file;
    file.n_bytes = check_file(path);
    GgufContext header = open_header(path);
    for (int64_t key = 0; key < gguf_get_n_kv(header.get()); ++key) {
        file.metadata.emplace_back(gguf_get_key(header.get(), key), value_of(header.get(), key));
    }
    file.files = parts_of(path, header.get());
    for (size_t part = 0; part < file.files.size(); ++part) {
        if (part > 0) {
            file.n_bytes += check_file(file.files[part]);
            header = open_header(file.files[part]);
        }
        for (int64_t id = 0; id < gguf_get_n_tensors(header.get()); ++id) {
            const int64_t * shape = gguf_get_tensor_ne(header.get(), id);
            size_t n_dimensions = GGML_MAX_DIMS;
            while (n_dimensions > 1 && shape[n_dimensions - 1] == 1) {
                --n_dimensions;
            }
            file.tensors.push_back({gguf_get_tensor_name(header.get(), id),
                                    ggml_type_name(gguf_get_tensor_type(header.get(), id)),
                                    {shape, shape + n_dimensions},
                                    gguf_get_tensor_size(header.get(), id)});
        }
    }
    return file;
}

void check_gguf(const std::string & path, bool vocab_only) {
    check_file(path);
    const GgufContext header = open_header(path);
    if (!vocab_only && gguf_get_n_tensors(header.get()) == 0) {
        throw ModelLoadError(path +
                             ": holds a vocabulary and no weights, so it cannot generate text; "
                             "vocab_only loads it to tokenize");
    }
    check_vocabulary(path, header.get());
    if (!vocab_only) {
        check_hyperparameters(path, header.get());
    }
    const std::vector<std::string> files = parts_of(path, header.get());
    for (size_t part = 1; part < files.size(); ++part) {
        check_file(files[part]);
    }
}

}  // namespace overspill
