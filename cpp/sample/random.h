// The random numbers of draws.
#pragma once

#include <cstdint>
#include <random>

namespace overspill {

// The same numbers for the same seed, on every machine.
class Random {
  public:
    explicit Random(uint32_t seed = 0) : seed_(seed), engine_(seed) {}
    // As after so many more numbers, which are drawn to get there: some nanoseconds for each.
    void skip(uint64_t n) {
        engine_.discard(n);
        n_draws_ += n;
    }
    // From 0 to below 1.
    double uniform() {
        ++n_draws_;
        return static_cast<double>(engine_() >> 11U) * 0x1p-53;
    }
    uint32_t seed() const { return seed_; }
    uint64_t n_draws() const { return n_draws_; }

  private:
    uint32_t seed_;
    uint64_t n_draws_ = 0;
    std::mt19937_64 engine_;
};

}  // namespace overspill
