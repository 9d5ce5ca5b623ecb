#include "bindings/bindings.h"
#include "bindings/chooser.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
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

namespace {

py::array_t<float> token_logits(const Token & token) {
    if (!token.owner) {
        throw Error("the stream keeps no logits: ask for them with stream(..., logits=True)");
    }
    if (token.n_rows->load() != token.n_rows_then) {
        throw Error(
            "the stream has gone on, and the logits of this token are overwritten; read them before the next "
            "token, and keep a copy() if you need them longer");
    }
    return logits_view({token.owner, token.logits, 1, token.n_logits}, /*as_rows =*/false);
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

void set_mask(GenerationOptions & options, const py::object & mask) {
    options.constraint = mask.is_none() ? nullptr : python_constraint(mask);
}

void set_chooser(GenerationOptions & options, const py::object & callable) {
    options.choose = chooser_of(callable);
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
    py::class_<GenerationOptions>(m, "GenerationOptions", py::is_final())
        .def(py::init<>())
        .def_readwrite("sampler", &GenerationOptions::sampler)
        .def_readwrite("max_tokens", &GenerationOptions::max_tokens)
        .def_readwrite("stop", &GenerationOptions::stop)
        .def_readwrite("n_logprobs", &GenerationOptions::n_logprobs)
        .def_readwrite("grammar", &GenerationOptions::grammar)
        .def_property("mask", nullptr, &set_mask)
        .def_property("choose", nullptr, &set_chooser)
        .def_readwrite("keep_logits", &GenerationOptions::keep_logits)
        .def_readwrite("look_ahead", &GenerationOptions::look_ahead)
        .def_readwrite("reuse", &GenerationOptions::reuse)
        .def_property(
            "saved", nullptr,
            [](GenerationOptions & options, std::shared_ptr<SequenceState> saved) { options.saved = std::move(saved); })
        .def_readwrite("keeps_state", &GenerationOptions::keeps_state)
        .def_readwrite("eager", &GenerationOptions::eager)
        .def_readwrite("recorder", &GenerationOptions::recorder)
        .def_readwrite("form", &GenerationOptions::form);

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
        .def("__hash__", [](const Token & token) { return py::hash(py::make_tuple(token.id, token.text)); })
        // Without logits, which are the stream's.
        .def(py::pickle(
            [](const Token & token) { return py::make_tuple(token.id, token.text, token.logprob, token.top_logprobs); },
            [](const py::tuple & saved) {
                return Token{saved[0].cast<int32_t>(), saved[1].cast<std::string>(),
                             saved[2].cast<std::optional<float>>(),
                             saved[3].cast<std::vector<std::pair<int32_t, float>>>()};
            }));

    // May be destroyed by Python while another thread is in the middle of a step.
    py::class_<Generation, std::shared_ptr<Generation>>(m, "Generation", py::is_final(),
                                                        py::release_gil_before_calling_cpp_dtor())
        .def("__iter__", [](const py::object & self) { return self; })
        .def("__next__", &next_token)
        .def(
            "close", [](Generation & generation, StopReason reason) { without_gil([&] { generation.close(reason); }); },
            "reason"_a)
        .def("take_state",
             [](Generation & generation) {
                 return std::const_pointer_cast<SequenceState>(without_gil([&] { return generation.take_state(); }));
             })
        .def("stats", &Generation::stats);
}

}  // namespace overspill
