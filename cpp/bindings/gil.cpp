#include "bindings/gil.h"

#include <utility>

namespace py = pybind11;

namespace overspill {

namespace {

// Asked when the module is made: asking Python later on, behind a lock of C++, could wait for a thread that waits for
// the GIL.
unsigned long main_thread = 0;

}  // namespace

void remember_main_thread() {
    main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
}

Signals::Signals() {
    if (PyThread_get_thread_ident() == main_thread) {
        poll_ = [this] {
            const py::gil_scoped_acquire gil;
            if (PyErr_CheckSignals() == 0) {
                return false;
            }
            raised_ = std::make_exception_ptr(py::error_already_set());
            return true;
        };
    }
}

std::shared_ptr<py::object> held(py::object object) {
    return {new py::object(std::move(object)), [](py::object * owned) {
                const py::gil_scoped_acquire gil;
                delete owned;
            }};
}

}  // namespace overspill
