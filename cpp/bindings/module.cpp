// What Python sees of the core: declarations, and the conversions that they need.
// Everything that may take long runs without the GIL, after its arguments were converted.

#include "base/error.h"
#include "base/log.h"
#include "device/device_meter.h"
#include "device/devices.h"
#include "device/rpc.h"
#include "generate/batch.h"
#include "generate/evaluation.h"
#include "generate/generation.h"
#include "gguf/gguf_file.h"
#include "model/device_times.h"
#include "model/model.h"

#include <ggml-backend.h>
#include <ggml-rpc.h>
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <sstream>

namespace py = pybind11;
using namespace py::literals;
using namespace overspill;

namespace {

py::str lenient_str(const std::string & text) {
    return py::bytes(text).attr("decode")("utf-8", "replace");
}

// --- llama.cpp's log ---------------------------------------------------------------------

// With the GIL. Logging must not replace an exception that is on its way.
void drain_log_to_python() {
    if (!log_pending()) {
        return;
    }
    const py::error_scope keep;
    try {
        static constexpr std::array<int, 4> levels{10, 20, 30, 40};  // logging.DEBUG to logging.ERROR
        const py::object logger = py::module_::import("logging").attr("getLogger")("overspill.llama");
        for (const auto & line : drain_log()) {
            const int level = levels[static_cast<size_t>(line.level)];
            if (logger.attr("isEnabledFor")(level).cast<bool>()) {
                logger.attr("log")(level, "%s", valid_utf8(line.text));
            }
        }
    } catch (py::error_already_set & error) {
        if (error.matches(PyExc_KeyboardInterrupt)) {
            // Ctrl-C came while Python code ran here, where it cannot be raised; it comes again after this.
            PyErr_SetInterrupt();
        } else {
            error.discard_as_unraisable("overspill.llama");
        }
    }
}

// The process ends right after this, so it says why where it can be seen.
void report_abort(const char * message, const char * activity) {
    if (!Py_IsInitialized()) {
        return;
    }
    const py::gil_scoped_acquire gil;
    PySys_WriteStderr("overspill: llama.cpp gave up while %s and ends the process: %s\n", activity, message);
    drain_log_to_python();
}

// --- calls into the core -------------------------------------------------------------------

// Set once, when the module is made: asking Python later on, behind a lock of C++, could wait
// for a thread that waits for the GIL.
unsigned long main_thread = 0;

// Lets Ctrl-C, or another signal whose handler raises, end a native call: its exception is
// kept while the core unwinds. Signals are handled by the main thread only, so others do not ask.
class Signals {
  public:
    Signals() {
        if (PyThread_get_thread_ident() == main_thread) {
            poll_ = [this] {
                const py::gil_scoped_acquire gil;
                if (PyErr_CheckSignals() == 0) {
                    return false;
                }
                raised_ = std::make_exception_ptr(py::error_already_set());
                return true;
            };
        }
    }
    const Interrupt::Poll & poll() const { return poll_; }
    void rethrow() const {
        if (raised_) {
            std::rethrow_exception(raised_);
        }
    }

  private:
    Interrupt::Poll poll_;
    std::exception_ptr raised_;
};

// Runs native work without the GIL, and passes its log on whether it succeeds or not.
template <typename Work>
auto without_gil(Work && work) {
    struct Drain {
        ~Drain() { drain_log_to_python(); }
    } const drain;
    const py::gil_scoped_release release;
    return work();
}

// The same for work that asks whether to go on; a signal's exception takes the place of the cancellation.
template <typename Work>
auto interruptible(Work && work) {
    const Signals signals;
    try {
        return without_gil([&] { return work(signals.poll()); });
    } catch (const CancelledError &) {
        signals.rethrow();
        throw;
    }
}

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

// Python objects that the core holds and lets go of where it does not have the GIL.
std::shared_ptr<py::object> held(py::object object) {
    return {new py::object(std::move(object)), [](py::object * owned) {
                const py::gil_scoped_acquire gil;
                delete owned;
            }};
}

// An array on memory that `owner` keeps alive.
template <typename T, typename Owner>
py::array_t<T> view_of(T * data, std::vector<py::ssize_t> shape, const std::shared_ptr<Owner> & owner) {
    const py::capsule base(new std::shared_ptr<Owner>(owner),
                           [](void * kept) { delete static_cast<std::shared_ptr<Owner> *>(kept); });
    return py::array_t<T>(std::move(shape), data, base);
}

py::array_t<float> logits_view(const LogitsView & view, bool as_rows) {
    const py::ssize_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(&view.context->model()));
    const auto n_rows = static_cast<py::ssize_t>(view.n_rows);
    return view_of(view.logits, as_rows ? std::vector{n_rows, n_vocab} : std::vector{n_vocab}, view.context);
}

py::array_t<float> token_logits(const Token & token) {
    if (!token.context) {
        throw Error("the stream keeps no logits: ask for them with stream(..., logits=True)");
    }
    if (token.context->n_decodes() != token.n_decodes) {
        throw Error(
            "the stream has gone on, and the logits of this token are overwritten; read them before the next "
            "token, and keep a copy() if you need them longer");
    }
    return logits_view({token.context, token.logits, 1}, /*as_rows =*/false);
}

SamplingOptions sampling_options(const py::dict & values) {
    SamplingOptions options;
    take(values, "temperature", options.temperature);
    take(values, "dynamic_temperature_range", options.dynamic_temperature_range);
    take(values, "dynamic_temperature_exponent", options.dynamic_temperature_exponent);
    take(values, "top_k", options.top_k);
    take(values, "top_p", options.top_p);
    take(values, "min_p", options.min_p);
    take(values, "typical_p", options.typical_p);
    take(values, "top_n_sigma", options.top_n_sigma);
    take(values, "xtc_probability", options.xtc_probability);
    take(values, "xtc_threshold", options.xtc_threshold);
    take(values, "repeat_penalty", options.repeat_penalty);
    take(values, "frequency_penalty", options.frequency_penalty);
    take(values, "presence_penalty", options.presence_penalty);
    take(values, "repeat_last_n", options.repeat_last_n);
    take(values, "dry_multiplier", options.dry_multiplier);
    take(values, "dry_base", options.dry_base);
    take(values, "dry_allowed_length", options.dry_allowed_length);
    take(values, "dry_last_n", options.dry_last_n);
    take(values, "mirostat", options.mirostat);
    take(values, "mirostat_tau", options.mirostat_tau);
    take(values, "mirostat_eta", options.mirostat_eta);
    take(values, "logit_bias", options.logit_bias);
    take(values, "dry_breakers", options.dry_breakers);
    take(values, "seed", options.seed);
    return options;
}

// A row of float32 logits as it lies in memory.
struct Row {
    const float * logits;
    size_t n;
};

Row row_of(const py::object & given) {
    if (!py::isinstance<py::array>(given)) {
        throw py::type_error("logits must be a numpy array of float32, not " +
                             py::str(py::type::of(given).attr("__name__")).cast<std::string>());
    }
    const auto logits = py::reinterpret_borrow<py::array>(given);
    if (!py::isinstance<py::array_t<float>>(logits)) {
        throw py::type_error("logits must be of dtype float32, not " + py::str(logits.dtype()).cast<std::string>());
    }
    if (logits.ndim() != 1 || logits.size() == 0 || logits.strides(0) != sizeof(float)) {
        throw py::value_error("logits must be one contiguous row, of shape (n_vocab,), not of shape " +
                              py::str(logits.attr("shape")).cast<std::string>());
    }
    return {static_cast<const float *>(logits.data()), static_cast<size_t>(logits.size())};
}

struct Mask {
    TokenBits bits = nullptr;
    size_t n_words = 0;
};

Mask mask_of(const py::object & allowed) {
    if (allowed.is_none()) {
        return {};
    }
    const auto array = py::array::ensure(allowed);
    const bool fits = array && array.ndim() == 1 && array.itemsize() == sizeof(uint32_t) && array.size() > 0 &&
                      (array.dtype().kind() == 'u' || array.dtype().kind() == 'i') &&
                      array.strides(0) == sizeof(uint32_t);
    if (!fits || !array.is(allowed)) {
        throw py::type_error("allowed must be a contiguous array of uint32 or int32, with one bit per token");
    }
    return {static_cast<TokenBits>(array.data()), static_cast<size_t>(array.size())};
}

// The GIL is kept for these: they take microseconds, and nobody may write to the array meanwhile.
int32_t sample(Sampler & sampler, const py::object & logits, const py::object & allowed) {
    const Row row = row_of(logits);
    const Mask mask = mask_of(allowed);
    return sampler.sample(row.logits, row.n, mask.bits, mask.n_words);
}

py::tuple distribution(const Sampler & sampler, const py::object & logits, const py::object & allowed) {
    const Row row = row_of(logits);
    const Mask mask = mask_of(allowed);
    const auto survivors = sampler.distribution(row.logits, row.n, mask.bits, mask.n_words);
    py::array_t<int32_t> ids(static_cast<py::ssize_t>(survivors.size()));
    py::array_t<float> probabilities(static_cast<py::ssize_t>(survivors.size()));
    for (size_t i = 0; i < survivors.size(); ++i) {
        ids.mutable_at(i) = survivors[i].id;
        probabilities.mutable_at(i) = survivors[i].probability;
    }
    return py::make_tuple(ids, probabilities);
}

// A mask that Python code computes, such as llguidance's.
class PythonConstraint : public Constraint {
  public:
    explicit PythonConstraint(py::object mask) : mask_(held(std::move(mask))) {}

    int32_t sample(Sampler & sampler, const float * logits, size_t n, Logprobs * logprobs) override {
        const py::gil_scoped_acquire gil;
        const py::object bits = mask_->attr("allowed")();
        const Mask mask = mask_of(bits);
        return sampler.sample(logits, n, mask.bits, mask.n_words, logprobs);
    }
    bool allows(int32_t token) override {
        const py::gil_scoped_acquire gil;
        const py::object bits = mask_->attr("allowed")();
        const Mask mask = mask_of(bits);
        const auto at = static_cast<size_t>(token);
        return mask.bits == nullptr || (at / 32 < mask.n_words && ((mask.bits[at / 32] >> (at % 32)) & 1U) != 0);
    }
    void accept(int32_t token) override {
        const py::gil_scoped_acquire gil;
        mask_->attr("accept")(token);
    }
    bool is_native() const override { return false; }

  private:
    std::shared_ptr<py::object> mask_;
};

Chooser chooser_of(const py::object & callable) {
    if (callable.is_none()) {
        return {};
    }
    return [kept = held(callable)](const ChooserView & view) -> std::optional<int32_t> {
        const py::gil_scoped_acquire gil;
        auto tokens = view_of(view.tokens->data(), {static_cast<py::ssize_t>(view.tokens->size())}, view.tokens);
        // As its setflags(), which would be looked up and called for each token.
        py::detail::array_proxy(tokens.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
        const py::object answer = (*kept)(logits_view({view.context, view.logits, 1}, /*as_rows =*/false), tokens);
        if (answer.is_none()) {
            return std::nullopt;
        }
        if (PyIndex_Check(answer.ptr()) == 0 || PyBool_Check(answer.ptr()) != 0) {
            throw py::type_error("the sampler must return a token id or None, not " +
                                 py::repr(answer).cast<std::string>());
        }
        const auto id = py::reinterpret_steal<py::object>(PyNumber_Index(answer.ptr()));
        int overflow = 0;
        const long long value = id ? PyLong_AsLongLongAndOverflow(id.ptr(), &overflow) : -1;
        if (PyErr_Occurred() != nullptr) {
            throw py::error_already_set();
        }
        constexpr auto largest = std::numeric_limits<int32_t>::max();
        // What does not fit is not in the vocabulary either, which the core will say.
        return overflow != 0 || value < -1 || value > largest ? -1 : static_cast<int32_t>(value);
    };
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
        options.constraint = std::make_shared<PythonConstraint>(mask);
    }
    return without_gil([&] {
        if (grammar) {
            options.constraint =
                model->grammar(*grammar, {std::move(trigger_patterns), std::move(trigger_tokens), std::move(begun)});
        }
        return Generation::start(model, std::move(prompt), std::move(options));
    });
}

py::array_t<float> evaluate(Evaluation & evaluation, const std::vector<int32_t> & tokens, bool all) {
    return logits_view(interruptible([&](const auto & poll) { return evaluation.eval(tokens, all, poll); }), all);
}

Token next_token(Generation & generation) {
    std::optional<Token> token = interruptible([&](const auto & poll) { return generation.next(poll); });
    if (!token) {
        throw py::stop_iteration();
    }
    return std::move(*token);
}

py::tuple stats_tuple(const GenerationStats & stats) {
    const py::object reason =
        stats.stop_reason == StopReason::none ? py::none() : py::object(py::str(stop_reason_name(stats.stop_reason)));
    const Breakdown & parts = stats.breakdown;
    const auto breakdown = py::make_tuple(parts.wait_s, parts.decode_s, parts.sync_s, parts.logits_s, parts.sample_s,
                                          parts.python_s, parts.text_s, parts.caller_s, parts.n_graph_splits,
                                          parts.n_graphs_reused, parts.n_major_page_faults);
    return py::make_tuple(stats.n_prompt_tokens, stats.n_tokens, stats.prefill_s, stats.decode_s,
                          stats.time_to_first_token_s, reason, stats.n_cached_tokens, stats.n_dropped_tokens,
                          breakdown);
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
                options.constraint = model->grammar(*grammar, {});
            }
            requests.push_back({std::move(prompts[i]), std::move(options)});
        }
        auto batch = std::make_shared<BatchGeneration>(model, std::move(requests), parallel, n_ctx);
        model->add(batch);
        return batch;
    });
}

py::tuple next_outcome(BatchGeneration & batch) {
    std::optional<BatchOutcome> outcome = interruptible([&](const auto & poll) { return batch.next(poll); });
    if (!outcome) {
        throw py::stop_iteration();
    }
    return py::make_tuple(outcome->request, std::move(outcome->tokens), stats_tuple(outcome->stats));
}

py::dict render_chat(const ChatTemplate & chat, std::string messages, std::string tools, std::string tool_choice,
                     std::string json_schema, bool enable_thinking, bool add_generation_prompt,
                     std::map<std::string, std::string> variables) {
    ChatOptions options{std::move(messages)};
    options.tools = std::move(tools);
    options.tool_choice = std::move(tool_choice);
    options.json_schema = std::move(json_schema);
    options.enable_thinking = enable_thinking;
    options.add_generation_prompt = add_generation_prompt;
    options.variables = std::move(variables);
    const ChatPrompt prompt = without_gil([&] { return chat.render(options); });
    py::dict result;
    result["text"] = lenient_str(prompt.text);
    result["grammar"] = prompt.grammar.empty() ? py::object(py::none()) : py::object(lenient_str(prompt.grammar));
    result["trigger_patterns"] = prompt.start.trigger_patterns;
    result["trigger_tokens"] = prompt.start.trigger_tokens;
    result["begun"] = prompt.start.begun;
    result["named"] = prompt.named;
    result["stop"] = prompt.stop;
    result["parser"] = std::const_pointer_cast<ReplyParser>(prompt.parser);  // for pybind11, which knows no const
    return result;
}

py::tuple parse_reply(const ReplyParser & parser, const std::string & text, bool is_partial) {
    const Reply reply = without_gil([&] { return parser.parse(text, is_partial); });
    py::list calls;
    for (const ToolCall & call : reply.tool_calls) {
        calls.append(py::make_tuple(lenient_str(call.name), lenient_str(call.arguments), lenient_str(call.id)));
    }
    return py::make_tuple(lenient_str(reply.reasoning), lenient_str(reply.content), calls);
}

std::string repr_of(const Token & token) {
    std::ostringstream text;
    text << "Token(id=" << token.id << ", text=" << py::repr(py::str(token.text)).cast<std::string>();
    if (token.logprob) {
        text << ", logprob=" << *token.logprob;
    }
    text << ")";
    return text.str();
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

// --- files and devices -----------------------------------------------------------------------

py::dict gguf_dict(const std::string & path) {
    const GgufFile file = without_gil([&] { return read_gguf(path); });
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

PYBIND11_MODULE(_core, m) {
    m.doc() = "The native core of overspill. Use the package's own names instead.";

    const auto describe = [](const py::handle & type, const char * doc) {
        type.attr("__module__") = "overspill";
        type.attr("__doc__") = doc;
    };
    auto & error = py::register_exception<Error>(m, "Error");
    describe(error, "Something that the library or llama.cpp could not do; the base of the others.");
    describe(py::register_exception<ModelLoadError>(m, "ModelLoadError", error),
             "The file is missing, damaged, or not a model that can be loaded.");
    // Kept for the translator at the end of this function, and never let go of.
    static const py::handle out_of_memory = py::exception<OutOfMemoryError>(m, "OutOfMemoryError", error).release();
    describe(out_of_memory,
             "A device refused memory that a model or its context needs: ``device`` is its name, ``needed_bytes`` what "
             "was asked for.");
    describe(py::register_exception<ContextFullError>(m, "ContextFullError", error),
             "Prompt and reply do not fit into the context (``n_ctx``).");
    describe(py::register_exception<ClosedError>(m, "ClosedError", error), "The model was closed.");
    describe(py::register_exception<CancelledError>(m, "CancelledError", error),
             "The progress callback returned False.");

    main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
    capture_log(report_abort);
    llama_backend_init();

    m.attr("RPC_PROTOCOL_VERSION") = py::make_tuple(RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION);
    m.attr("LLAMA_CPP_COMMIT") = OVERSPILL_LLAMA_CPP_COMMIT;
    py::list gpu_backends;
    for (const char * backend : std::vector<const char *>{OVERSPILL_GPU_BACKENDS}) {
        gpu_backends.append(backend);
    }
    m.attr("GPU_BACKENDS") = gpu_backends;

    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            std::rethrow_exception(thrown);
        } catch (const ViewsInUseError & views) {
            py::set_error(PyExc_BufferError, views.what());
        } catch (const OutOfMemoryError & memory) {
            const py::object value = out_of_memory(memory.what());
            value.attr("device") = memory.device;
            value.attr("needed_bytes") = memory.needed_bytes;
            PyErr_SetObject(out_of_memory.ptr(), value.ptr());
        }
    });

    py::class_<Token>(m, "Token", py::is_final(), "One token of a reply; ``str()`` gives its text.")
        .def_readonly("id", &Token::id, "Its number in the vocabulary.")
        .def_readonly("text", &Token::text,
                      "The text that it completes, in whole characters; empty if a character or a possible stop "
                      "string is not complete yet, and for special tokens.")
        .def_readonly("logprob", &Token::logprob,
                      "Natural logarithm of its probability before temperature and truncation; None unless asked for.")
        .def_property_readonly(
            "top_logprobs", [](const Token & token) { return py::tuple(py::cast(token.top_logprobs)); },
            "The most likely tokens and the natural logarithms of their probabilities, best first; empty unless asked "
            "for.")
        .def_property_readonly(
            "logits", &token_logits,
            "The logits that it was chosen from, float32 of shape (n_vocab,): a view on llama.cpp's own memory, which "
            "the stream's next token overwrites. Error unless stream(logits=True) was said, or after the next token.")
        .def("__str__", [](const Token & token) { return token.text; })
        .def("__repr__", &repr_of)
        .def("__eq__",
             [](const Token & token, const py::object & other) -> py::object {
                 if (!py::isinstance<Token>(other)) {
                     return py::reinterpret_borrow<py::object>(Py_NotImplemented);
                 }
                 const auto & another = other.cast<const Token &>();
                 return py::bool_(token.id == another.id && token.text == another.text &&
                                  token.logprob == another.logprob);
             })
        .def("__hash__", [](const Token & token) { return py::hash(py::make_tuple(token.id, token.text)); });

    // Both may be destroyed by Python while another thread is in the middle of a step.
    py::class_<Model, std::shared_ptr<Model>>(m, "Model", py::is_final(), py::release_gil_before_calling_cpp_dtor())
        .def(py::init(&load_model), "path"_a, "options"_a, "progress"_a)
        .def("memory", &memory_dict)
        .def("open_stream", &open_stream, "prompt"_a, py::kw_only(), "sampler"_a, "max_tokens"_a, "stop"_a,
             "logprobs"_a, "grammar"_a, "mask"_a, "choose"_a, "logits"_a, "look_ahead"_a, "reuse"_a, "named"_a,
             "droppable"_a, "trigger_patterns"_a, "trigger_tokens"_a, "begun"_a)
        .def("open_batch", &open_batch, "prompts"_a, py::kw_only(), "samplers"_a, "max_tokens"_a, "stop"_a,
             "logprobs"_a, "grammar"_a, "parallel"_a, "n_ctx"_a)
        .def_property_readonly("has_chat_template", &Model::has_chat_template)
        .def(
            "chat_template",
            [](const Model & model, const std::string & source) {
                return without_gil([&] { return model.chat_template(source); });
            },
            "source"_a)
        .def(
            "dry_breakers",
            [](const Model & model, const std::vector<std::string> & texts) {
                return without_gil([&] { return model.dry_breakers(texts); });
            },
            "texts"_a)
        .def(
            "tokenize",
            [](const Model & model, const py::bytes & text, bool add_special, bool parse_special) {
                const std::string_view view = text;  // Python's own memory, which the argument keeps alive
                return without_gil([&] { return model.tokenize(view, add_special, parse_special); });
            },
            "text"_a, "add_special"_a, "parse_special"_a)
        .def(
            "detokenize",
            [](const Model & model, const std::vector<int32_t> & tokens, bool skip_special) {
                return py::bytes(without_gil([&] { return model.detokenize(tokens, skip_special); }));
            },
            "tokens"_a, "skip_special"_a)
        .def(
            "token_bytes",
            [](const Model & model, int32_t token, bool special) {
                return py::bytes(model.token_bytes(token, special));
            },
            "token"_a, "special"_a)
        .def("special_tokens", &Model::special_tokens)
        .def(
            "metadata", [](const Model & model, const std::string & key) { return lenient_str(model.metadata(key)); },
            "key"_a)
        .def("is_end_of_generation", &Model::is_end_of_generation, "token"_a)
        .def("time_devices", &device_times_dict, "tokens"_a, "n"_a)
        .def("close", [](Model & model) { without_gil([&] { model.close(); }); })
        .def_property_readonly("closed", &Model::closed)
        .def_property_readonly("n_vocab", &Model::n_vocab)
        .def_property_readonly("n_ctx", &Model::n_ctx)
        .def_property_readonly("n_ctx_train", &Model::n_ctx_train)
        .def_property_readonly("n_threads", &Model::n_threads);

    py::class_<ChatTemplate>(m, "ChatTemplate", py::is_final())
        .def("render", &render_chat, "messages"_a, py::kw_only(), "tools"_a, "tool_choice"_a, "json_schema"_a,
             "enable_thinking"_a, "add_generation_prompt"_a, "variables"_a)
        .def_property_readonly("source", [](const ChatTemplate & chat) { return lenient_str(chat.source()); });
    py::class_<ReplyParser, std::shared_ptr<ReplyParser>>(m, "ReplyParser", py::is_final())
        .def("parse", &parse_reply, "text"_a, "is_partial"_a);

    py::class_<Generation, std::shared_ptr<Generation>>(m, "Generation", py::is_final(),
                                                        py::release_gil_before_calling_cpp_dtor())
        .def("__iter__", [](const py::object & self) { return self; })
        .def("__next__", &next_token)
        .def(
            "close",
            [](Generation & generation, const std::string & reason) {
                const StopReason why = stop_reason_of(reason);
                without_gil([&] { generation.close(why); });
            },
            "reason"_a)
        .def("stats", [](const Generation & generation) { return stats_tuple(generation.stats()); });

    py::class_<BatchGeneration, std::shared_ptr<BatchGeneration>>(m, "BatchGeneration", py::is_final(),
                                                                  py::release_gil_before_calling_cpp_dtor())
        .def("__iter__", [](const py::object & self) { return self; })
        .def("__next__", &next_outcome)
        .def("close", [](BatchGeneration & batch) { without_gil([&] { batch.close(); }); });

    py::class_<Sampler, std::shared_ptr<Sampler>>(m, "Sampler", py::is_final())
        .def(py::init([](const py::dict & options) { return std::make_shared<Sampler>(sampling_options(options)); }),
             "options"_a)
        .def("sample", &sample, "logits"_a, "allowed"_a)
        .def("distribution", &distribution, "logits"_a, "allowed"_a)
        .def("accept", &Sampler::accept, "token"_a)
        .def("reset", &Sampler::reset)
        .def("clone", &Sampler::clone)
        .def("state",
             [](const Sampler & sampler) {
                 const SamplerState state = sampler.state();
                 return py::make_tuple(state.seed, state.n_draws, state.history, state.mirostat_mu);
             })
        .def(
            "restore",
            [](Sampler & sampler, uint32_t seed, uint64_t n_draws, std::vector<int32_t> history, float mirostat_mu) {
                // To draw so many random numbers again may take seconds.
                without_gil([&] { sampler.restore({seed, n_draws, std::move(history), mirostat_mu}); });
            },
            "seed"_a, "n_draws"_a, "history"_a, "mirostat_mu"_a);

    py::class_<Evaluation, std::shared_ptr<Evaluation>>(m, "Evaluation", py::is_final(),
                                                        py::release_gil_before_calling_cpp_dtor())
        .def(py::init<std::shared_ptr<Model>>(), "model"_a)
        .def("eval", &evaluate, "tokens"_a, "every"_a)
        .def("reset", [](Evaluation & evaluation) { without_gil([&] { evaluation.reset(); }); });

    py::class_<DeviceMeter, std::shared_ptr<DeviceMeter>>(m, "DeviceMeter", py::is_final(),
                                                          py::release_gil_before_calling_cpp_dtor())
        .def(py::init([](const std::string & device, int32_t n_threads, uint64_t working_set_bytes,
                         std::vector<std::string> gpus, bool host_buffers, double budget_s) {
                 MeterOptions options{n_threads, working_set_bytes, std::move(gpus), host_buffers, budget_s};
                 return without_gil([&] { return std::make_shared<DeviceMeter>(device, std::move(options)); });
             }),
             "device"_a, py::kw_only(), "n_threads"_a, "working_set_bytes"_a, "gpus"_a, "host_buffers"_a, "budget_s"_a)
        .def(
            "weight_rate",
            [](DeviceMeter & meter, const std::string & type, int64_t n_in, int64_t n_out, int64_t n_experts,
               int64_t n_used) {
                const WeightRate rate =
                    without_gil([&] { return meter.weight_rate(type, n_in, n_out, n_experts, n_used); });
                return py::make_tuple(rate.bytes_per_s, rate.buffer_type);
            },
            "type"_a, "n_in"_a, "n_out"_a, "n_experts"_a, "n_used"_a)
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
        .def("memory_bytes_per_s",
             [](DeviceMeter & meter) { return without_gil([&] { return meter.memory_bytes_per_s(); }); })
        .def(
            "link_bytes_per_s",
            [](DeviceMeter & meter, uint64_t n_bytes) {
                return without_gil([&] { return meter.link_bytes_per_s(n_bytes); });
            },
            "n_bytes"_a);

    m.def("default_sampling", [] {
        const SamplingOptions o;
        return py::dict("temperature"_a = o.temperature, "dynamic_temperature_range"_a = o.dynamic_temperature_range,
                        "dynamic_temperature_exponent"_a = o.dynamic_temperature_exponent, "top_k"_a = o.top_k,
                        "top_p"_a = o.top_p, "min_p"_a = o.min_p, "typical_p"_a = o.typical_p,
                        "top_n_sigma"_a = o.top_n_sigma, "xtc_probability"_a = o.xtc_probability,
                        "xtc_threshold"_a = o.xtc_threshold, "repeat_penalty"_a = o.repeat_penalty,
                        "frequency_penalty"_a = o.frequency_penalty, "presence_penalty"_a = o.presence_penalty,
                        "repeat_last_n"_a = o.repeat_last_n, "dry_multiplier"_a = o.dry_multiplier,
                        "dry_base"_a = o.dry_base, "dry_allowed_length"_a = o.dry_allowed_length,
                        "dry_last_n"_a = o.dry_last_n, "mirostat"_a = o.mirostat, "mirostat_tau"_a = o.mirostat_tau,
                        "mirostat_eta"_a = o.mirostat_eta);
    });
    m.def("check_sampling", [](const py::dict & options) { check(sampling_options(options)); }, "options"_a);
    m.def("simd", [] { return kernels().name; });
    m.def(
        "grammar_of_json_schema",
        [](const std::string & schema) { return without_gil([&] { return grammar_of_json_schema(schema); }); },
        "schema"_a);
    m.def("read_gguf", &gguf_dict, "path"_a);
    m.def(
        "file_type_name", [](int32_t type) { return llama_ftype_name(static_cast<llama_ftype>(type)); }, "file_type"_a);
    m.def("devices", &device_list);
    m.def("cpu_features", &cpu_features);
    m.def(
        "add_rpc_server", [](const std::string & endpoint) { without_gil([&] { add_rpc_server(endpoint); }); },
        "endpoint"_a);
    m.def("load_backends", [](const std::string & folder) { without_gil([&] { load_backends(folder); }); }, "folder"_a);
}
