#include "gguf/gguf_file.h"

#include "gguf/gguf_check.h"

#include <iterator>

namespace overspill {

GgufFile read_gguf(const GgufHeader & header) {
    check_figures(header);
    GgufFile file;
    for (int64_t key = 0; key < gguf_get_n_kv(&header.context()); ++key) {
        file.metadata.emplace_back(gguf_get_key(&header.context(), key), header.value(key));
    }
    file.tensors = header.tensors();
    file.files = header.files();
    file.n_bytes = header.n_file_bytes();
    for (size_t part = 1; part < file.files.size(); ++part) {
        const GgufHeader other(file.files[part]);
        std::vector<GgufTensor> tensors = other.tensors();
        std::move(tensors.begin(), tensors.end(), std::back_inserter(file.tensors));
        file.n_bytes += other.n_file_bytes();
    }
    return file;
}

}  // namespace overspill
