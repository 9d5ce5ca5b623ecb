// What may come next, as streams ask it: of a grammar, or of a mask from elsewhere.
#pragma once

#include "sample/sampler.h"

#include <cstddef>
#include <cstdint>
#include <functional>

namespace overspill {

// Restricts a stream to tokens that may come next.
class Constraint {
  public:
    // Asked now and then during long work; true ends it by a CancelledError.
    using ShouldStop = std::function<bool()>;

    virtual ~Constraint() = default;

    // Draws with the sampler among the tokens that may come next.
    virtual int32_t sample(Sampler & sampler, const LogitsRow & row, Logprobs * logprobs,
                           const ShouldStop & should_stop) = 0;
    virtual bool allows(int32_t token, const ShouldStop & should_stop) = 0;
    // `token` is allowed and has come.
    virtual void accept(int32_t token, const ShouldStop & should_stop) = 0;
    // Whether it may be asked on any thread, without Python.
    virtual bool is_native() const = 0;
};

}  // namespace overspill
