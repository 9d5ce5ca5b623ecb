#pragma once

#include "model/context.h"

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
    std::shared_ptr<Context> context = {};  // of the logits, if they are kept
    float * logits = nullptr;
    uint64_t n_decodes = 0;  // what the context's is as long as the logits are this token's
};

}  // namespace overspill
