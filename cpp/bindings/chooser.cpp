#include "bindings/chooser.h"

#include "bindings/convert.h"
#include "bindings/gil.h"

#include <pybind11/numpy.h>

#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace overspill {

namespace {

// A mask that Python code computes, such as llguidance's.
class PythonConstraint : public Constraint {
  public:
    explicit PythonConstraint(py::object mask) : mask_(held(std::move(mask))) {}

    int32_t sample(Sampler & sampler, const LogitsRow & row, Logprobs * logprobs,
                   const ShouldStop & /*should_stop*/) override {
        const py::gil_scoped_acquire gil;
        const py::object bits = mask_->attr("allowed")();
        const Mask mask = mask_of(bits);
        return sampler.sample(row, mask.bits, mask.n_words, logprobs);
    }
    bool allows(int32_t token, const ShouldStop & /*should_stop*/) override {
        const py::gil_scoped_acquire gil;
        const py::object bits = mask_->attr("allowed")();
        const Mask mask = mask_of(bits);
        const auto at = static_cast<size_t>(token);
        return mask.bits == nullptr || (at / 32 < mask.n_words && ((mask.bits[at / 32] >> (at % 32)) & 1U) != 0);
    }
    void accept(int32_t token, const ShouldStop & /*should_stop*/) override {
        const py::gil_scoped_acquire gil;
        mask_->attr("accept")(token);
    }
    bool is_native() const override { return false; }

  private:
    std::shared_ptr<py::object> mask_;
};

}  // namespace

std::shared_ptr<Constraint> python_constraint(py::object mask) {
    return std::make_shared<PythonConstraint>(std::move(mask));
}

Chooser chooser_of(const py::object & callable) {
    if (callable.is_none()) {
        return {};
    }
    return [kept = held(callable)](const ChooserView & view) -> std::optional<int32_t> {
        const py::gil_scoped_acquire gil;
        auto tokens = view_of(view.tokens->data(), {static_cast<py::ssize_t>(view.tokens->size())}, view.tokens);
        // As its setflags(), which would be looked up and called for each token.
        py::detail::array_proxy(tokens.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
        const py::object answer =
            (*kept)(logits_view({view.owner, view.logits, 1, view.n_logits}, /*as_rows =*/false), tokens);
        if (answer.is_none()) {
            return std::nullopt;
        }
        if (PyIndex_Check(answer.ptr()) == 0 || PyBool_Check(answer.ptr()) != 0) {
            throw py::type_error("the sampler must return a token id or None, not " +
                                 py::repr(answer).cast<std::string>());
        }
        const auto id = py::reinterpret_steal<py::object>(PyNumber_Index(answer.ptr()));
        int overflow = 0;
        const long long value = id ? PyLong_AsLongLongAndOverflow(id.ptr(), &overflow) : -1;
        if (PyErr_Occurred() != nullptr) {
            throw py::error_already_set();
        }
        constexpr auto largest = std::numeric_limits<int32_t>::max();
        // What does not fit is not in the vocabulary either, which the core will say.
        return overflow != 0 || value < -1 || value > largest ? -1 : static_cast<int32_t>(value);
    };
}

}  // namespace overspill
