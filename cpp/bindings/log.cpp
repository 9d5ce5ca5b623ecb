#include "bindings/log.h"

#include "base/assertions.h"
#include "base/log.h"
#include "base/utf8_buffer.h"
#include "bindings/bindings.h"

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdio>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

constexpr std::array<int, 4> levels{10, 20, 30, 40};  // logging.DEBUG to logging.ERROR

// Asked for once: a Ctrl-C within logging.getLogger can leave its lock taken, and every later call would wait for it.
const py::object & logger() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> found;
    return found
        .call_once_and_store_result([] { return py::module_::import("logging").attr("getLogger")("overspill.llama"); })
        .get_stored();
}

bool is_enabled(int level) {
    return logger().attr("isEnabledFor")(level).cast<bool>();
}

}  // namespace

// Logging must not replace an exception that is on its way.
void drain_log_to_python() {
    if (!log_pending()) {
        return;
    }
    const py::error_scope keep;
    try {
        for (const auto & line : drain_log()) {
            const int level = levels[static_cast<size_t>(line.level)];
            if (is_enabled(level)) {
                logger().attr("log")(level, "%s", valid_utf8(line.text));
            }
        }
    } catch (py::error_already_set & error) {
        if (error.matches(PyExc_KeyboardInterrupt)) {
            // Ctrl-C came while Python code ran here, where it cannot be raised; it comes again after this.
            PyErr_SetInterrupt();
        } else {
            error.discard_as_unraisable("overspill.llama");
        }
    }
}

namespace {

// The process ends right after this, so it says why where it can be seen.
void report_abort(const char * failure) {
    if (Py_IsInitialized() == 0) {
        std::fprintf(stderr, "overspill: %s; this ends the process\n", failure);
        return;
    }
    const py::gil_scoped_acquire gil;
    PySys_FormatStderr("overspill: %s; this ends the process\n", failure);
    drain_log_to_python();
}

}  // namespace

void bind_log(py::module_ & /*m*/) {
    std::for_each(levels.begin(), levels.end(), is_enabled);  // which it remembers, and then takes no lock
    capture_log();
    catch_assertions(report_abort);
}

}  // namespace overspill
