#include "gguf/gguf_header.h"

#include "base/activity.h"
#include "base/check_range.h"
#include "base/error.h"
#include "base/error_capture.h"

#include <ggml.h>
#include <llama.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace overspill {

namespace {

namespace fs = std::filesystem;

// Paths come in UTF-8, on Windows too.
fs::path native_path(const std::string & path) {
#ifdef _WIN32
    return fs::u8path(path);
#else
    return fs::path(path);
#endif
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

}  // namespace

uint64_t check_gguf_file(const std::string & path) {
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
    errno = 0;
    std::ifstream file(native, std::ios::binary);
    if (!code && !file) {
        code.assign(errno != 0 ? errno : EIO, std::generic_category());
    }
    if (code) {
        throw ModelLoadError(path + ": cannot be read (" + code.message() + ")");
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

GgufHeader::GgufHeader(std::string path) : path_(std::move(path)), n_file_bytes_(check_gguf_file(path_)) {
    const Activity activity("reading a GGUF header");
    const ErrorCapture errors;
    context_.reset(gguf_init_from_file(path_.c_str(), {/*no_alloc =*/true, /*ctx =*/nullptr}));
    if (!context_) {
        const std::string reason = errors.reason("the GGUF header cannot be read");
        if (reason.find("bad_alloc") != std::string::npos) {
            throw std::bad_alloc();
        }
        throw ModelLoadError(path_ + ": is damaged or truncated: " + reason);
    }
}

void GgufHeader::replace(const MetadataOverrides & overrides) {
    gguf_context * context = context_.get();
    for (const auto & [key, value] : overrides) {
        if (key.empty()) {
            throw std::invalid_argument("overrides: a key must not be empty");
        }
        if (const auto * flag = std::get_if<bool>(&value)) {
            gguf_set_val_bool(context, key.c_str(), *flag);
        } else if (const auto * number = std::get_if<int64_t>(&value)) {
            check_range(("overrides: " + key).c_str(), *number, int64_t{0}, int64_t{UINT32_MAX});
            gguf_set_val_u32(context, key.c_str(), static_cast<uint32_t>(*number));
        } else if (const auto * fraction = std::get_if<double>(&value)) {
            gguf_set_val_f32(context, key.c_str(), static_cast<float>(*fraction));
        } else {
            gguf_set_val_str(context, key.c_str(), std::get<std::string>(value).c_str());
        }
        is_replaced_ = true;
    }
}

GgufValue GgufHeader::value(int64_t key) const {
    const gguf_context * context = context_.get();
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

uint64_t GgufHeader::count(const std::string & key, uint64_t otherwise) const {
    const int64_t id = gguf_find_key(context_.get(), key.c_str());
    if (id < 0) {
        return otherwise;
    }
    const GgufValue found = value(id);
    if (const auto * number = std::get_if<uint64_t>(&found)) {
        return *number;
    }
    if (const auto * number = std::get_if<int64_t>(&found); number != nullptr && *number >= 0) {
        return static_cast<uint64_t>(*number);
    }
    return otherwise;
}

std::vector<std::string> GgufHeader::files() const {
    const uint64_t n_parts = count("split.count", 1);
    const uint64_t part = count("split.no", 0);
    if (n_parts <= 1) {
        return {path_};
    }
    if (n_parts > 65535) {
        throw ModelLoadError(path_ + ": is damaged: it says that it is one of " + std::to_string(n_parts) + " files");
    }
    const auto n = static_cast<int>(n_parts);
    std::vector<char> buffer(path_.size() + 64);
    if (part != 0) {
        throw ModelLoadError(path_ + ": is part " + std::to_string(part + 1) + " of a model in " + std::to_string(n) +
                             " files; give the first one (-00001-of-...)");
    }
    if (llama_split_prefix(buffer.data(), buffer.size(), path_.c_str(), 0, n) <= 0) {
        throw ModelLoadError(
            path_ + ": is the first of " + std::to_string(n) +
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

std::vector<GgufTensor> GgufHeader::tensors() const {
    std::vector<GgufTensor> tensors;
    for (int64_t id = 0; id < gguf_get_n_tensors(context_.get()); ++id) {
        const int64_t * shape = gguf_get_tensor_ne(context_.get(), id);
        size_t n_dimensions = GGML_MAX_DIMS;
        while (n_dimensions > 1 && shape[n_dimensions - 1] == 1) {
            --n_dimensions;
        }
        tensors.push_back({gguf_get_tensor_name(context_.get(), id),
                           ggml_type_name(gguf_get_tensor_type(context_.get(), id)),
                           {shape, shape + n_dimensions},
                           gguf_get_tensor_size(context_.get(), id)});
    }
    return tensors;
}

}  // namespace overspill
