// When native work has the GIL, and how a signal ends it: convert the arguments first, then call one of these.
#pragma once

#include "base/assertions.h"
#include "base/interrupt.h"
#include "bindings/log.h"

#include <pybind11/pybind11.h>

#include <exception>
#include <memory>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

namespace overspill {

// Lets Ctrl-C, or another signal whose handler raises, end native work: told_to_stop() is true then on the main thread,
// which alone handles signals. To be called once, when the module is made.
void hear_signals();

// Whether this is the thread that handles signals.
bool is_main_thread() noexcept;

// Raises what a signal handler has raised during native work, if one did. With the GIL.
void raise_from_signals();

// While it exists, this thread does not have the GIL.
class ReleasedGil {
  public:
    ReleasedGil() : state_(PyEval_SaveThread()) {}
    // Where the interpreter ends, it ends threads that ask for the GIL, by an exception that must come through.
    ~ReleasedGil() noexcept(false);
    ReleasedGil(const ReleasedGil &) = delete;
    ReleasedGil & operator=(const ReleasedGil &) = delete;

  private:
    PyThreadState * state_;
};

// Runs native work that takes microseconds, with the GIL. A failed assertion of llama.cpp is an exception in it, as in
// the others.
template <typename Work>
auto with_gil(Work && work) {
    const AssertionGuard guard;
    return work();
}

// Runs native work without the GIL, and passes its log on whether it succeeds or not. What a signal handler raised
// meanwhile takes the place of an error. After a success the interpreter raises it, so that no result is lost.
template <typename Work>
auto without_gil(Work && work) {
    struct Drain {
        ~Drain() {
            if (PyGILState_Check() == 1) {
                drain_log_to_python();
            }
        }
    } const drain;
    std::exception_ptr error;
    {
        const ReleasedGil released;
        const AssertionGuard guard;
        // The GIL is not taken while an error is on its way: where the interpreter ends, it ends this thread by another
        // one, and two at once would end the process.
        try {
            return work();
#ifdef __GLIBCXX__
        } catch (const abi::__forced_unwind &) {
            throw;
#endif
        } catch (...) {
            error = std::current_exception();
        }
    }
    raise_from_signals();
    std::rethrow_exception(error);
}

// The same for work that asks whether to go on.
template <typename Work>
auto interruptible(Work && work) {
    const Interrupt::Poll poll = is_main_thread() ? told_to_stop : Interrupt::Poll();
    return without_gil([&] { return work(poll); });
}

// Python objects that the core holds and lets go of where it does not have the GIL.
std::shared_ptr<pybind11::object> held(pybind11::object object);

}  // namespace overspill
