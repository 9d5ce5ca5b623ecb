// How a thread spins until others are done, and what it notices of other programs meanwhile.
#pragma once

#include "base/stopwatch.h"

#include <cstdint>

namespace overspill {

// Called at each turn of a loop that spins. Where another program wants this thread's core, sleeps now and then: the
// thread that is waited for may need that core. Where none does, this costs some nanoseconds.
void rest_while_waiting();

// Time of this thread that went to other programs: they had its core, or the core of a thread that it waited for.
class Disturbance {
  public:
    Disturbance();
    // About how many of the seconds since it was made.
    double lost_s() const;

  private:
    Stopwatch watch_;
    int64_t n_preempted_;
    double computed_s_;
};

}  // namespace overspill
