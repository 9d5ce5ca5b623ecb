#include "bindings/gil.h"

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

namespace py = pybind11;

namespace overspill {

namespace {

// Asked when the module is made: asking Python later on, behind a lock of C++, could wait for a thread that waits for
// the GIL.
std::atomic<unsigned long> main_thread{0};

std::atomic<bool> is_ending{false};  // models are closed, and the interpreter is about to end

// What a signal handler has raised, until raise_from_signals(). With the GIL, and on the main thread only.
std::exception_ptr raised;

// Destructors run native work as well, and have no caller to raise it for: the interpreter does, before it goes on.
int raise_later(void * /*unused*/) {
    try {
        raise_from_signals();
    } catch (py::error_already_set & error) {
        error.restore();
        return -1;
    }
    return 0;
}

bool has_been_told_to_stop() noexcept {
    if (!is_main_thread() || Py_IsInitialized() == 0) {
        return false;
    }
    const py::gil_scoped_acquire gil;
    if (raised) {
        return true;
    }
    const py::error_scope keep;
    if (PyErr_CheckSignals() == 0) {
        return false;
    }
    raised = std::make_exception_ptr(py::error_already_set());
    Py_AddPendingCall(raise_later, nullptr);
    return true;
}

}  // namespace

void hear_signals() {
    const auto remember = [] {
        main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
    };
    remember();
    const py::module_ os = py::module_::import("os");
    if (py::hasattr(os, "register_at_fork")) {
        os.attr("register_at_fork")(py::arg("after_in_child") = py::cpp_function([remember] {
                                        remember();
                                        raised = nullptr;  // the parent's to raise
                                    }));
    }
    // Before the package registers that models are closed, and so called after that.
    py::module_::import("atexit").attr("register")(py::cpp_function([] { is_ending = true; }));
    answer_told_to_stop(has_been_told_to_stop);
}

ReleasedGil::~ReleasedGil() noexcept(false) {
    // A daemon thread would be ended here in the middle of C++. Nobody waits for it, and nothing is left for it to do.
    while (is_ending.load(std::memory_order_relaxed) && !is_main_thread()) {
        std::this_thread::sleep_for(std::chrono::hours(1));
    }
    PyEval_RestoreThread(state_);
}

bool is_main_thread() noexcept {
    return PyThread_get_thread_ident() == main_thread.load(std::memory_order_relaxed);
}

void raise_from_signals() {
    if (is_main_thread() && raised) {
        std::rethrow_exception(std::exchange(raised, nullptr));
    }
}

std::shared_ptr<py::object> held(py::object object) {
    return {new py::object(std::move(object)), [](py::object * owned) {
                const py::gil_scoped_acquire gil;
                delete owned;
            }};
}

}  // namespace overspill
