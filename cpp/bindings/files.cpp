#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "gguf/gguf_file.h"

#include <llama.h>
#include <pybind11/stl.h>

#include <string>
#include <variant>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

py::dict gguf_dict(const std::string & path) {
    const GgufFile file = without_gil([&] { return read_gguf(GgufHeader(path)); });
    py::dict metadata;
    for (const auto & [key, value] : file.metadata) {
        py::object converted;
        if (const auto * text = std::get_if<std::string>(&value)) {
            converted = lenient_str(*text);
        } else if (const auto * array = std::get_if<GgufArray>(&value)) {
            converted = py::dict("element"_a = array->element_type, "length"_a = array->length);
            if (!std::holds_alternative<std::monostate>(array->values)) {
                converted["values"] = array->values;
            }
        } else if (const auto * number = std::get_if<double>(&value)) {
            converted = py::float_(*number);
        } else if (const auto * flag = std::get_if<bool>(&value)) {
            converted = py::bool_(*flag);
        } else if (const auto * natural = std::get_if<uint64_t>(&value)) {
            converted = py::int_(*natural);
        } else {
            converted = py::int_(std::get<int64_t>(value));
        }
        metadata[lenient_str(key)] = converted;
    }
    py::list tensors;
    for (const auto & tensor : file.tensors) {
        tensors.append(
            py::make_tuple(lenient_str(tensor.name), tensor.type, py::tuple(py::cast(tensor.shape)), tensor.n_bytes));
    }
    py::list files;
    for (const auto & name : file.files) {
        // As os.fsdecode() does: a file's name may be any bytes.
        files.append(py::reinterpret_steal<py::str>(
            PyUnicode_DecodeFSDefaultAndSize(name.data(), static_cast<Py_ssize_t>(name.size()))));
    }
    return py::dict("metadata"_a = metadata, "tensors"_a = tensors, "files"_a = files, "file_bytes"_a = file.n_bytes);
}

}  // namespace

void bind_files(py::module_ & m) {
    m.def("read_gguf", &gguf_dict, "path"_a);
    m.def(
        "file_type_name", [](int32_t type) { return llama_ftype_name(static_cast<llama_ftype>(type)); }, "file_type"_a);
}

}  // namespace overspill
