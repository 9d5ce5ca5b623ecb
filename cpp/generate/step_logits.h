#pragma once

#include "device/thread_pool.h"

#include <memory>

namespace overspill {

// The logits that a token is chosen from, which may be written to, and who can help with that.
struct StepLogits {
    float * logits = nullptr;
    std::shared_ptr<void> owner = {};  // keeps them; null where they are not to be looked at for longer
    std::shared_ptr<const ThreadPool> threads = {};
};

}  // namespace overspill
