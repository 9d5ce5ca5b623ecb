#include "model/model.h"

#include "bindings/bindings.h"
#include "bindings/chooser.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "generate/batch.h"
#include "generate/generation.h"
#include "model/device_times.h"
#include "model/vocabulary.h"
#include "sample/dry_breakers.h"
#include "sample/grammar.h"
#include "text/chat_template.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

// Sets an option from the dict where it has one; types were made sure of in Python.
template <typename T>
void take(const py::dict & values, const char * name, T & to) {
    if (values.contains(name)) {
        to = values[name].cast<T>();
    }
}

ModelOptions model_options(const py::dict & values) {
    ModelOptions options;
    take(values, "devices", options.placement.devices);
    take(values, "tensor_split", options.placement.tensor_split);
    take(values, "n_gpu_layers", options.placement.n_gpu_layers);
    take(values, "overrides", options.placement.overrides);
    take(values, "n_ctx", options.n_ctx);
    take(values, "n_batch", options.n_batch);
    take(values, "n_ubatch", options.n_ubatch);
    take(values, "n_threads", options.n_threads);
    take(values, "type_k", options.type_k);
    take(values, "type_v", options.type_v);
    take(values, "flash_attention", options.flash_attention);
    take(values, "load_mode", options.load_mode);
    take(values, "repack", options.repack);
    take(values, "vocab_only", options.vocab_only);
    take(values, "check_tensors", options.check_tensors);
    take(values, "dry_run", options.dry_run);
    return options;
}

std::shared_ptr<Model> load_model(const std::string & path, const py::dict & values, const py::object & progress) {
    const Signals signals;
    std::exception_ptr raised;
    ModelOptions options = model_options(values);
    options.progress = [&](float share) {
        if (signals.poll() && signals.poll()()) {
            return false;
        }
        if (progress.is_none()) {
            return true;
        }
        const py::gil_scoped_acquire gil;
        try {
            drain_log_to_python();
            return !progress(share).is(py::bool_(false));
        } catch (py::error_already_set &) {
            raised = std::current_exception();
            return false;
        }
    };
    try {
        return without_gil([&] { return std::make_shared<Model>(path, std::move(options)); });
    } catch (const CancelledError &) {
        signals.rethrow();
        if (raised) {
            std::rethrow_exception(raised);
        }
        throw;
    }
}

std::shared_ptr<Generation> open_stream(
    const std::shared_ptr<Model> & model, std::vector<int32_t> prompt, const std::shared_ptr<Sampler> & sampler,
    int64_t max_tokens, std::vector<std::string> stop, int32_t logprobs, const std::optional<std::string> & grammar,
    const py::object & mask, const py::object & choose, bool logits, bool look_ahead, bool reuse,
    std::vector<int32_t> named, std::vector<std::pair<uint32_t, uint32_t>> droppable,
    std::vector<std::string> trigger_patterns, std::vector<int32_t> trigger_tokens, std::vector<int32_t> begun) {
    GenerationOptions options;
    options.reuse = reuse;
    options.named = std::move(named);
    options.droppable = std::move(droppable);
    options.sampler = sampler;
    options.max_tokens = max_tokens;
    options.stop = std::move(stop);
    options.n_logprobs = logprobs;
    options.choose = chooser_of(choose);
    options.keep_logits = logits;
    options.look_ahead = look_ahead;
    if (!mask.is_none()) {
        options.constraint = python_constraint(mask);
    }
    return without_gil([&] {
        if (grammar) {
            const Grammar::Start start{std::move(trigger_patterns), std::move(trigger_tokens), std::move(begun)};
            options.constraint = std::make_shared<Grammar>(model->loaded(), *grammar, start);
        }
        return Generation::start(model, std::move(prompt), std::move(options));
    });
}

std::shared_ptr<BatchGeneration> open_batch(const std::shared_ptr<Model> & model,
                                            std::vector<std::vector<int32_t>> prompts,
                                            const std::vector<std::shared_ptr<Sampler>> & samplers, int64_t max_tokens,
                                            const std::vector<std::string> & stop, int32_t logprobs,
                                            const std::optional<std::string> & grammar, uint32_t parallel,
                                            uint32_t n_ctx) {
    return without_gil([&] {
        std::vector<BatchRequest> requests;
        for (size_t i = 0; i < prompts.size(); ++i) {
            GenerationOptions options;
            options.sampler = samplers.at(i);
            options.max_tokens = max_tokens;
            options.stop = stop;
            options.n_logprobs = logprobs;
            if (grammar) {
                options.constraint = std::make_shared<Grammar>(model->loaded(), *grammar, Grammar::Start{});
            }
            requests.push_back({std::move(prompts[i]), std::move(options)});
        }
        return BatchGeneration::start(model, std::move(requests), parallel, n_ctx);
    });
}

py::bytes token_bytes(const Model & model, int32_t token, bool special) {
    const auto vocab = model.tokenizer();
    model.check_token("token", token);
    std::string bytes;
    append_token_bytes(*vocab, token, special, bytes);
    return bytes;
}

bool is_end_of_generation(const Model & model, int32_t token) {
    const auto loaded = model.loaded();
    model.check_token("token", token);
    return llama_vocab_is_eog(llama_model_get_vocab(loaded.get()), token);
}

py::dict memory_dict(const Model & model) {
    const MemoryReport & report = model.memory();
    py::dict devices;
    for (const auto & [name, memory] : report.devices) {
        devices[py::str(name)] = py::dict("weights_bytes"_a = memory.weights_bytes, "kv_bytes"_a = memory.kv_bytes,
                                          "compute_bytes"_a = memory.compute_bytes);
    }
    py::list tensors;
    for (const auto & tensor : report.tensors) {
        tensors.append(py::make_tuple(lenient_str(tensor.name), tensor.device, tensor.buffer_type, tensor.n_bytes));
    }
    py::list kv;
    for (const auto & layer : report.kv) {
        kv.append(py::make_tuple(layer.layer, layer.device, layer.n_bytes));
    }
    return py::dict("devices"_a = devices, "tensors"_a = tensors, "kv"_a = kv, "n_splits"_a = report.n_splits);
}

py::dict device_times_dict(Model & model, const std::vector<int32_t> & tokens, uint32_t n) {
    const DeviceTimes times =
        interruptible([&](const Interrupt::Poll & poll) { return time_devices(model, tokens, n, poll); });
    py::dict devices;
    for (const auto & [name, time] : times.devices) {
        devices[py::str(name)] = py::make_tuple(time.seconds, time.n_pieces);
    }
    return py::dict("devices"_a = devices, "moving_s"_a = times.moving_s, "total_s"_a = times.total_s);
}

}  // namespace

void bind_model(py::module_ & m) {
    // May be destroyed by Python while another thread is in the middle of a step.
    py::class_<Model, std::shared_ptr<Model>>(m, "Model", py::is_final(), py::release_gil_before_calling_cpp_dtor())
        .def(py::init(&load_model), "path"_a, "options"_a, "progress"_a)
        .def("memory", &memory_dict)
        .def("open_stream", &open_stream, "prompt"_a, py::kw_only(), "sampler"_a, "max_tokens"_a, "stop"_a,
             "logprobs"_a, "grammar"_a, "mask"_a, "choose"_a, "logits"_a, "look_ahead"_a, "reuse"_a, "named"_a,
             "droppable"_a, "trigger_patterns"_a, "trigger_tokens"_a, "begun"_a)
        .def("open_batch", &open_batch, "prompts"_a, py::kw_only(), "samplers"_a, "max_tokens"_a, "stop"_a,
             "logprobs"_a, "grammar"_a, "parallel"_a, "n_ctx"_a)
        .def_property_readonly("has_chat_template", &ChatTemplate::exists)
        .def(
            "chat_template",
            [](const Model & model, const std::string & source) {
                return without_gil([&] { return std::make_unique<ChatTemplate>(model, source); });
            },
            "source"_a)
        .def(
            "dry_breakers",
            [](const Model & model, const std::vector<std::string> & texts) {
                return without_gil([&] { return dry_breakers(*model.tokenizer(), texts); });
            },
            "texts"_a)
        .def(
            "tokenize",
            [](const Model & model, const py::bytes & text, bool add_special, bool parse_special) {
                const std::string_view view = text;  // Python's own memory, which the argument keeps alive
                return without_gil([&] { return tokenize(*model.tokenizer(), view, add_special, parse_special); });
            },
            "text"_a, "add_special"_a, "parse_special"_a)
        .def(
            "detokenize",
            [](const Model & model, const std::vector<int32_t> & tokens, bool skip_special) {
                return py::bytes(without_gil([&] { return detokenize(*model.tokenizer(), tokens, skip_special); }));
            },
            "tokens"_a, "skip_special"_a)
        .def("token_bytes", &token_bytes, "token"_a, "special"_a)
        .def("special_tokens",
             [](const Model & model) { return special_tokens(*llama_model_get_vocab(model.loaded().get())); })
        .def(
            "metadata", [](const Model & model, const std::string & key) { return lenient_str(model.metadata(key)); },
            "key"_a)
        .def("is_end_of_generation", &is_end_of_generation, "token"_a)
        .def("time_devices", &device_times_dict, "tokens"_a, "n"_a)
        .def("close", [](Model & model) { without_gil([&] { model.close(); }); })
        .def_property_readonly("closed", &Model::closed)
        .def_property_readonly("n_vocab", &Model::n_vocab)
        .def_property_readonly("n_ctx", &Model::n_ctx)
        .def_property_readonly("n_threads", &Model::n_threads);
}

}  // namespace overspill
