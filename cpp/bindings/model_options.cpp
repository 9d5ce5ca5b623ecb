#include "model/model_options.h"

#include "bindings/bindings.h"

#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace overspill {

void bind_model_options(py::module_ & m) {
    py::native_enum<Switch>(m, "Switch", "enum.Enum")
        .value("auto", Switch::automatic)
        .value("on", Switch::on)
        .value("off", Switch::off)
        .finalize();
    py::native_enum<LoadMode>(m, "LoadMode", "enum.Enum")
        .value("mmap", LoadMode::mmap)
        .value("read", LoadMode::read)
        .value("mlock", LoadMode::mlock)
        .value("mmap_mlock", LoadMode::mmap_mlock)
        .value("direct_io", LoadMode::direct_io)
        .finalize();
    py::native_enum<CpuKernels>(m, "CpuKernels", "enum.Enum")
        .value("auto", CpuKernels::automatic)
        .value("llama_cpp", CpuKernels::llama_cpp)
        .finalize();
    py::native_enum<CacheType>(m, "CacheType", "enum.Enum")
        .value("f32", CacheType::f32)
        .value("f16", CacheType::f16)
        .value("bf16", CacheType::bf16)
        .value("q8_0", CacheType::q8_0)
        .value("q5_1", CacheType::q5_1)
        .value("q5_0", CacheType::q5_0)
        .value("q4_1", CacheType::q4_1)
        .value("q4_0", CacheType::q4_0)
        .value("iq4_nl", CacheType::iq4_nl)
        .finalize();

    py::class_<Placement>(m, "Placement", py::is_final())
        .def(py::init<>())
        .def_readwrite("devices", &Placement::devices)
        .def_readwrite("tensor_split", &Placement::tensor_split)
        .def_readwrite("n_gpu_layers", &Placement::n_gpu_layers)
        .def_readwrite("overrides", &Placement::overrides);
    py::class_<ExpertCacheOptions>(m, "ExpertCacheOptions", py::is_final())
        .def(py::init<>())
        .def_property(
            "pools",
            [](const ExpertCacheOptions & options) {
                std::vector<std::pair<std::string, size_t>> pools;
                for (const ExpertPool & pool : options.pools) {
                    pools.emplace_back(pool.device, pool.n_bytes);
                }
                return pools;
            },
            [](ExpertCacheOptions & options, const std::vector<std::pair<std::string, size_t>> & pools) {
                options.pools.clear();
                for (const auto & [device, n_bytes] : pools) {
                    options.pools.push_back({device, n_bytes});
                }
            })
        .def_readwrite("most_insertions", &ExpertCacheOptions::most_insertions)
        .def_readwrite("profile", &ExpertCacheOptions::profile)
        .def_readwrite("is_trusted", &ExpertCacheOptions::is_trusted)
        .def_readwrite("worth", &ExpertCacheOptions::worth);
    py::class_<ModelOptions>(m, "ModelOptions", py::is_final())
        .def(py::init<>())
        .def_readwrite("placement", &ModelOptions::placement)
        .def_readwrite("n_ctx", &ModelOptions::n_ctx)
        .def_readwrite("n_parallel", &ModelOptions::n_parallel)
        .def_readwrite("prompt_cache_bytes", &ModelOptions::prompt_cache_bytes)
        .def_readwrite("max_pause_s", &ModelOptions::max_pause_s)
        .def_readwrite("n_batch", &ModelOptions::n_batch)
        .def_readwrite("n_ubatch", &ModelOptions::n_ubatch)
        .def_readwrite("n_threads", &ModelOptions::n_threads)
        .def_readwrite("adapt_threads", &ModelOptions::adapt_threads)
        .def_readwrite("type_k", &ModelOptions::type_k)
        .def_readwrite("type_v", &ModelOptions::type_v)
        .def_readwrite("flash_attention", &ModelOptions::flash_attention)
        .def_readwrite("load_mode", &ModelOptions::load_mode)
        .def_readwrite("repack", &ModelOptions::repack)
        .def_readwrite("kernels", &ModelOptions::kernels)
        .def_readwrite("offload_min_batch", &ModelOptions::offload_min_batch)
        .def_readwrite("pin_weights", &ModelOptions::pin_weights)
        .def_readwrite("share_of_reading", &ModelOptions::share_of_reading)
        .def_readwrite("experts", &ModelOptions::experts)
        .def_readwrite("metadata", &ModelOptions::metadata)
        .def_readwrite("vocab_only", &ModelOptions::vocab_only)
        .def_readwrite("check_tensors", &ModelOptions::check_tensors)
        .def_readwrite("dry_run", &ModelOptions::dry_run);
}

}  // namespace overspill
