#include "bindings/convert.h"

namespace py = pybind11;

namespace overspill {

py::str lenient_str(const std::string & text) {
    return py::bytes(text).attr("decode")("utf-8", "replace");
}

py::array_t<float> logits_view(const LogitsView & view, bool as_rows) {
    const auto n_vocab = static_cast<py::ssize_t>(view.n_vocab);
    const auto n_rows = static_cast<py::ssize_t>(view.n_rows);
    return view_of(view.logits, as_rows ? std::vector{n_rows, n_vocab} : std::vector{n_vocab}, view.owner);
}

LogitsRow row_of(const py::object & given) {
    if (!py::isinstance<py::array>(given)) {
        throw py::type_error("logits must be a numpy array of float32, not " +
                             py::str(py::type::of(given).attr("__name__")).cast<std::string>());
    }
    const auto logits = py::reinterpret_borrow<py::array>(given);
    if (!py::isinstance<py::array_t<float>>(logits)) {
        throw py::type_error("logits must be of dtype float32, not " + py::str(logits.dtype()).cast<std::string>());
    }
    if (logits.ndim() != 1 || logits.size() == 0 || logits.strides(0) != sizeof(float)) {
        throw py::value_error("logits must be one contiguous row, of shape (n_vocab,), not of shape " +
                              py::str(logits.attr("shape")).cast<std::string>());
    }
    return {static_cast<const float *>(logits.data()), static_cast<size_t>(logits.size())};
}

Mask mask_of(const py::object & allowed) {
    if (allowed.is_none()) {
        return {};
    }
    const auto array = py::array::ensure(allowed);
    const bool fits = array && array.ndim() == 1 && array.itemsize() == sizeof(uint32_t) && array.size() > 0 &&
                      (array.dtype().kind() == 'u' || array.dtype().kind() == 'i') &&
                      array.strides(0) == sizeof(uint32_t);
    if (!fits || !array.is(allowed)) {
        throw py::type_error("allowed must be a contiguous array of uint32 or int32, with one bit per token");
    }
    return {static_cast<TokenBits>(array.data()), static_cast<size_t>(array.size())};
}

}  // namespace overspill
