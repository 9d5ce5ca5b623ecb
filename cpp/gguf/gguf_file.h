// What a model's files say of it, read without its weights.
#pragma once

#include "gguf/gguf_header.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace overspill {

struct GgufFile {
    std::vector<std::pair<std::string, GgufValue>> metadata;
    std::vector<GgufTensor> tensors;  // of every part
    std::vector<std::string> files;   // more than one if the model is split
    uint64_t n_bytes = 0;             // of all files
};

// Reads the headers of a split model's other files, too. Throws ModelLoadError with the name of the file and what is
// wrong with it.
GgufFile read_gguf(const GgufHeader & header);

}  // namespace overspill
