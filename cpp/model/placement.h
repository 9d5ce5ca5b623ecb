// Where tensors go, in llama.cpp's terms.
#pragma once

#include "gguf/gguf_header.h"

#include <llama.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace overspill {

// Devices by llama.cpp's names, such as "CUDA0"; python/overspill/placement.py makes these.
struct Placement {
    std::vector<std::string> devices =
        {};  // besides the CPU, in the order in which layers are dealt out; none: CPU only
    std::vector<float> tensor_split = {};  // how many layers each of them gets, the output head among them
    int32_t n_gpu_layers = 0;              // as llama.cpp counts them, from the output head back; -1: all
    // A regular expression over tensor names and a device; the first that matches counts.
    std::vector<std::pair<std::string, std::string>> overrides = {};
};

// A placement as llama_model_params wants it; the params point into this.
class PlacementParams {
  public:
    // Throws std::invalid_argument for a device that is not there, or what is no regular expression; or where a
    // tensor of the model would be where nothing can compute with it, which llama.cpp does not survive.
    PlacementParams(const GgufHeader & header, const Placement & placement);
    void apply(llama_model_params & params);

  private:
    void check_operations(const GgufHeader & header, const Placement & placement) const;

    std::vector<ggml_backend_dev_t> devices_;                  // ends with null
    std::vector<float> tensor_split_;                          // as many as llama.cpp reads
    std::vector<llama_model_tensor_buft_override> overrides_;  // ends with null
    std::vector<std::string> patterns_;
    int32_t n_gpu_layers_;
};

}  // namespace overspill
