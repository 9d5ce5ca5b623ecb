#include "sample/sampler.h"
#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "sample/json_schema.h"
#include "sample/kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

// Sets an option from the dict where it has one; types were made sure of in Python.
template <typename T>
void take(const py::dict & values, const char * name, T & to) {
    if (values.contains(name)) {
        to = values[name].cast<T>();
    }
}

SamplingOptions sampling_options(const py::dict & values) {
    SamplingOptions options;
    take(values, "temperature", options.temperature);
    take(values, "dynamic_temperature_range", options.dynamic_temperature_range);
    take(values, "dynamic_temperature_exponent", options.dynamic_temperature_exponent);
    take(values, "top_k", options.top_k);
    take(values, "top_p", options.top_p);
    take(values, "min_p", options.min_p);
    take(values, "typical_p", options.typical_p);
    take(values, "top_n_sigma", options.top_n_sigma);
    take(values, "xtc_probability", options.xtc_probability);
    take(values, "xtc_threshold", options.xtc_threshold);
    take(values, "repeat_penalty", options.repeat_penalty);
    take(values, "frequency_penalty", options.frequency_penalty);
    take(values, "presence_penalty", options.presence_penalty);
    take(values, "repeat_last_n", options.repeat_last_n);
    take(values, "dry_multiplier", options.dry_multiplier);
    take(values, "dry_base", options.dry_base);
    take(values, "dry_allowed_length", options.dry_allowed_length);
    take(values, "dry_last_n", options.dry_last_n);
    take(values, "mirostat", options.mirostat);
    take(values, "mirostat_tau", options.mirostat_tau);
    take(values, "mirostat_eta", options.mirostat_eta);
    take(values, "logit_bias", options.logit_bias);
    take(values, "dry_breakers", options.dry_breakers);
    take(values, "seed", options.seed);
    return options;
}

// The GIL is kept for these: they take microseconds, and nobody may write to the array meanwhile.
int32_t sample(Sampler & sampler, const py::object & logits, const py::object & allowed) {
    const LogitsRow row = row_of(logits);
    const Mask mask = mask_of(allowed);
    return sampler.sample(row.logits, row.n, mask.bits, mask.n_words);
}

py::tuple distribution(const Sampler & sampler, const py::object & logits, const py::object & allowed) {
    const LogitsRow row = row_of(logits);
    const Mask mask = mask_of(allowed);
    const auto survivors = sampler.distribution(row.logits, row.n, mask.bits, mask.n_words);
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
    py::class_<Sampler, std::shared_ptr<Sampler>>(m, "Sampler", py::is_final())
        .def(py::init([](const py::dict & options) { return std::make_shared<Sampler>(sampling_options(options)); }),
             "options"_a)
        .def("sample", &sample, "logits"_a, "allowed"_a)
        .def("distribution", &distribution, "logits"_a, "allowed"_a)
        .def("accept", &Sampler::accept, "token"_a)
        .def("reset", &Sampler::reset)
        .def("clone", &Sampler::clone)
        .def("state",
             [](const Sampler & sampler) {
                 const SamplerState state = sampler.state();
                 return py::make_tuple(state.seed, state.n_draws, state.history, state.mirostat_mu);
             })
        .def(
            "restore",
            [](Sampler & sampler, uint32_t seed, uint64_t n_draws, std::vector<int32_t> history, float mirostat_mu) {
                // To draw so many random numbers again may take seconds.
                without_gil([&] { sampler.restore({seed, n_draws, std::move(history), mirostat_mu}); });
            },
            "seed"_a, "n_draws"_a, "history"_a, "mirostat_mu"_a);

    m.def("check_sampling", [](const py::dict & options) { check(sampling_options(options)); }, "options"_a);
    m.def("simd", [] { return kernels().name; });
    m.def(
        "grammar_of_json_schema",
        [](const std::string & schema) { return without_gil([&] { return grammar_of_json_schema(schema); }); },
        "schema"_a);
}

}  // namespace overspill
