#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "model/sequence_state.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

// The memory itself, in the order in which it is in a file.
std::vector<py::array> parts_of(const std::shared_ptr<SequenceState> & state) {
    const auto view = [&](auto & vector) {
        return view_of(vector.data(), {static_cast<py::ssize_t>(vector.size())}, state);
    };
    return {view(state->tokens), view(state->state), view(state->remembered)};
}

std::shared_ptr<SequenceState> empty_state(size_t n_tokens, size_t state_bytes, size_t remembered_bytes,
                                           size_t n_remembered, uint32_t n_streams, bool is_long) {
    auto state = std::make_shared<SequenceState>();
    state->tokens.resize(n_tokens);
    state->state.resize(state_bytes);
    state->remembered.resize(remembered_bytes);
    state->n_remembered = n_remembered;
    state->n_streams = n_streams;
    state->is_long = is_long;
    return state;
}

}  // namespace

void bind_states(py::module_ & m) {
    py::class_<SequenceState, std::shared_ptr<SequenceState>>(m, "SequenceState", py::is_final())
        .def(py::init(&empty_state), "n_tokens"_a, "state_bytes"_a, "remembered_bytes"_a, "n_remembered"_a,
             "n_streams"_a, "is_long"_a)
        .def("parts", &parts_of)
        .def_readonly("n_remembered", &SequenceState::n_remembered)
        .def_readonly("n_streams", &SequenceState::n_streams)
        .def_readonly("is_long", &SequenceState::is_long);
}

}  // namespace overspill
