// llama.cpp's fit, and its dry run, on hardware that is not there: one JSON request per line on standard
// input, one answer per line on standard output; upstream_tools.py says what is in them. A process of its
// own, because devices cannot be taken away again and a failed assertion ends it.
#include "fit.h"

#include "stand_in_gpu.h"

#include "llama-ext.h"

#include <ggml-backend.h>
#include <llama.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

using Json = nlohmann::json;

namespace {

// What llama.cpp only says in its log: the device of each layer, and the pieces of the graph.
struct Log {
    std::vector<std::string> layers;  // the output head is the last
    int n_splits = -1;
    std::string last_error;

    void read(ggml_log_level level, const std::string & text) {
        int layer = 0;
        char device[64] = "";
        if (std::sscanf(text.c_str(), "load_tensors: layer %d assigned to device %63[^,]", &layer, device) == 2) {
            layers.emplace_back(device);
        }
        const size_t splits = text.find("splits = ");
        if (splits != std::string::npos) {  // "splits = 5", or "splits = 75 / 51" if decoding has its own number
            int prompt = 0;
            int decode = 0;
            const int n = std::sscanf(text.c_str() + splits, "splits = %d / %d", &prompt, &decode);
            n_splits = n == 2 ? decode : prompt;
        }
        if (level == GGML_LOG_LEVEL_ERROR) {
            last_error = text;
        }
    }
};

std::vector<ggml_backend_dev_t> stand_ins(const Json & devices) {
    std::vector<ggml_backend_dev_t> result;
    for (const auto & device : devices) {
        const std::string name = device.at("name");
        const StandInOptions options = {device.at("memory_bytes"), 0, 0, 0, 1, 32, 0, 0, 0};
        stand_in_gpu(name.c_str(), &options);
        result.push_back(ggml_backend_dev_by_name(name.c_str()));
    }
    result.push_back(nullptr);
    return result;
}

ggml_type type_of(const std::string & name) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        const char * candidate = ggml_type_name(static_cast<ggml_type>(type));
        if (candidate != nullptr && name == candidate) {
            return static_cast<ggml_type>(type);
        }
    }
    throw std::invalid_argument("no type is called " + name);
}

llama_context_params context_params(const Json & settings) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = settings.at("n_ctx");
    params.n_batch = settings.at("n_batch");
    params.n_ubatch = settings.at("n_ubatch");
    params.n_outputs_max = settings.at("n_outputs_max");
    params.type_k = type_of(settings.at("type_k"));
    params.type_v = type_of(settings.at("type_v"));
    params.op_offload = settings.at("op_offload");
    params.swa_full = false;
    const std::string flash = settings.at("flash_attention");
    params.flash_attn_type = flash == "on"    ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                             : flash == "off" ? LLAMA_FLASH_ATTN_TYPE_DISABLED
                                              : LLAMA_FLASH_ATTN_TYPE_AUTO;
    return params;
}

std::string device_name(ggml_backend_buffer_type_t type) {
    const ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    return device == nullptr || ggml_backend_buft_is_host(type) ? "CPU" : ggml_backend_dev_name(device);
}

struct Placement {
    int n_gpu_layers = -1;
    std::vector<float> tensor_split;
    std::vector<llama_model_tensor_buft_override> overrides;
    std::vector<std::string> patterns;  // that the overrides point to

    Placement() : tensor_split(llama_max_devices()), overrides(llama_max_tensor_buft_overrides()) {}

    void read(const Json & placement) {
        n_gpu_layers = placement.at("n_gpu_layers");
        const std::vector<float> split = placement.at("tensor_split");
        std::copy(split.begin(), split.end(), tensor_split.begin());
        for (const auto & [pattern, device] :
             placement.at("overrides").get<std::vector<std::pair<std::string, std::string>>>()) {
            const ggml_backend_dev_t found = ggml_backend_dev_by_name(device.c_str());
            if (found == nullptr) {
                throw std::invalid_argument("no device is called " + device);
            }
            patterns.push_back(pattern);
            overrides.at(patterns.size() - 1).buft = ggml_backend_dev_buffer_type(found);
        }
        for (size_t i = 0; i < patterns.size(); ++i) {
            overrides[i].pattern = patterns[i].c_str();
        }
    }

    // With the numbers of layers that came of it: the fit says nothing where llama.cpp's defaults suit it.
    [[nodiscard]] Json write(const Json & devices, const std::vector<std::string> & layers) const {
        Json result = {{"devices", Json::array()}, {"tensor_split", Json::array()}, {"overrides", Json::array()}};
        result["n_gpu_layers"] =
            static_cast<std::ptrdiff_t>(layers.size()) - std::count(layers.begin(), layers.end(), "CPU");
        for (const auto & device : devices) {
            const std::string name = device.at("name");
            result["devices"].push_back(name);
            result["tensor_split"].push_back(std::count(layers.begin(), layers.end(), name));
        }
        for (size_t i = 0; overrides[i].pattern != nullptr; ++i) {
            result["overrides"].push_back({overrides[i].pattern, device_name(overrides[i].buft)});
        }
        return result;
    }
};

Json dry_run(const std::string & path, llama_model_params model_params, const llama_context_params & params,
             Log & log) {
    model_params.no_alloc = true;
    model_params.load_mode = LLAMA_LOAD_MODE_NONE;
    log = {};
    const std::unique_ptr<llama_model, decltype(&llama_model_free)> model(
        llama_model_load_from_file(path.c_str(), model_params), llama_model_free);
    if (model == nullptr) {
        throw std::runtime_error("the model does not load: " + log.last_error);
    }
    const std::unique_ptr<llama_context, decltype(&llama_free)> context(llama_init_from_model(model.get(), params),
                                                                        llama_free);
    if (context == nullptr) {
        throw std::runtime_error("there is no context: " + log.last_error);
    }
    Json memory = Json::object();
    for (const auto & [type, data] : llama_get_memory_breakdown(context.get())) {
        Json & device = memory.emplace(device_name(type), Json::object()).first.value();
        device["weights_bytes"] = device.value("weights_bytes", size_t{0}) + data.model;
        device["kv_bytes"] = device.value("kv_bytes", size_t{0}) + data.context;
        device["compute_bytes"] = device.value("compute_bytes", size_t{0}) + data.compute;
    }
    return {
        {"memory", memory}, {"layers", log.layers}, {"n_splits", log.n_splits}, {"n_ctx", llama_n_ctx(context.get())}};
}

Json answer(const Json & request) {
    const std::string path = request.at("model");
    const Json & devices = request.at("devices");
    std::vector<ggml_backend_dev_t> list = stand_ins(devices);
    llama_context_params params = context_params(request.at("settings"));
    llama_model_params model_params = llama_model_default_params();
    model_params.devices = list.data();
    Placement placement;
    Log log;
    llama_log_set(
        [](ggml_log_level level, const char * text, void * data) { static_cast<Log *>(data)->read(level, text); },
        &log);

    Json result;
    if (request.contains("fit")) {
        std::vector<size_t> margins(llama_max_devices(), request["fit"].at("margin_bytes").get<size_t>());
        const auto start = std::chrono::steady_clock::now();
        const common_params_fit_status status = common_fit_params(
            path.c_str(), &model_params, &params, placement.tensor_split.data(), placement.overrides.data(),
            margins.data(), request["fit"].at("n_ctx_min"), nullptr, GGML_LOG_LEVEL_ERROR);
        result["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (status == COMMON_PARAMS_FIT_STATUS_ERROR) {
            throw std::runtime_error("the fit failed: " + log.last_error);
        }
        result["success"] = status == COMMON_PARAMS_FIT_STATUS_SUCCESS;
        placement.n_gpu_layers = model_params.n_gpu_layers;
    } else {
        placement.read(request.at("placement"));
        model_params.n_gpu_layers = placement.n_gpu_layers;
    }
    model_params.tensor_split = placement.tensor_split.data();
    model_params.tensor_buft_overrides = placement.overrides.data();
    result.update(dry_run(path, model_params, params, log));
    if (request.contains("fit")) {
        result["placement"] = placement.write(devices, log.layers);
    }
    return result;
}

}  // namespace

int main() {
    llama_backend_init();
    for (std::string line; std::getline(std::cin, line);) {
        Json result;
        try {
            result = answer(Json::parse(line));
        } catch (const std::exception & error) {
            result = {{"error", error.what()}};
        }
        std::cout << result.dump() << std::endl;
    }
}
