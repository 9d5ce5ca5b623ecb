#include "bindings/bindings.h"
#include "bindings/chooser.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "bindings/stats.h"
#include "generate/generation.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

py::tuple stats_tuple(const GenerationStats & stats) {
    const py::object reason =
        stats.stop_reason == StopReason::none ? py::none() : py::object(py::str(stop_reason_name(stats.stop_reason)));
    const Breakdown & parts = stats.breakdown;
    const auto breakdown = py::make_tuple(parts.wait_s, parts.decode_s, parts.sync_s, parts.logits_s, parts.sample_s,
                                          parts.python_s, parts.text_s, parts.caller_s, parts.n_graph_splits,
                                          parts.n_graphs_reused, parts.n_major_page_faults);
    return py::make_tuple(stats.n_prompt_tokens, stats.n_tokens, stats.prefill_s, stats.decode_s,
                          stats.time_to_first_token_s, reason, stats.n_cached_tokens, stats.n_dropped_tokens,
                          breakdown);
}

namespace {

py::array_t<float> token_logits(const Token & token) {
    if (!token.context) {
        throw Error("the stream keeps no logits: ask for them with stream(..., logits=True)");
    }
    if (token.context->n_decodes() != token.n_decodes) {
        throw Error(
            "the stream has gone on, and the logits of this token are overwritten; read them before the next "
            "token, and keep a copy() if you need them longer");
    }
    return logits_view({token.context, token.logits, 1}, /*as_rows =*/false);
}

std::string repr_of(const Token & token) {
    std::ostringstream text;
    text << "Token(id=" << token.id << ", text=" << py::repr(py::str(token.text)).cast<std::string>();
    if (token.logprob) {
        text << ", logprob=" << *token.logprob;
    }
    text << ")";
    return text.str();
}

Token next_token(Generation & generation) {
    std::optional<Token> token = interruptible([&](const auto & poll) { return generation.next(poll); });
    if (!token) {
        throw py::stop_iteration();
    }
    return std::move(*token);
}

}  // namespace

void bind_stream(py::module_ & m) {
    py::class_<Token>(m, "Token", py::is_final(), "One token of a reply; ``str()`` gives its text.")
        .def_readonly("id", &Token::id, "Its number in the vocabulary.")
        .def_readonly("text", &Token::text,
                      "The text that it completes, in whole characters; empty if a character or a possible stop "
                      "string is not complete yet, and for special tokens.")
        .def_readonly("logprob", &Token::logprob,
                      "Natural logarithm of its probability before temperature and truncation; None unless asked for.")
        .def_property_readonly(
            "top_logprobs", [](const Token & token) { return py::tuple(py::cast(token.top_logprobs)); },
            "The most likely tokens and the natural logarithms of their probabilities, best first; empty unless asked "
            "for.")
        .def_property_readonly(
            "logits", &token_logits,
            "The logits that it was chosen from, float32 of shape (n_vocab,): a view on llama.cpp's own memory, which "
            "the stream's next token overwrites. Error unless stream(logits=True) was said, or after the next token.")
        .def("__str__", [](const Token & token) { return token.text; })
        .def("__repr__", &repr_of)
        .def("__eq__",
             [](const Token & token, const py::object & other) -> py::object {
                 if (!py::isinstance<Token>(other)) {
                     return py::reinterpret_borrow<py::object>(Py_NotImplemented);
                 }
                 const auto & another = other.cast<const Token &>();
                 return py::bool_(token.id == another.id && token.text == another.text &&
                                  token.logprob == another.logprob);
             })
        .def("__hash__", [](const Token & token) { return py::hash(py::make_tuple(token.id, token.text)); });

    // May be destroyed by Python while another thread is in the middle of a step.
    py::class_<Generation, std::shared_ptr<Generation>>(m, "Generation", py::is_final(),
                                                        py::release_gil_before_calling_cpp_dtor())
        .def("__iter__", [](const py::object & self) { return self; })
        .def("__next__", &next_token)
        .def(
            "close",
            [](Generation & generation, const std::string & reason) {
                const StopReason why = stop_reason_of(reason);
                without_gil([&] { generation.close(why); });
            },
            "reason"_a)
        .def("stats", [](const Generation & generation) { return stats_tuple(generation.stats()); });
}

}  // namespace overspill
