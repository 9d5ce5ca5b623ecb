#include "base/assertions.h"
#include "base/error.h"
#include "bindings/bindings.h"
#include "device/out_of_memory.h"

#include <pybind11/pybind11.h>

#include <exception>
#include <new>
#include <string>
#include <system_error>

namespace py = pybind11;

namespace overspill {

namespace {

void raise_out_of_memory(const py::handle & type, const OutOfMemoryError & memory) {
    const py::object value = type(memory.what());
    value.attr("device") = memory.device;
    value.attr("needed_bytes") = memory.needed_bytes;
    PyErr_SetObject(type.ptr(), value.ptr());
}

// Some libraries have their own words around the system's.
std::string reason_of(const std::system_error & refused) {
    return refused.code() ? "the system refuses: " + refused.code().message() : std::string(refused.what());
}

}  // namespace

void bind_errors(py::module_ & m) {
    const auto describe = [](const py::handle & type, const char * doc) {
        type.attr("__module__") = "overspill";
        type.attr("__doc__") = doc;
    };
    static const py::handle error = py::register_exception<Error>(m, "Error");  // for the translator, too
    describe(error, "Something that the library or llama.cpp could not do; the base of the others.");
    describe(py::register_exception<ModelLoadError>(m, "ModelLoadError", error),
             "The file is missing, damaged, or not a model that can be loaded.");
    // Kept for the translator at the end of this function, and never let go of.
    static const py::handle out_of_memory = py::exception<OutOfMemoryError>(m, "OutOfMemoryError", error).release();
    describe(out_of_memory,
             "A device refused memory that a model or its context needs: ``device`` is its name, ``needed_bytes`` what "
             "was asked for.");
    describe(py::register_exception<ContextFullError>(m, "ContextFullError", error),
             "Prompt and reply do not fit into the context (``n_ctx``).");
    describe(py::register_exception<ClosedError>(m, "ClosedError", error), "The model was closed.");
    describe(py::register_exception<UnusableError>(m, "UnusableError", error),
             "An assertion of llama.cpp failed while the model computed: it cannot be used any more; load it anew.");
    describe(py::register_exception<CancelledError>(m, "CancelledError", error),
             "The progress callback returned False.");

    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            std::rethrow_exception(thrown);
        } catch (const ViewsInUseError & views) {
            py::set_error(PyExc_BufferError, views.what());
        } catch (const OutOfMemoryError & memory) {
            raise_out_of_memory(out_of_memory, memory);
        } catch (const std::system_error & refused) {
            py::set_error(error, reason_of(refused).c_str());
        } catch (const std::bad_alloc &) {
            raise_out_of_memory(out_of_memory, ram_refused());
        } catch (const AssertionFailed & failed) {
            if (!is_for_want_of_memory(failed.what())) {
                throw;
            }
            raise_out_of_memory(out_of_memory, ram_refused());
        }
    });
}

}  // namespace overspill
