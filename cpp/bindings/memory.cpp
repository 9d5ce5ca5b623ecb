#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "device/pinned_weights.h"
#include "model/memory_report.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace overspill {

void bind_memory(py::module_ & m) {
    py::class_<MemoryUse>(m, "MemoryUse", py::is_final())
        .def_readonly("weights_bytes", &MemoryUse::weights_bytes)
        .def_readonly("kv_bytes", &MemoryUse::kv_bytes)
        .def_readonly("compute_bytes", &MemoryUse::compute_bytes);
    py::class_<MemoryReport::Tensor>(m, "PlacedTensor", py::is_final())
        .def_property_readonly("name", lenient(&MemoryReport::Tensor::name))
        .def_readonly("device", &MemoryReport::Tensor::device)
        .def_readonly("buffer_type", &MemoryReport::Tensor::buffer_type)
        .def_readonly("n_bytes", &MemoryReport::Tensor::n_bytes);
    py::class_<MemoryReport::LayerCache>(m, "PlacedCache", py::is_final())
        .def_readonly("layer", &MemoryReport::LayerCache::layer)
        .def_readonly("device", &MemoryReport::LayerCache::device)
        .def_readonly("n_bytes", &MemoryReport::LayerCache::n_bytes);
    py::class_<PinnedMemory>(m, "PinnedMemory", py::is_final())
        .def_readonly("registered_bytes", &PinnedMemory::registered_bytes)
        .def_readonly("wanted_bytes", &PinnedMemory::wanted_bytes)
        .def_readonly("finished", &PinnedMemory::finished)
        .def_property_readonly("reason", lenient(&PinnedMemory::reason));
    py::class_<MemoryReport>(m, "MemoryReport", py::is_final())
        .def_readonly("devices", &MemoryReport::devices)
        .def_readonly("tensors", &MemoryReport::tensors)
        .def_readonly("kv", &MemoryReport::kv)
        .def_readonly("n_splits", &MemoryReport::n_splits);
}

}  // namespace overspill
