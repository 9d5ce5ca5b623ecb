#include "sample/sampler.h"

#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "sample/kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

// Python's dataclass names the options, and the core's table those that it knows. All are given or none, which stands
// for the core's defaults: a name that only one of the two has is an error. Types were made sure of in Python.
SamplingOptions sampling_options(const py::kwargs & given) {
    SamplingOptions options;
    if (given.empty()) {
        return options;
    }
    const py::dict left = given.attr("copy")();
    for_each_sampling_option([&](const char * name, auto member, auto /*check_range*/) {
        if (!left.contains(name)) {
            throw py::type_error("the sampling option " + std::string(name) + " is not given");
        }
        using Value = std::decay_t<decltype(options.*member)>;
        options.*member = left.attr("pop")(name).template cast<Value>();
    });
    if (!left.empty()) {
        throw py::type_error("there is no sampling option " + py::repr(left.begin()->first).cast<std::string>());
    }
    check(options);
    return options;
}

bool are_equal(const SamplingOptions & a, const SamplingOptions & b) {
    bool equal = true;
    for_each_sampling_option(
        [&](const char * /*name*/, auto member, auto /*check_range*/) { equal = equal && a.*member == b.*member; });
    return equal;
}

// The GIL is kept for these: they take microseconds, and nobody may write to the array meanwhile.
int32_t sample(Sampler & sampler, const py::object & logits, const py::object & allowed) {
    const LogitsRow row = row_of(logits);
    const Mask mask = mask_of(allowed);
    return sampler.sample(row, mask.bits, mask.n_words);
}

py::tuple distribution(const Sampler & sampler, const py::object & logits, const py::object & allowed) {
    const LogitsRow row = row_of(logits);
    const Mask mask = mask_of(allowed);
    const auto survivors = sampler.distribution(row, mask.bits, mask.n_words);
    py::array_t<int32_t> ids(static_cast<py::ssize_t>(survivors.size()));
    py::array_t<float> probabilities(static_cast<py::ssize_t>(survivors.size()));
    for (size_t i = 0; i < survivors.size(); ++i) {
        ids.mutable_at(i) = survivors[i].id;
        probabilities.mutable_at(i) = survivors[i].probability;
    }
    return py::make_tuple(ids, probabilities);
}

}  // namespace

void bind_sampler(py::module_ & m) {
    py::class_<SamplingOptions>(m, "SamplingOptions", py::is_final())
        .def(py::init(&sampling_options))
        .def("__eq__", &are_equal, py::is_operator());

    py::class_<SamplerState>(m, "SamplerState", py::is_final())
        .def(py::init([](uint32_t seed, uint64_t n_draws, std::vector<int32_t> history, float mirostat_mu) {
                 return SamplerState{seed, n_draws, std::move(history), mirostat_mu};
             }),
             py::kw_only(), "seed"_a, "n_draws"_a, "history"_a, "mirostat_mu"_a)
        .def_readonly("seed", &SamplerState::seed)
        .def_readonly("n_draws", &SamplerState::n_draws)
        .def_readonly("history", &SamplerState::history)
        .def_readonly("mirostat_mu", &SamplerState::mirostat_mu);

    py::class_<Sampler, std::shared_ptr<Sampler>>(m, "Sampler", py::is_final())
        .def(py::init<SamplingOptions>(), "options"_a)
        .def("sample", &sample, "logits"_a, "allowed"_a)
        .def("distribution", &distribution, "logits"_a, "allowed"_a)
        .def("accept", &Sampler::accept, "token"_a)
        .def("reset", &Sampler::reset)
        .def("clone", &Sampler::clone)
        .def("state", &Sampler::state)
        .def(
            "restore",
            [](Sampler & sampler, const SamplerState & state) {
                // To draw so many random numbers again may take seconds.
                interruptible([&](const Interrupt::Poll & poll) { sampler.restore(state, poll); });
            },
            "state"_a);

    m.def("simd", [] { return kernels().name; });
}

}  // namespace overspill
