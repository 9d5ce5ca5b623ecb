#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "device/expert_cache.h"
#include "product/expert_recorder.h"
#include "product/expert_replays.h"

#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

// On the array's memory, which the argument keeps alive.
ExpertRoutes routes_of(const py::array & ids, size_t n_experts) {
    if (!py::isinstance<py::array_t<uint16_t>>(ids)) {
        throw py::type_error("ids must be of dtype uint16, not " + py::str(ids.dtype()).cast<std::string>());
    }
    if (ids.ndim() != 3 || (ids.flags() & py::array::c_style) == 0) {
        throw py::value_error("ids must be contiguous, of shape (tokens, layers, experts of a token), not of shape " +
                              py::str(ids.attr("shape")).cast<std::string>());
    }
    const auto size = [&](int i) { return static_cast<size_t>(ids.shape(i)); };
    return {static_cast<const uint16_t *>(ids.data()), size(0), size(1), size(2), n_experts};
}

// All that can be read.
py::array_t<uint16_t> read(ExpertRecorder & recorder) {
    const size_t n = recorder.n_readable();
    py::array_t<uint16_t> ids({n, recorder.n_layers(), recorder.n_used()});
    recorder.read(ids.mutable_data(), n);
    return ids;
}

}  // namespace

void bind_experts(py::module_ & m) {
    m.attr("UNKNOWN_EXPERT") = unknown_expert;
    py::native_enum<CachePolicy>(m, "CachePolicy", "enum.Enum")
        .value("lru", CachePolicy::lru)
        .value("lru_one_insertion", CachePolicy::lru_one_insertion)
        .value("lru_shared", CachePolicy::lru_shared)
        .value("second_touch", CachePolicy::second_touch)
        .value("lfu", CachePolicy::lfu)
        .value("fixed", CachePolicy::fixed)
        .value("belady", CachePolicy::belady)
        .finalize();
    py::class_<ReplayCounts>(m, "ReplayCounts", py::is_final())
        .def_readonly("n_requests", &ReplayCounts::n_requests)
        .def_readonly("n_hits", &ReplayCounts::n_hits)
        .def_readonly("n_insertions", &ReplayCounts::n_insertions);
    py::class_<ExpertCounts>(m, "ExpertCounts", py::is_final())
        .def_readonly("n_tokens", &ExpertCounts::n_tokens)
        .def_readonly("n_requests", &ExpertCounts::n_requests)
        .def_readonly("n_hits", &ExpertCounts::n_hits)
        .def_readonly("n_insertions", &ExpertCounts::n_insertions)
        .def_readonly("hit_bytes", &ExpertCounts::hit_bytes)
        .def_readonly("miss_bytes", &ExpertCounts::miss_bytes)
        .def_readonly("n_resident", &ExpertCounts::n_resident)
        .def_readonly("n_slots", &ExpertCounts::n_slots)
        .def_readonly("n_experts", &ExpertCounts::n_experts)
        .def_readonly("is_off", &ExpertCounts::is_off)
        .def_readonly("is_proven", &ExpertCounts::is_proven);
    py::class_<ExpertRecorder, std::shared_ptr<ExpertRecorder>>(m, "ExpertRecorder", py::is_final())
        .def(py::init<size_t, size_t, size_t>(), "n_layers"_a, "n_used"_a, "n_tokens"_a)
        .def("read", &read)
        .def_property_readonly("n_lost", &ExpertRecorder::n_lost);
    m.def(
        "replay_experts",
        [](const py::array & ids, size_t n_experts, CachePolicy policy, size_t capacity) {
            const ExpertRoutes routes = routes_of(ids, n_experts);
            return without_gil([&] { return replay(routes, policy, capacity); });
        },
        "ids"_a, "n_experts"_a, "policy"_a, "capacity"_a);
    m.def(
        "expert_reuse_distances",
        [](const py::array & ids, size_t n_experts) {
            const ExpertRoutes routes = routes_of(ids, n_experts);
            return without_gil([&] { return reuse_distances(routes); });
        },
        "ids"_a, "n_experts"_a);
}

}  // namespace overspill
