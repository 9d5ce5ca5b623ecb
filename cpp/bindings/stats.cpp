#include "bindings/bindings.h"
#include "generate/generation_stats.h"

#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <optional>

namespace py = pybind11;

namespace overspill {

void bind_stats(py::module_ & m) {
    py::native_enum<StopReason>(m, "StopReason", "enum.Enum")
        .value("eos", StopReason::eos)
        .value("stop_string", StopReason::stop_string)
        .value("max_tokens", StopReason::max_tokens)
        .value("context_full", StopReason::context_full)
        .value("closed", StopReason::closed)
        .value("interrupted", StopReason::interrupted)
        .value("error", StopReason::error)
        .finalize();

    py::class_<Breakdown>(m, "Breakdown", py::is_final())
        .def_readonly("wait_s", &Breakdown::wait_s)
        .def_readonly("decode_s", &Breakdown::decode_s)
        .def_readonly("sync_s", &Breakdown::sync_s)
        .def_readonly("logits_s", &Breakdown::logits_s)
        .def_readonly("sample_s", &Breakdown::sample_s)
        .def_readonly("python_s", &Breakdown::python_s)
        .def_readonly("text_s", &Breakdown::text_s)
        .def_readonly("caller_s", &Breakdown::caller_s)
        .def_readonly("n_graphs_reused", &Breakdown::n_graphs_reused)
        .def_readonly("n_threads_left_out", &Breakdown::n_threads_left_out)
        .def_readonly("n_major_page_faults", &Breakdown::n_major_page_faults)
        .def_readonly("n_graph_splits", &Breakdown::n_graph_splits);

    py::class_<GenerationStats>(m, "GenerationStats", py::is_final())
        .def_readonly("n_prompt_tokens", &GenerationStats::n_prompt_tokens)
        .def_readonly("n_cached_tokens", &GenerationStats::n_cached_tokens)
        .def_readonly("n_dropped_tokens", &GenerationStats::n_dropped_tokens)
        .def_readonly("n_tokens", &GenerationStats::n_tokens)
        .def_readonly("prefill_s", &GenerationStats::prefill_s)
        .def_readonly("decode_s", &GenerationStats::decode_s)
        .def_readonly("time_to_first_token_s", &GenerationStats::time_to_first_token_s)
        .def_property_readonly("stop_reason",
                               [](const GenerationStats & stats) {
                                   return stats.stop_reason == StopReason::none ? std::nullopt
                                                                                : std::optional(stats.stop_reason);
                               })
        .def_readonly("breakdown", &GenerationStats::breakdown);
}

}  // namespace overspill
