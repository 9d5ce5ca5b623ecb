// When native work has the GIL, and how a signal ends it: convert the arguments first, then call one of these.
#pragma once

#include "base/assertions.h"
#include "base/interrupt.h"
#include "bindings/log.h"

#include <pybind11/pybind11.h>

#include <exception>
#include <memory>

namespace overspill {

// To be called once, when the module is made.
void remember_main_thread();

// Lets Ctrl-C, or another signal whose handler raises, end a native call: its exception is
// kept while the core unwinds. Signals are handled by the main thread only, so others do not ask.
class Signals {
  public:
    Signals();
    Signals(const Signals &) = delete;
    Signals & operator=(const Signals &) = delete;
    const Interrupt::Poll & poll() const { return poll_; }
    void rethrow() const {
        if (raised_) {
            std::rethrow_exception(raised_);
        }
    }

  private:
    Interrupt::Poll poll_;
    std::exception_ptr raised_;
};

// Runs native work that takes microseconds, with the GIL. A failed assertion of llama.cpp is an exception in it, as in
// the others.
template <typename Work>
auto with_gil(Work && work) {
    const AssertionGuard guard;
    return work();
}

// Runs native work without the GIL, and passes its log on whether it succeeds or not.
template <typename Work>
auto without_gil(Work && work) {
    struct Drain {
        ~Drain() { drain_log_to_python(); }
    } const drain;
    const pybind11::gil_scoped_release release;
    const AssertionGuard guard;
    return work();
}

// The same for work that asks whether to go on; a signal's exception takes the place of the cancellation.
template <typename Work>
auto interruptible(Work && work) {
    const Signals signals;
    try {
        return without_gil([&] { return work(signals.poll()); });
    } catch (const CancelledError &) {
        signals.rethrow();
        throw;
    }
}

// Python objects that the core holds and lets go of where it does not have the GIL.
std::shared_ptr<pybind11::object> held(pybind11::object object);

}  // namespace overspill
