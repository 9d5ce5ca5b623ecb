// Conversions between Python's values and the core's that several classes need.
#pragma once

#include "generate/evaluation.h"
#include "sample/kernels.h"
#include "sample/row_threads.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace overspill {

// Text that may be any bytes, with U+FFFD for what is no UTF-8.
pybind11::str lenient_str(const std::string & text);

// A getter of a member that is such a text.
template <typename Class>
auto lenient(std::string Class::* member) {
    return [member](const Class & one) { return lenient_str(one.*member); };
}

// An array on memory that `owner` keeps alive.
template <typename T, typename Owner>
pybind11::array_t<T> view_of(T * data, std::vector<pybind11::ssize_t> shape, const std::shared_ptr<Owner> & owner) {
    const pybind11::capsule base(new std::shared_ptr<Owner>(owner),
                                 [](void * kept) { delete static_cast<std::shared_ptr<Owner> *>(kept); });
    return pybind11::array_t<T>(std::move(shape), data, base);
}

// Of shape (n_vocab,), or (n_rows, n_vocab) with `as_rows`; it keeps their owner alive.
pybind11::array_t<float> logits_view(const LogitsView & view, bool as_rows);

// A row of float32 logits, in place. Throws TypeError or ValueError for anything but a contiguous one.
LogitsRow row_of(const pybind11::object & given);

struct Mask {
    TokenBits bits = nullptr;
    size_t n_words = 0;
};

// Of an array of 32-bit integers, one bit per token; None allows all. Throws TypeError.
Mask mask_of(const pybind11::object & allowed);

}  // namespace overspill
