#include "device/devices.h"
#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "device/rpc.h"

#include <ggml-rpc.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

py::list device_list() {
    py::list devices;
    for (const DeviceDescription & one : without_gil(list_devices)) {
        devices.append(py::dict("name"_a = one.name, "description"_a = lenient_str(one.description),
                                "kind"_a = one.kind, "backend"_a = one.backend, "free_bytes"_a = one.memory.free_bytes,
                                "total_bytes"_a = one.memory.total_bytes));
    }
    return devices;
}

}  // namespace

void bind_devices(py::module_ & m) {
    m.attr("RPC_PROTOCOL_VERSION") = py::make_tuple(RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION);
    py::list gpu_backends;
    for (const char * backend : std::vector<const char *>{OVERSPILL_GPU_BACKENDS}) {
        gpu_backends.append(backend);
    }
    m.attr("GPU_BACKENDS") = gpu_backends;
    m.def("devices", &device_list);
    m.def("cpu_features", &cpu_features);
    m.def(
        "add_rpc_server", [](const std::string & endpoint) { without_gil([&] { add_rpc_server(endpoint); }); },
        "endpoint"_a);
    m.def("load_backends", [](const std::string & folder) { without_gil([&] { load_backends(folder); }); }, "folder"_a);
}

}  // namespace overspill
