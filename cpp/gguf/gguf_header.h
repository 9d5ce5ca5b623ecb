// The header of one GGUF file, as ggml reads it.
#pragma once

#include <gguf.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace overspill {

// None for text and for arrays of more than 4096 elements: vocabularies would cost more than the rest.
using GgufNumbers =
    std::variant<std::monostate, std::vector<bool>, std::vector<int64_t>, std::vector<uint64_t>, std::vector<double>>;

struct GgufArray {
    std::string element_type;  // as GGUF names it, such as "str" or "i32"
    uint64_t length;
    GgufNumbers values;
};

// In place of what the header says, by key: of the types that llama.cpp can replace. Integers are of 32 bits there,
// without a sign, and fractions are floats.
using MetadataOverrides = std::vector<std::pair<std::string, std::variant<bool, int64_t, double, std::string>>>;

using GgufValue = std::variant<bool, int64_t, uint64_t, double, std::string, GgufArray>;

struct GgufTensor {
    std::string name;
    std::string type;            // as ggml names it, such as "q4_K"
    std::vector<int64_t> shape;  // the fastest dimension first
    uint64_t n_bytes;
};

// Looks at the beginning of the file: a path that is no file, a file that is no GGUF, counts that cannot be. Throws
// ModelLoadError, and returns the size in bytes.
uint64_t check_gguf_file(const std::string & path);

class GgufHeader {
  public:
    // Throws ModelLoadError with the name of the file and what is wrong with it.
    explicit GgufHeader(std::string path);

    const std::string & path() const { return path_; }
    uint64_t n_file_bytes() const { return n_file_bytes_; }
    const gguf_context & context() const { return *context_; }

    // From now on it says this. Throws std::invalid_argument.
    void replace(const MetadataOverrides & overrides);
    bool is_replaced() const { return is_replaced_; }

    GgufValue value(int64_t key) const;
    // A number that is not negative; `otherwise` where there is no such one.
    uint64_t count(const std::string & key, uint64_t otherwise) const;
    std::vector<GgufTensor> tensors() const;
    // This file and, if it is the first of a split model, the others. Throws ModelLoadError if it is another part.
    std::vector<std::string> files() const;

  private:
    struct Deleter {
        void operator()(gguf_context * context) const { gguf_free(context); }
    };

    std::string path_;
    uint64_t n_file_bytes_;
    std::unique_ptr<gguf_context, Deleter> context_;
    bool is_replaced_ = false;
};

}  // namespace overspill
