// Failed assertions of llama.cpp, which would end the process, as exceptions.
//
// llama.cpp calls back before it aborts, and what is called may throw: on threads that came in through one of our calls
// (AssertionGuard), unless another exception is in flight there. A thread of a pool has nobody above it to catch. It
// notes the failure in its Team and ends; the thread that computes with the pool finds the note while it waits, ends
// the others, which still look at what is on its stack, and throws. What is left ends the process as before: assertions
// in destructors and on threads that are not ours, and on Windows all of them.
#pragma once

#include "base/error.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>

namespace overspill {

struct AssertionFailed : Error {
    using Error::Error;
};

// An assertion failed earlier in what is used here, and left it in the middle of something.
struct UnusableError : Error {
    using Error::Error;
};

// While one exists, a failed assertion on this thread throws AssertionFailed.
class AssertionGuard {
  public:
    AssertionGuard() noexcept;
    ~AssertionGuard();
    AssertionGuard(const AssertionGuard &) = delete;
    AssertionGuard & operator=(const AssertionGuard &) = delete;
};

// While one exists, it ends the process after all: around destructors, which cannot throw.
class NoAssertionGuard {
  public:
    NoAssertionGuard() noexcept;
    ~NoAssertionGuard();
    NoAssertionGuard(const NoAssertionGuard &) = delete;
    NoAssertionGuard & operator=(const NoAssertionGuard &) = delete;

  private:
    int n_guards_;
};

// Threads that compute together, and what the first one of them that failed has said.
class Team {
  public:
    bool failed() const noexcept { return state_.load(std::memory_order_acquire) == State::failed; }
    // What was done, and the assertion with its place in llama.cpp's source; empty if none has failed.
    std::string why() const { return failed() ? why_ : ""; }

    // Ends the other threads and waits for them. Called once, by the thread that computes, before it throws.
    std::function<void()> end_others;

    // The team of this thread while it exists: threads that llama.cpp starts now are members of it.
    class Scope {
      public:
        explicit Scope(const std::shared_ptr<Team> & team) noexcept;
        ~Scope();
        Scope(const Scope &) = delete;
        Scope & operator=(const Scope &) = delete;

      private:
        const std::shared_ptr<Team> * outer_;
    };

    // From any thread of the team; the first one is kept.
    void fail(const char * message) noexcept;

  private:
    enum class State { sound, failing, failed };

    std::atomic<State> state_{State::sound};
    std::string why_;
};

// To be called by whoever waits for another thread of its team: that one may have failed. Ends a member, and throws
// AssertionFailed where the team computes.
void leave_if_failed();
// The same at each turn of a loop that spins for one, with a rest where another program wants the core.
void while_waiting();

// From now on llama.cpp's failed assertions come here. `last_words` is called before one ends the process after all,
// with one line: what was being done, and which. Call once, before anything else.
void catch_assertions(void (*last_words)(const char * failure));

}  // namespace overspill
