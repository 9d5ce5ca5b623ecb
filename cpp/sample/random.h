// The random numbers of draws.
#pragma once

#include <cstdint>
#include <random>

namespace overspill {

// The same numbers for the same seed, on every machine.
class Random {
  public:
    // As after `n_draws` numbers, which are drawn again to get there.
    void restart(uint32_t seed, uint64_t n_draws) {
        engine_.seed(seed);
        engine_.discard(n_draws);
        seed_ = seed;
        n_draws_ = n_draws;
    }
    // From 0 to below 1.
    double uniform() {
        ++n_draws_;
        return static_cast<double>(engine_() >> 11U) * 0x1p-53;
    }
    uint32_t seed() const { return seed_; }
    uint64_t n_draws() const { return n_draws_; }

  private:
    uint32_t seed_ = 0;
    uint64_t n_draws_ = 0;
    std::mt19937_64 engine_;
};

}  // namespace overspill
