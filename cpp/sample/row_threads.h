// Threads that help with the passes over a row of logits, in draws that are faster with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace overspill {

// Whether threads help is tried out: a thread that sleeps, or has no core of its own, costs more than it brings.
class RowThreads {
  public:
    // What is done for one of n_parts parts, numbered from 0.
    using Pass = std::function<void(size_t part, size_t n_parts)>;

    RowThreads() = default;
    virtual ~RowThreads() = default;
    RowThreads(const RowThreads &) = delete;
    RowThreads & operator=(const RowThreads &) = delete;

    // A draw from so many logits begins.
    void begin(size_t n_logits);
    // Does a pass, whose parts do not wait for each other, on several threads or on this one.
    void pass(const Pass & pass);
    void end();

  private:
    // Does all parts, at the same time if it can; otherwise the whole as one.
    virtual void run(const Pass & pass) = 0;

    uint32_t n_draws_ = 0;                 // since the last trial began
    bool help_ = false;                    // what the last trial found
    bool helped_ = false;                  // of the draw in hand
    double seconds_ = 0;                   // the same
    double alone_s_ = 0, together_s_ = 0;  // of the trial's draws
};

// Logits of which one is drawn, and what may help with that.
struct LogitsRow {
    const float * logits;
    size_t n;
    RowThreads * threads = nullptr;
};

}  // namespace overspill
