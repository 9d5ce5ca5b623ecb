#include "base/process.h"
#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "device/device_meter.h"
#include "model/device_times.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

void bind_measurement(py::module_ & m) {
    py::class_<WeightRate>(m, "WeightRate", py::is_final())
        .def_readonly("bytes_per_s", &WeightRate::bytes_per_s)
        .def_readonly("buffer_type", &WeightRate::buffer_type)
        .def_readonly("kernels", &WeightRate::kernels);
    py::class_<LinkRates>(m, "LinkRates", py::is_final())
        .def_readonly("to_device_bytes_per_s", &LinkRates::to_device_bytes_per_s)
        .def_readonly("from_device_bytes_per_s", &LinkRates::from_device_bytes_per_s);
    py::class_<DeviceTime>(m, "DeviceTime", py::is_final())
        .def_readonly("seconds", &DeviceTime::seconds)
        .def_readonly("n_pieces", &DeviceTime::n_pieces);
    py::class_<DeviceTimes>(m, "DeviceTimes", py::is_final())
        .def_readonly("devices", &DeviceTimes::devices)
        .def_readonly("moving_s", &DeviceTimes::moving_s)
        .def_readonly("total_s", &DeviceTimes::total_s);

    py::class_<DeviceMeter, std::shared_ptr<DeviceMeter>>(m, "DeviceMeter", py::is_final(),
                                                          py::release_gil_before_calling_cpp_dtor())
        .def(py::init([](const std::string & device, int32_t n_threads, uint64_t working_set_bytes,
                         std::vector<std::string> gpus, double budget_s) {
                 MeterOptions options{n_threads, working_set_bytes, std::move(gpus), budget_s};
                 return without_gil(
                     [&] { return left_alone_by_forks(std::make_unique<DeviceMeter>(device, std::move(options))); });
             }),
             "device"_a, py::kw_only(), "n_threads"_a, "working_set_bytes"_a, "gpus"_a, "budget_s"_a)
        .def(
            "use_products",
            [](DeviceMeter & meter, const std::string & kernels, std::optional<bool> repack) {
                without_gil([&] { meter.use_products(kernels, repack); });
            },
            "kernels"_a, "repack"_a)
        .def(
            "weight_rate",
            [](DeviceMeter & meter, const std::string & type, int64_t n_in, int64_t n_out, int64_t n_experts,
               int64_t n_used, int64_t n_tokens) {
                return without_gil([&] { return meter.weight_rate(type, n_in, n_out, n_experts, n_used, n_tokens); });
            },
            "type"_a, "n_in"_a, "n_out"_a, "n_experts"_a, "n_used"_a, "n_tokens"_a = 1)
        .def(
            "attention_bytes_per_s",
            [](DeviceMeter & meter, const std::string & type, int64_t n_heads, int64_t n_heads_kv, int64_t head_width,
               int64_t n_kv) {
                return without_gil(
                    [&] { return meter.attention_bytes_per_s(type, n_heads, n_heads_kv, head_width, n_kv); });
            },
            "type"_a, "n_heads"_a, "n_heads_kv"_a, "head_width"_a, "n_kv"_a)
        .def(
            "operation_s",
            [](DeviceMeter & meter, int64_t n_embd) { return without_gil([&] { return meter.operation_s(n_embd); }); },
            "n_embd"_a)
        .def(
            "visit_s",
            [](DeviceMeter & meter, int64_t n_embd) { return without_gil([&] { return meter.visit_s(n_embd); }); },
            "n_embd"_a)
        .def(
            "exchange_s",
            [](DeviceMeter & meter, const std::string & type, int64_t n_embd, int64_t n_ff, int64_t n_used) {
                return without_gil([&] { return meter.exchange_s(type, n_embd, n_ff, n_used); });
            },
            "type_name"_a, "n_embd"_a, "n_ff"_a, "n_used"_a)
        .def("memory_bytes_per_s",
             [](DeviceMeter & meter) { return without_gil([&] { return meter.memory_bytes_per_s(); }); })
        .def(
            "link_rates",
            [](DeviceMeter & meter, uint64_t n_bytes, bool pinned) {
                return without_gil([&] { return meter.link_rates(n_bytes, pinned); });
            },
            "n_bytes"_a, "pinned"_a)
        .def(
            "batch_flops",
            [](DeviceMeter & meter, const std::string & type, int64_t n_in, int64_t n_out, int64_t n_experts,
               int64_t n_used, int64_t n_tokens) {
                return without_gil([&] { return meter.batch_flops(type, n_in, n_out, n_experts, n_used, n_tokens); });
            },
            "type"_a, "n_in"_a, "n_out"_a, "n_experts"_a, "n_used"_a, "n_tokens"_a)
        .def(
            "attention_flops",
            [](DeviceMeter & meter, const std::string & type, int64_t n_heads, int64_t n_heads_kv, int64_t head_width,
               int64_t n_tokens) {
                return without_gil(
                    [&] { return meter.attention_flops(type, n_heads, n_heads_kv, head_width, n_tokens); });
            },
            "type"_a, "n_heads"_a, "n_heads_kv"_a, "head_width"_a, "n_tokens"_a);
}

}  // namespace overspill
