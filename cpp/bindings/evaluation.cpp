#include "generate/evaluation.h"
#include "base/process.h"
#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

py::array_t<float> evaluate(Evaluation & evaluation, const std::vector<int32_t> & tokens, bool all) {
    return logits_view(interruptible([&](const auto & poll) { return evaluation.eval(tokens, all, poll); }), all);
}

}  // namespace

void bind_evaluation(py::module_ & m) {
    py::class_<Evaluation, std::shared_ptr<Evaluation>>(m, "Evaluation", py::is_final(),
                                                        py::release_gil_before_calling_cpp_dtor())
        .def(py::init([](std::shared_ptr<Model> model) {
                 return left_alone_by_forks(std::make_unique<Evaluation>(std::move(model)));
             }),
             "model"_a)
        .def("eval", &evaluate, "tokens"_a, "every"_a)
        .def("reset", [](Evaluation & evaluation) { without_gil([&] { evaluation.reset(); }); });
}

}  // namespace overspill
