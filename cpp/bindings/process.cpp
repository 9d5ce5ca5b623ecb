#include "base/process.h"

#include "bindings/bindings.h"

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

void bind_process(py::module_ & m) {
    py::class_<Origin>(m, "Origin", py::is_final())
        .def(py::init<>())
        .def_property_readonly("is_here", &Origin::is_here)
        .def("check", [](const Origin & origin, const std::string & what) { origin.check(what.c_str()); }, "what"_a);
}

}  // namespace overspill
