#include "device/devices.h"
#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "device/rpc.h"
#include "device/weights.h"
#include "product/products.h"

#include <ggml-rpc.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

void bind_devices(py::module_ & m) {
    m.attr("RPC_PROTOCOL_VERSION") = py::make_tuple(RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION);
    py::list gpu_backends;
    for (const char * backend : std::vector<const char *>{OVERSPILL_GPU_BACKENDS}) {
        gpu_backends.append(backend);
    }
    m.attr("GPU_BACKENDS") = gpu_backends;
    py::class_<DeviceDescription>(m, "DeviceDescription", py::is_final())
        .def_readonly("name", &DeviceDescription::name)
        .def_property_readonly("description", lenient(&DeviceDescription::description))
        .def_readonly("kind", &DeviceDescription::kind)
        .def_readonly("backend", &DeviceDescription::backend)
        .def_property_readonly("free_bytes", [](const DeviceDescription & one) { return one.memory.free_bytes; })
        .def_property_readonly("total_bytes", [](const DeviceDescription & one) { return one.memory.total_bytes; })
        .def_readonly("registers_host_memory", &DeviceDescription::registers_host_memory);
    m.def("devices", [] { return without_gil(list_devices); });
    m.def("cpu_features", &cpu_features);
    m.def(
        "repacks",
        [](const std::string & kernels) {
            return wants_extra_buffers(kernels != "llama.cpp" && product_set() != nullptr);
        },
        "kernels"_a);
    m.def("cpu_kernels", [] {
        const ProductSet * set = product_set();
        return std::string(set == nullptr ? "llama.cpp" : set->name);
    });
    m.def("cpu_kernel_types", [] {
        std::vector<std::string> names;
        for (const ggml_type type : types_of_our_products()) {
            names.emplace_back(ggml_type_name(type));
        }
        return names;
    });
    m.def(
        "add_rpc_server", [](const std::string & endpoint) { without_gil([&] { add_rpc_server(endpoint); }); },
        "endpoint"_a);
    m.def("load_backends", [](const std::string & folder) { without_gil([&] { load_backends(folder); }); }, "folder"_a);
}

}  // namespace overspill
