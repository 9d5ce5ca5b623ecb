// The header of a model file, read without its weights.
#pragma once

#include <cstdint>
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

using GgufValue = std::variant<bool, int64_t, uint64_t, double, std::string, GgufArray>;

struct GgufTensor {
    std::string name;
    std::string type;            // as ggml names it, such as "q4_K"
    std::vector<int64_t> shape;  // the fastest dimension first
    uint64_t n_bytes;
};

struct GgufFile {
    std::vector<std::pair<std::string, GgufValue>> metadata;
    std::vector<GgufTensor> tensors;  // of every part
    std::vector<std::string> files;   // more than one if the model is split
    uint64_t n_bytes = 0;             // of all files
};

// Throws ModelLoadError with the name of the file and what is wrong with it.
GgufFile read_gguf(const std::string & path);

// Looks at what llama.cpp does not survive or explains badly: a path that is no file, a file
// that is no GGUF, counts that cannot be, a part of a split model, a vocabulary without
// weights where those are wanted. Throws as read_gguf does.
void check_gguf(const std::string & path, bool vocab_only);

}  // namespace overspill
