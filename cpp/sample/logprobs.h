#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace overspill {

// Natural logarithms under softmax(logits): before biases, penalties, truncation and temperature.
struct Logprobs {
    float chosen = 0;
    std::vector<std::pair<int32_t, float>> top = {};  // the most likely tokens, best first
};

}  // namespace overspill
