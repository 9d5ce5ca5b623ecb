#include "generate/batch.h"

#include "bindings/bindings.h"
#include "bindings/gil.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>

namespace py = pybind11;

namespace overspill {

namespace {

BatchOutcome next_outcome(BatchGeneration & batch) {
    std::optional<BatchOutcome> outcome = interruptible([&](const auto & poll) { return batch.next(poll); });
    if (!outcome) {
        throw py::stop_iteration();
    }
    return std::move(*outcome);
}

}  // namespace

void bind_batch(py::module_ & m) {
    py::class_<BatchOutcome>(m, "BatchOutcome", py::is_final())
        .def_readonly("request", &BatchOutcome::request)
        .def_readonly("tokens", &BatchOutcome::tokens)
        .def_readonly("stats", &BatchOutcome::stats);
    py::class_<BatchGeneration, std::shared_ptr<BatchGeneration>>(m, "BatchGeneration", py::is_final(),
                                                                  py::release_gil_before_calling_cpp_dtor())
        .def("__iter__", [](const py::object & self) { return self; })
        .def("__next__", &next_outcome)
        .def("close", [](BatchGeneration & batch) { without_gil([&] { batch.close(); }); });
}

}  // namespace overspill
