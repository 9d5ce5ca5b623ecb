#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace overspill {

struct Token {
    int32_t id = -1;
    std::string text = {};  // whole characters; what came before may have waited for this token
    std::optional<float> logprob = {};
    std::vector<std::pair<int32_t, float>> top_logprobs = {};
    std::shared_ptr<void> owner = {};  // of the logits, if they are kept
    float * logits = nullptr;
    size_t n_logits = 0;
    std::shared_ptr<const std::atomic<uint64_t>> n_rows = {};  // that the stream has had
    uint64_t n_rows_then = 0;                                  // as long as the logits are this token's
};

}  // namespace overspill
