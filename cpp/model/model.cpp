#include "model/model.h"

#include "base/activity.h"
#include "base/error.h"
#include "base/error_capture.h"
#include "device/devices.h"
#include "device/mapped_pages.h"
#include "device/out_of_memory.h"
#include "device/weights.h"
#include "gguf/gguf_check.h"
#include "model/vocabulary.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace overspill {

namespace {

// From the first load on, the C library gives large pieces of memory back as soon as they are freed. A process that
// sets glibc's thresholds by its environment keeps them.
void return_freed_memory() {
#ifdef __GLIBC__
    const auto is_set = [](const char * variable, const char * part) {
        const char * value = std::getenv(variable);
        return value != nullptr && std::strstr(value, part) != nullptr;
    };
    if (is_set("MALLOC_MMAP_THRESHOLD_", "") || is_set("MALLOC_TRIM_THRESHOLD_", "") ||
        is_set("GLIBC_TUNABLES", "glibc.malloc.")) {
        return;
    }
    // Otherwise glibc raises them to 32 and 64 MiB by itself, and each of its arenas keeps so much: after 60 loads of a
    // model of 13 MB by 12 threads, a process had 230 MB, and has 115 MB with these.
    constexpr int large_bytes = 4 << 20;
    static const bool once =
        mallopt(M_MMAP_THRESHOLD, large_bytes) != 0 && mallopt(M_TRIM_THRESHOLD, 2 * large_bytes) != 0;
    static_cast<void>(once);
#endif
}

// Where the file has other factors of rotation for long contexts, the length from which llama.cpp takes these.
uint32_t long_from(const GgufHeader & header) {
    if (gguf_find_tensor(&header.context(), "rope_factors_long.weight") < 0) {
        return 0;
    }
    const int64_t key = gguf_find_key(&header.context(), "general.architecture");
    const std::string prefix = std::get<std::string>(header.value(key)) + ".";
    const uint64_t trained = header.count(prefix + "context_length", 0);
    return static_cast<uint32_t>(header.count(prefix + "rope.scaling.original_context_length", trained));
}

}  // namespace

Model::Model(const std::string & path, ModelOptions options)
    : name_(path), options_(std::move(options)), pinned_(std::make_shared<PinnedWeights>()) {
    check(options_);
    return_freed_memory();
    PlacementParams placement = [&] {
        GgufHeader header(path);  // not for longer: vocabularies are large
        check_loadable(header, options_.vocab_only);
        if (!options_.metadata.empty()) {
            header.replace(options_.metadata);
            check_figures(header);
        }
        long_from_ = long_from(header);
        return PlacementParams(header, options_.placement);
    }();

    struct Progress {
        const std::function<bool(float)> report;
        const float share_of_loading;
        bool cancelled;

        bool tell(float share) {
            cancelled = cancelled || (report && !report(share));
            return !cancelled;
        }
        void check(const std::string & path) const {
            if (cancelled) {
                throw CancelledError(path + ": loading was cancelled");
            }
        }
    } progress{std::exchange(options_.progress, {}), 1 - options_.share_of_reading, false};

    llama_model_params params = llama_model_default_params();
    placement.apply(params);
    params.load_mode = options_.dry_run ? LLAMA_LOAD_MODE_NONE : llama_load_mode_of(options_.load_mode);
    params.no_alloc = options_.dry_run;
    params.use_extra_bufts =
        options_.repack == Switch::on ||
        (options_.repack == Switch::automatic && wants_extra_buffers(product_set_of(options_.kernels) != nullptr));
    params.no_host = options_.repack == Switch::on;
    params.vocab_only = options_.vocab_only;
    params.check_tensors = options_.check_tensors;
    const std::vector<llama_model_kv_override> overrides = llama_overrides_of(options_.metadata);
    params.kv_overrides = overrides.data();
    params.progress_callback_user_data = &progress;
    params.progress_callback = [](float share, void * data) {
        auto & self = *static_cast<Progress *>(data);
        return self.tell(self.share_of_loading * share);
    };
    const Activity activity("loading a model");
    const ErrorCapture errors;
    servers_ = std::make_shared<const RpcServers>(params.devices);
    // Servers outlive the model, whose destructor talks to them; memory that is freed must not be registered.
    model_.reset(llama_model_load_from_file(path.c_str(), params),
                 [servers = servers_, pinned = pinned_](llama_model * model) {
                     const NoAssertionGuard destructors;
                     pinned->undo();
                     llama_model_free(model);
                 });
    if (!progress.cancelled) {
        servers_->check("loading " + path);
    }
    if (!model_) {
        progress.check(path);
        throw_if_out_of_memory(errors, path + ": ");
        throw ModelLoadError(path + ": " + errors.reason("llama.cpp could not load it"));
    }
    n_vocab_ = llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
    prepare_to_generate();
    if (options_.share_of_reading > 0) {
        if (idle_) {
            read_mapped(idle_->mapped_weights(), [&](float share) {
                return progress.tell(progress.share_of_loading + options_.share_of_reading * share);
            });
        }
        progress.tell(1);
        progress.check(path);
    }
    if (options_.pin_weights && idle_) {
        pin_weights();
    }
}

void Model::pin_weights() {
    std::vector<ggml_backend_dev_t> devices;
    for (const std::string & name : options_.placement.devices) {
        devices.push_back(device_named(name));
    }
    for (const ExpertPool & pool : options_.experts.pools) {
        devices.push_back(device_named(pool.device));
    }
    pinned_->start(devices, idle_->mapped_weights());
}

void Model::prepare_to_generate() {
    if (options_.vocab_only) {
        cannot_generate_ = "was loaded with vocab_only, without its weights";
    } else if (llama_model_has_encoder(model_.get())) {
        cannot_generate_ = "is an encoder-decoder model; only decoder models can stream";
    } else {
        if (options_.n_ctx == 0) {
            constexpr uint32_t largest_default = 8192;
            const auto n_ctx_train = static_cast<uint32_t>(std::max(0, llama_model_n_ctx_train(model_.get())));
            options_.n_ctx = n_ctx_train == 0 ? largest_default : std::min(n_ctx_train, largest_default);
        }
        threads_ = std::make_shared<ThreadPool>(options_.n_threads, "the model " + name_, options_.adapt_threads);
        if (!options_.experts.pools.empty() && !options_.dry_run) {
            experts_ = std::make_shared<ExpertCache>(options_.experts, product_set_of(options_.kernels), model_);
        }
        ContextOptions options = stream_options(servers_);
        options.experts = experts_;
        idle_ = left_alone_by_forks(std::make_unique<Context>(model_, threads_, options));
        if (!idle_->can_continue_text()) {
            cannot_generate_ = "does not continue text: it is an encoder (for embeddings) or a diffusion model";
        } else {
            memory_ = idle_->memory();
            cannot_generate_ = options_.dry_run ? "was not loaded: this is a dry run" : "";
        }
        if (!cannot_generate_.empty()) {
            idle_.reset();
            experts_.reset();
            threads_.reset();
        }
    }
    if (!cannot_generate_.empty()) {
        options_.n_ctx = 0;
    }
}

ContextOptions Model::context_options(uint32_t n_outputs, std::shared_ptr<const RpcServers> servers) const {
    return {options_.n_ctx,
            std::max(options_.n_batch, n_outputs),
            options_.n_ubatch,
            options_.n_threads,
            ggml_type_of(options_.type_k),
            ggml_type_of(options_.type_v),
            llama_flash_attention_of(options_.flash_attention),
            n_outputs,
            /*n_sequences =*/1,
            options_.dry_run,
            std::move(servers),
            options_.offload_min_batch,
            product_set_of(options_.kernels),
            std::all_of(options_.placement.devices.begin(), options_.placement.devices.end(),
                        [](const std::string & name) { return can_be_freed_half_done(device_named(name)); }) &&
                std::all_of(options_.experts.pools.begin(), options_.experts.pools.end(),
                            [](const ExpertPool & pool) { return can_be_freed_half_done(device_named(pool.device)); }),
            /*experts =*/{},
            long_from_};
}

Model::~Model() {
    // Streams hold the model, so none is open here.
    const auto lock = origin_.lock(mutex_);
    idle_.reset();
    experts_.reset();
}

void Model::close() {
    if (!origin_.is_here()) {
        return;  // it is another process's
    }
    if (turns_.held_here()) {
        throw Error("the model cannot be closed in the middle of a step on this very thread; close the stream instead");
    }
    std::vector<std::weak_ptr<ModelUser>> users;
    std::shared_ptr<llama_model> model;
    std::shared_ptr<ThreadPool> threads;
    std::shared_ptr<Context> idle;
    std::shared_ptr<ExpertCache> experts;
    std::shared_ptr<const RpcServers> servers;
    std::shared_ptr<ModelPart> engine;
    {
        const auto lock = origin_.lock(mutex_);
        engine = engine_;
        users.swap(users_);
        model.swap(model_);
        threads.swap(threads_);
        idle.swap(idle_);
        experts.swap(experts_);
        servers.swap(servers_);
    }
    std::exception_ptr interrupted;  // the others end all the same
    for (const auto & one : users) {
        try {
            if (const auto user = one.lock()) {
                user->end_with_model();
            }
        } catch (const CancelledError &) {
            interrupted = std::current_exception();
        }
    }
    if (interrupted) {
        std::rethrow_exception(interrupted);
    }
    if (engine) {
        engine->end_with_model();
    }
    // Whoever is in the middle of making a context goes first.
    const std::lock_guard turn(turns_);
    idle.reset();
    if (experts) {
        ExpertProfile profile = experts->profile();
        experts.reset();
        const auto lock = origin_.lock(mutex_);
        profile_ = std::move(profile);
    }
    threads.reset();
    model.reset();
    servers.reset();
}

bool Model::closed() const {
    const auto lock = origin_.lock(mutex_);
    return !model_;
}

std::shared_ptr<ExpertCache> Model::expert_cache() const {
    const auto lock = origin_.lock(mutex_);
    return experts_;
}

ExpertProfile Model::expert_profile() const {
    const auto lock = origin_.lock(mutex_);
    return profile_;
}

std::shared_ptr<llama_model> Model::loaded() const {
    const auto lock = origin_.lock(mutex_);
    if (!model_) {
        throw ClosedError("the model " + name_ + " is closed");
    }
    if (threads_) {
        threads_->check();
    }
    return model_;
}

std::shared_ptr<const llama_vocab> Model::tokenizer() const {
    const auto model = loaded();
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        throw Error("the model " + name_ + " has no tokenizer; give token ids in place of text");
    }
    return {model, vocab};
}

std::string Model::metadata(const std::string & key) const {
    const auto model = loaded();
    std::array<char, 256> value;
    return llama_model_meta_val_str(model.get(), key.c_str(), value.data(), value.size()) < 0 ? "" : value.data();
}

void Model::check_token(const std::string & argument, int32_t token) const {
    overspill::check_token(argument, token, n_vocab_);
}

void Model::check_tokens(const std::string & argument, const std::vector<int32_t> & tokens) const {
    if (tokens.empty()) {
        throw std::invalid_argument(argument + " must have at least one token");
    }
    const auto is_wrong = [this](int32_t token) { return token < 0 || token >= n_vocab_; };
    const auto wrong = std::find_if(tokens.begin(), tokens.end(), is_wrong);
    if (wrong != tokens.end()) {
        check_token(argument + "[" + std::to_string(wrong - tokens.begin()) + "]", *wrong);
    }
}

void Model::check_generates() const {
    origin_.check("the model");
    loaded();  // or it throws
    if (!cannot_generate_.empty()) {
        throw Error("the model " + name_ + " " + cannot_generate_);
    }
}

std::shared_ptr<ModelPart> Model::engine(const std::function<std::shared_ptr<ModelPart>()> & make) {
    const auto lock = origin_.lock(mutex_);
    if (!engine_) {
        engine_ = make();
    }
    return engine_;
}

std::shared_ptr<Context> Model::take_context() {
    check_generates();
    std::shared_ptr<Context> context;
    {
        const auto lock = origin_.lock(mutex_);
        context.swap(idle_);
    }
    return context ? context : make_context(stream_options({}));
}

std::shared_ptr<Context> Model::make_context(uint32_t n_outputs) {
    return make_context(context_options(n_outputs, {}));
}

// Of the context that streams share.
ContextOptions Model::stream_options(std::shared_ptr<const RpcServers> servers) const {
    ContextOptions options = context_options(usual_sequences(), std::move(servers));
    options.n_sequences = usual_sequences();
    return options;
}

std::shared_ptr<Context> Model::make_batch_context(uint32_t n_sequences, uint32_t n_ctx) {
    ContextOptions options = context_options(n_sequences, {});
    options.n_ctx = n_ctx;
    options.n_sequences = n_sequences;
    // Of the caches of the usual one; the states of recurrent layers are as large for few tokens.
    const auto model = loaded();
    const bool has_states = llama_model_is_recurrent(model.get()) || llama_model_is_hybrid(model.get());
    const double share = static_cast<double>(n_sequences) / usual_sequences() *
                         (has_states ? 1 : static_cast<double>(n_ctx) / options_.n_ctx);
    for (const auto & [name, use] : memory_.devices) {
        const auto needed_bytes = static_cast<size_t>(share * static_cast<double>(use.kv_bytes));
        check_room(name, needed_bytes, "KV caches of " + std::to_string(n_sequences) + " streams: ");
    }
    return make_context(options);
}

std::shared_ptr<Context> Model::make_timed_context(ggml_backend_sched_eval_callback on_node, void * data) {
    ContextOptions options = context_options(1, {});
    options.on_node = on_node;
    options.on_node_data = data;
    return make_context(options);
}

std::shared_ptr<Context> Model::make_context(const ContextOptions & options) {
    check_generates();
    const auto model = loaded();
    ContextOptions with_servers = options;
    std::shared_ptr<ThreadPool> threads;
    {
        const auto lock = origin_.lock(mutex_);
        threads = threads_;
        with_servers.servers = servers_;
        with_servers.experts = experts_;
    }
    const std::lock_guard turn(turns_);
    return left_alone_by_forks(std::make_unique<Context>(model, threads, with_servers));
}

std::shared_ptr<Context> Model::give_back(std::shared_ptr<Context> context) {
    const auto lock = origin_.lock(mutex_);
    // Not if its logits are still looked at: the next stream would write over them. Nor if it was made for more streams
    // than usual.
    if (model_ && !idle_ && context.use_count() == 1 && context->n_ctx() == options_.n_ctx &&
        context->n_sequences() == usual_sequences()) {
        idle_ = std::move(context);
    }
    return context;
}

void Model::add(const std::shared_ptr<ModelUser> & user) {
    const auto lock = origin_.lock(mutex_);
    if (!model_) {
        throw ClosedError("the model " + name_ + " is closed");
    }
    users_.erase(std::remove_if(users_.begin(), users_.end(), [](const auto & one) { return one.expired(); }),
                 users_.end());
    users_.push_back(user);
}

}  // namespace overspill
