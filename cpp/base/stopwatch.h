#pragma once

#include <chrono>
#include <utility>

namespace overspill {

class Stopwatch {
  public:
    double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
    // Since the last lap, or since it was made.
    double lap() {
        const Clock::time_point now = Clock::now();
        return std::chrono::duration<double>(now - std::exchange(lapped_, now)).count();
    }

  private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point start_ = Clock::now();
    Clock::time_point lapped_ = start_;
};

}  // namespace overspill
