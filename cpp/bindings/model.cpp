#include "model/model.h"

#include "base/process.h"
#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "generate/generation.h"
#include "model/device_times.h"
#include "model/vocabulary.h"
#include "sample/dry_breakers.h"
#include "text/chat_template.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

std::shared_ptr<Model> load_model(const std::string & path, ModelOptions options, const py::object & progress) {
    std::exception_ptr raised;
    options.progress = [&](float share) {
        if (told_to_stop()) {
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
        return without_gil([&] { return left_alone_by_forks(std::make_unique<Model>(path, std::move(options))); });
    } catch (const CancelledError &) {
        if (raised) {
            std::rethrow_exception(raised);
        }
        throw;
    }
}

std::shared_ptr<Generation> open_stream(const std::shared_ptr<Model> & model, std::vector<int32_t> prompt,
                                        GenerationOptions options) {
    return without_gil([&] { return Generation::start(model, std::move(prompt), std::move(options)); });
}

py::bytes token_bytes(const Model & model, int32_t token, bool special) {
    const auto vocab = model.tokenizer();
    model.check_token("token", token);
    return with_gil([&] {
        std::string bytes;
        append_token_bytes(*vocab, token, special, bytes);
        return bytes;
    });
}

std::vector<std::tuple<py::str, bool, bool>> control_tokens_of(const Model & model) {
    std::vector<std::tuple<py::str, bool, bool>> tokens;
    for (const ControlToken & token : without_gil([&] { return control_tokens(*model.tokenizer()); })) {
        tokens.emplace_back(lenient_str(token.text), token.strips_left, token.strips_right);
    }
    return tokens;
}

bool is_end_of_generation(const Model & model, int32_t token) {
    const auto loaded = model.loaded();
    model.check_token("token", token);
    return with_gil([&] { return llama_vocab_is_eog(llama_model_get_vocab(loaded.get()), token); });
}

}  // namespace

void bind_model(py::module_ & m) {
    // May be destroyed by Python while another thread is in the middle of a step.
    py::class_<Model, std::shared_ptr<Model>>(m, "Model", py::is_final(), py::release_gil_before_calling_cpp_dtor())
        .def(py::init(&load_model), "path"_a, "options"_a, "progress"_a)
        .def("memory", &Model::memory, py::return_value_policy::copy)
        .def("pinned", &Model::pinned)
        .def("expert_counts",
             [](const Model & model) -> std::optional<ExpertCounts> {
                 const auto cache = model.expert_cache();
                 return cache ? std::optional(cache->counts()) : std::nullopt;
             })
        .def("expert_profile", &Model::expert_profile)
        .def(
            "shuffle_experts",
            [](Model & model, uint64_t seed) {
                if (const auto cache = model.expert_cache()) {
                    without_gil([&] {
                        const std::lock_guard turn(model.turns());
                        cache->shuffle(seed);
                    });
                }
            },
            "seed"_a)
        .def("check_tokens", &Model::check_tokens, "argument"_a, "tokens"_a)
        .def("open_stream", &open_stream, "prompt"_a, "options"_a)
        .def(
            "save_state",
            [](Model & model, const std::vector<int32_t> & tokens) {
                return std::const_pointer_cast<SequenceState>(
                    without_gil([&] { return Engine::of(model)->save(tokens); }));
            },
            "tokens"_a)
        .def(
            "restore_state",
            [](Model & model, const std::shared_ptr<SequenceState> & saved) {
                without_gil([&] { Engine::of(model)->restore(*saved); });
            },
            "saved"_a)
        .def("prompt_cache_bytes", [](Model & model) { return Engine::of(model)->prompt_cache_bytes(); })
        .def_property_readonly("has_chat_template", &ChatTemplate::exists)
        .def(
            "chat_template_source",
            [](const Model & model, bool with_tools) {
                return lenient_str(ChatTemplate::source_of(model, with_tools));
            },
            "with_tools"_a)
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
                return interruptible([&](const Interrupt::Poll & poll) {
                    return tokenize(*model.tokenizer(), view, add_special, parse_special, poll);
                });
            },
            "text"_a, "add_special"_a, "parse_special"_a)
        .def(
            "detokenize",
            [](const Model & model, const std::vector<int32_t> & tokens, bool skip_special) {
                return py::bytes(without_gil([&] { return detokenize(*model.tokenizer(), tokens, skip_special); }));
            },
            "tokens"_a, "skip_special"_a)
        .def("token_bytes", &token_bytes, "token"_a, "special"_a)
        .def("control_tokens", &control_tokens_of)
        .def("special_tokens",
             [](const Model & model) {
                 const auto loaded = model.loaded();
                 return with_gil([&] { return special_tokens(*llama_model_get_vocab(loaded.get())); });
             })
        .def(
            "metadata", [](const Model & model, const std::string & key) { return lenient_str(model.metadata(key)); },
            "key"_a)
        .def("is_end_of_generation", &is_end_of_generation, "token"_a)
        .def(
            "time_devices",
            [](Model & model, const std::vector<int32_t> & tokens, uint32_t n) {
                return interruptible(
                    [&](const Interrupt::Poll & poll) { return time_devices(model, tokens, n, poll); });
            },
            "tokens"_a, "n"_a)
        .def("close", [](Model & model) { without_gil([&] { model.close(); }); })
        .def_property_readonly("closed", &Model::closed)
        .def_property_readonly("n_vocab", &Model::n_vocab)
        .def_property_readonly("n_ctx", &Model::n_ctx)
        .def_property_readonly("n_threads", &Model::n_threads);
}

}  // namespace overspill
