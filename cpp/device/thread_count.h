// How many threads decode, on a machine that other programs use as well.
//
// Threads wait for each other some hundred times a token. Where another program runs on the core of one of them, all
// wait until it has the core again, and fewer threads may be faster. How many is measured: while steps are disturbed,
// now and then a few of them are made with the next smaller or larger number, and the faster number stays. An
// undisturbed machine has all threads, and no trials.
//
// Two cores, tokens per second of SmolLM2 with the best number and with two threads that spin: 160 and 7 to 87 beside a
// busy process on each core, 60 and 0.2 to 10 beside four.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace overspill {

class ThreadCount {
  public:
    explicit ThreadCount(int32_t n_most);

    // For the next step.
    int32_t now() const { return rungs_[trying_ ? tried_ : at_]; }

    // What the step took, and about what of it was lost to other programs. Steps with other numbers of tokens are not
    // compared.
    void took(double seconds, uint32_t n_tokens, double lost_s);

  private:
    struct Mean {
        double n = 0;
        double seconds = 0;
        double squares = 0;
        void add(double took_s);
        void forget_half();
        double value() const { return seconds / n; }
        double error() const;  // of value(), squared
    };

    void start_trial();
    void judge();
    void end_trial(bool is_better);
    bool is_other(uint32_t n_tokens);

    std::vector<int32_t> rungs_;  // numbers of threads, from all to one
    size_t at_ = 0;
    size_t tried_ = 0;
    bool trying_ = false;
    bool fewer_ = true;  // the direction of the next trial
    Mean here_;          // of the latest steps with rungs_[at_]
    Mean there_;         // of a trial's
    bool is_first_ = false;
    bool all_failed_ = false;  // at the last trial of all threads
    uint32_t n_tokens_ = 0;    // of the steps that are compared
    uint32_t n_others_ = 0;    // the latest steps, with another number of tokens
    uint32_t n_steps_ = 0;     // seen, if fewer than some
    double lost_ = 0;          // the share of the latest time that was lost, beside trials
    bool is_idle_ = true;
    double since_trial_s_ = 0;
    double pause_s_ = 0;
};

}  // namespace overspill
