#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "gguf/gguf_file.h"

#include <llama.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <variant>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

py::object object_of(const GgufValue & value) {
    if (const auto * text = std::get_if<std::string>(&value)) {
        return lenient_str(*text);
    }
    return std::visit([](const auto & one) { return py::cast(one); }, value);
}

py::dict metadata_of(const GgufFile & file) {
    py::dict metadata;
    for (const auto & [key, value] : file.metadata) {
        metadata[lenient_str(key)] = object_of(value);
    }
    return metadata;
}

// As os.fsdecode() does: a file's name may be any bytes.
py::list names_of(const GgufFile & file) {
    py::list names;
    for (const std::string & name : file.files) {
        names.append(py::reinterpret_steal<py::str>(
            PyUnicode_DecodeFSDefaultAndSize(name.data(), static_cast<Py_ssize_t>(name.size()))));
    }
    return names;
}

}  // namespace

void bind_files(py::module_ & m) {
    py::class_<GgufArray>(m, "GgufArray", py::is_final())
        .def_readonly("element_type", &GgufArray::element_type)
        .def_readonly("length", &GgufArray::length)
        .def_readonly("values", &GgufArray::values);
    py::class_<GgufTensor>(m, "GgufTensor", py::is_final())
        .def_property_readonly("name", lenient(&GgufTensor::name))
        .def_readonly("type", &GgufTensor::type)
        .def_property_readonly("shape", [](const GgufTensor & tensor) { return py::tuple(py::cast(tensor.shape)); })
        .def_readonly("n_bytes", &GgufTensor::n_bytes);
    // The first three are made anew each time that they are read.
    py::class_<GgufFile>(m, "GgufFile", py::is_final())
        .def_property_readonly("metadata", &metadata_of)
        .def_readonly("tensors", &GgufFile::tensors)
        .def_property_readonly("files", &names_of)
        .def_readonly("n_bytes", &GgufFile::n_bytes);
    m.def(
        "read_gguf", [](const std::string & path) { return without_gil([&] { return read_gguf(GgufHeader(path)); }); },
        "path"_a);
    m.def(
        "file_type_name", [](int32_t type) { return llama_ftype_name(static_cast<llama_ftype>(type)); }, "file_type"_a);
}

}  // namespace overspill
