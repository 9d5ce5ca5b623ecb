// Experts that another device computes while the CPU computes the others of a layer.
#pragma once

#include "product/feed_forward.h"

#include <cstddef>
#include <cstdint>

namespace overspill {

// Of one token at a time: larger batches are the CPU's alone.
class ExpertDevice {
  public:
    virtual ~ExpertDevice() = default;

    // The number of a layer, by which it is known from now on; -1 if none of its experts will ever be there.
    virtual int32_t layer_of(const FeedForwardNodes & nodes) = 0;
    // Where the activations of a token are to be put before launch(); of so many floats as the largest layer has.
    virtual float * input() = 0;

    // Whether an expert is there. The same from the first stage of a layer to its last.
    virtual bool has(int32_t layer, int32_t expert) const = 0;
    // The experts that the tokens of a batch use, n_used each, those of a token in order. From one thread.
    virtual void note(int32_t layer, const int32_t * experts, size_t n_tokens, size_t n_used) = 0;
    // Begins to compute those of a token that are there. From one thread; does not wait for the device.
    virtual void launch(int32_t layer, const int32_t * experts, size_t n_used) = 0;
    // Waits for what was launched, and returns its results, one after the other, in the order of the experts. From any
    // thread, by one.
    virtual const float * results() = 0;
};

}  // namespace overspill
