#include "model/model.h"

#include "base/activity.h"
#include "base/error.h"
#include "base/error_capture.h"
#include "device/devices.h"
#include "device/out_of_memory.h"
#include "generate/batch.h"
#include "generate/generation.h"
#include "gguf/gguf_file.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <limits>
#include <utility>

namespace overspill {

namespace {

llama_load_mode load_mode_of(const std::string & name) {
    static const std::map<std::string, llama_load_mode> modes = {
        {"mmap", LLAMA_LOAD_MODE_MMAP},           {"read", LLAMA_LOAD_MODE_NONE},
        {"mlock", LLAMA_LOAD_MODE_MLOCK},         {"mmap+mlock", LLAMA_LOAD_MODE_MMAP_MLOCK},
        {"direct-io", LLAMA_LOAD_MODE_DIRECT_IO},
    };
    const auto found = modes.find(name);
    if (found == modes.end()) {
        throw std::invalid_argument("load_mode must be one of mmap, read, mlock, mmap+mlock, direct-io, not " + name);
    }
    return found->second;
}

ggml_type cache_type_of(const char * argument, const std::string & name) {
    static const std::map<std::string, ggml_type> types = {
        {"f32", GGML_TYPE_F32},   {"f16", GGML_TYPE_F16},   {"bf16", GGML_TYPE_BF16},
        {"q8_0", GGML_TYPE_Q8_0}, {"q5_1", GGML_TYPE_Q5_1}, {"q5_0", GGML_TYPE_Q5_0},
        {"q4_1", GGML_TYPE_Q4_1}, {"q4_0", GGML_TYPE_Q4_0}, {"iq4_nl", GGML_TYPE_IQ4_NL},
    };
    const auto found = types.find(name);
    if (found == types.end()) {
        throw std::invalid_argument(std::string(argument) +
                                    " must be one of f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, not " +
                                    name);
    }
    return found->second;
}

void check_switch(const char * argument, const std::string & value) {
    if (value != "auto" && value != "on" && value != "off") {
        throw std::invalid_argument(std::string(argument) + " must be one of auto, on, off, not " + value);
    }
}

llama_flash_attn_type flash_attention_of(const std::string & name) {
    return name == "auto" ? LLAMA_FLASH_ATTN_TYPE_AUTO
                          : (name == "on" ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED);
}

}  // namespace

void Turns::lock(const Interrupt * interrupt) {
    if (held_here()) {
        throw Error(
            "the model is busy with a step on this very thread: a signal handler or a callback "
            "that runs during a step cannot use the model");
    }
    constexpr auto interval = std::chrono::milliseconds(20);  // in which a cancelled step gives up
    std::unique_lock lock(mutex_);
    const uint64_t ticket = n_asked_++;
    waiting_.push_back(ticket);
    const auto my_turn = [&] { return !taken_ && waiting_.front() == ticket; };
    if (interrupt == nullptr) {
        next_.wait(lock, my_turn);
    }
    while (interrupt != nullptr && !next_.wait_for(lock, interval, my_turn)) {
        if (interrupt->cancelled()) {
            waiting_.erase(std::find(waiting_.begin(), waiting_.end(), ticket));
            next_.notify_all();
            throw CancelledError("interrupted");
        }
    }
    waiting_.erase(waiting_.begin());
    taken_ = true;
    owner_.store(std::this_thread::get_id(), std::memory_order_relaxed);
}

void Turns::unlock() {
    {
        const std::lock_guard lock(mutex_);
        owner_.store({}, std::memory_order_relaxed);
        taken_ = false;
    }
    next_.notify_all();
}

void append_token_bytes(const llama_vocab & vocab, int32_t token, bool special, std::string & bytes) {
    if (llama_vocab_type(&vocab) == LLAMA_VOCAB_TYPE_NONE) {
        return;
    }
    std::array<char, 256> piece;
    const int32_t length = llama_token_to_piece(&vocab, token, piece.data(), piece.size(), 0, special);
    if (length >= 0) {
        bytes.append(piece.data(), static_cast<size_t>(length));
        return;
    }
    const size_t start = bytes.size();
    bytes.resize(start + static_cast<size_t>(-length));
    llama_token_to_piece(&vocab, token, bytes.data() + start, -length, 0, special);
}

Model::Model(const std::string & path, ModelOptions options) : name_(path), options_(std::move(options)) {
    check_range("n_batch", options_.n_batch, uint32_t{1}, uint32_t{65536});
    check_range("n_threads", options_.n_threads, int32_t{1}, int32_t{GGML_MAX_N_THREADS});
    check_range("n_gpu_layers", options_.placement.n_gpu_layers, int32_t{-1}, std::numeric_limits<int32_t>::max());
    options_.n_ubatch = options_.n_ubatch == 0 ? options_.n_batch : options_.n_ubatch;
    check_range("n_ubatch", options_.n_ubatch, uint32_t{1}, options_.n_batch);
    const llama_load_mode load_mode = load_mode_of(options_.load_mode);
    check_switch("flash_attention", options_.flash_attention);
    check_switch("repack", options_.repack);
    cache_type_of("type_k", options_.type_k);
    if (ggml_is_quantized(cache_type_of("type_v", options_.type_v)) && options_.flash_attention == "off") {
        throw std::invalid_argument("type_v: " + options_.type_v + " needs flash attention, which is off");
    }
    check_gguf(path, options_.vocab_only);

    struct Progress {
        const std::function<bool(float)> & report;
        bool cancelled;
    } progress{options_.progress, false};

    llama_model_params params = llama_model_default_params();
    PlacementParams placement(path, options_.placement);
    placement.apply(params);
    params.load_mode = options_.dry_run ? LLAMA_LOAD_MODE_NONE : load_mode;
    params.no_alloc = options_.dry_run;
    params.use_extra_bufts = options_.repack != "off";
    params.no_host = options_.repack == "on";
    params.vocab_only = options_.vocab_only;
    params.check_tensors = options_.check_tensors;
    params.progress_callback_user_data = &progress;
    params.progress_callback = [](float share, void * data) {
        auto & self = *static_cast<Progress *>(data);
        self.cancelled = self.cancelled || (self.report && !self.report(share));
        return !self.cancelled;
    };
    const Activity activity("loading a model");
    const ErrorCapture errors;
    servers_ = std::make_shared<const RpcServers>(params.devices);
    // They outlive the model, whose destructor talks to them.
    model_.reset(llama_model_load_from_file(path.c_str(), params),
                 [servers = servers_](llama_model * model) { llama_model_free(model); });
    options_.progress = {};
    if (!progress.cancelled) {
        servers_->check("loading " + path);
    }
    if (!model_) {
        if (progress.cancelled) {
            throw CancelledError(path + ": loading was cancelled");
        }
        throw_if_out_of_memory(errors, path + ": ");
        throw ModelLoadError(path + ": " + errors.reason("llama.cpp could not load it"));
    }
    n_vocab_ = llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
    n_ctx_train_ = static_cast<uint32_t>(std::max(0, llama_model_n_ctx_train(model_.get())));
    prepare_to_generate();
}

void Model::prepare_to_generate() {
    if (options_.vocab_only) {
        cannot_generate_ = "was loaded with vocab_only, without its weights";
    } else if (llama_model_has_encoder(model_.get())) {
        cannot_generate_ = "is an encoder-decoder model; only decoder models can stream";
    } else {
        if (options_.n_ctx == 0) {
            constexpr uint32_t largest_default = 8192;
            options_.n_ctx = n_ctx_train_ == 0 ? largest_default : std::min(n_ctx_train_, largest_default);
        }
        threadpool_ = make_threadpool(options_.n_threads);
        idle_ = std::make_shared<Context>(model_, threadpool_, context_options(1, servers_));
        if (!idle_->can_continue_text()) {
            cannot_generate_ = "does not continue text: it is an encoder (for embeddings) or a diffusion model";
        } else {
            memory_ = idle_->memory();
            cannot_generate_ = options_.dry_run ? "was not loaded: this is a dry run" : "";
        }
        if (!cannot_generate_.empty()) {
            idle_.reset();
            threadpool_.reset();
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
            cache_type_of("type_k", options_.type_k),
            cache_type_of("type_v", options_.type_v),
            flash_attention_of(options_.flash_attention),
            n_outputs,
            /*n_sequences =*/1,
            options_.dry_run,
            std::move(servers)};
}

Model::~Model() {
    // Streams hold the model, so none is open here.
    const std::lock_guard lock(mutex_);
    idle_.reset();
}

void Model::close() {
    if (turns_.held_here()) {
        throw Error("the model cannot be closed from within one of its own steps; close the stream instead");
    }
    std::vector<std::weak_ptr<Generation>> generations;
    std::vector<std::weak_ptr<BatchGeneration>> batches;
    std::shared_ptr<llama_model> model;
    std::shared_ptr<ggml_threadpool> threadpool;
    std::shared_ptr<Context> idle;
    std::shared_ptr<const RpcServers> servers;
    {
        const std::lock_guard lock(mutex_);
        generations.swap(generations_);
        batches.swap(batches_);
        model.swap(model_);
        threadpool.swap(threadpool_);
        idle.swap(idle_);
        servers.swap(servers_);
    }
    for (const auto & open : generations) {
        if (const auto generation = open.lock()) {
            generation->close(StopReason::closed);
        }
    }
    for (const auto & open : batches) {
        if (const auto batch = open.lock()) {
            batch->close();
        }
    }
    // Whoever is in the middle of making a context goes first.
    const std::lock_guard turn(turns_);
    idle.reset();
    threadpool.reset();
    model.reset();
    servers.reset();
}

bool Model::closed() const {
    const std::lock_guard lock(mutex_);
    return !model_;
}

std::shared_ptr<llama_model> Model::loaded() const {
    const std::lock_guard lock(mutex_);
    if (!model_) {
        throw ClosedError("the model " + name_ + " is closed");
    }
    return model_;
}

const llama_vocab & Model::tokenizer(const llama_model & model) const {
    const llama_vocab * vocab = llama_model_get_vocab(&model);
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        throw Error("the model " + name_ + " has no tokenizer; give token ids in place of text");
    }
    return *vocab;
}

std::vector<int32_t> Model::tokenize(std::string_view text, bool add_special, bool parse_special) const {
    const auto model = loaded();
    const llama_vocab & vocab = tokenizer(*model);
    if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max() / 2)) {
        throw std::invalid_argument("text must be shorter than 1 GiB, not " + std::to_string(text.size()) + " bytes");
    }
    const Activity activity("tokenizing a text");
    const auto length = static_cast<int32_t>(text.size());
    std::vector<int32_t> tokens(text.size() / 2 + 16);
    const auto tokenize = [&] {
        return llama_tokenize(&vocab, text.data(), length, tokens.data(), static_cast<int32_t>(tokens.size()),
                              add_special, parse_special);
    };
    int32_t n = tokenize();
    if (n < 0) {
        tokens.resize(static_cast<size_t>(-static_cast<int64_t>(n)));
        n = tokenize();
    }
    tokens.resize(static_cast<size_t>(std::max(n, 0)));
    return tokens;
}

std::string Model::detokenize(const std::vector<int32_t> & tokens, bool skip_special) const {
    const auto model = loaded();
    const llama_vocab & vocab = tokenizer(*model);
    for (const int32_t token : tokens) {
        check_token("tokens", token);
    }
    std::string text(tokens.size() * 8 + 16, '\0');
    const auto detokenize = [&] {
        return llama_detokenize(&vocab, tokens.data(), static_cast<int32_t>(tokens.size()), text.data(),
                                static_cast<int32_t>(text.size()), /*remove_special =*/skip_special,
                                /*unparse_special =*/!skip_special);
    };
    int32_t n = detokenize();
    if (n < 0) {
        text.resize(static_cast<size_t>(-static_cast<int64_t>(n)));
        n = detokenize();
    }
    text.resize(static_cast<size_t>(std::max(n, 0)));
    return text;
}

std::string Model::token_bytes(int32_t token, bool special) const {
    const auto model = loaded();
    const llama_vocab & vocab = tokenizer(*model);
    check_token("token", token);
    std::string bytes;
    append_token_bytes(vocab, token, special, bytes);
    return bytes;
}

std::map<std::string, int32_t> Model::special_tokens() const {
    const auto model = loaded();
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    std::map<std::string, int32_t> tokens = {
        {"bos", llama_vocab_bos(vocab)},   {"eos", llama_vocab_eos(vocab)}, {"eot", llama_vocab_eot(vocab)},
        {"sep", llama_vocab_sep(vocab)},   {"nl", llama_vocab_nl(vocab)},   {"pad", llama_vocab_pad(vocab)},
        {"mask", llama_vocab_mask(vocab)},
    };
    for (auto token = tokens.begin(); token != tokens.end();) {
        token = token->second == LLAMA_TOKEN_NULL ? tokens.erase(token) : std::next(token);
    }
    return tokens;
}

std::string Model::metadata(const std::string & key) const {
    const auto model = loaded();
    std::array<char, 256> value;
    return llama_model_meta_val_str(model.get(), key.c_str(), value.data(), value.size()) < 0 ? "" : value.data();
}

bool Model::is_end_of_generation(int32_t token) const {
    const auto model = loaded();
    check_token("token", token);
    return llama_vocab_is_eog(llama_model_get_vocab(model.get()), token);
}

std::vector<std::vector<int32_t>> Model::dry_breakers(const std::vector<std::string> & texts) const {
    constexpr size_t longest_text = 40;      // bytes, and
    constexpr size_t longest_sequence = 21;  // tokens, as in llama.cpp
    const auto model = loaded();
    tokenizer(*model);
    if (std::any_of(texts.begin(), texts.end(), [](const std::string & text) { return text.empty(); })) {
        throw std::invalid_argument("dry_sequence_breakers must not contain an empty string");
    }
    std::vector<std::vector<int32_t>> breakers;
    for (int32_t token = 0; token < n_vocab_; ++token) {
        const std::string word = detokenize({token}, /*skip_special =*/false);
        for (const std::string & whole : texts) {
            const std::string text = whole.substr(0, longest_text);
            if (word.find(text) != std::string::npos) {
                breakers.push_back({token});
                continue;
            }
            // The token may end with the beginning of the text.
            for (size_t at = word.find(text[0]); at != std::string::npos; at = word.find(text[0], at + 1)) {
                const size_t n = word.size() - at;
                if (n < text.size() && word.compare(at, n, text, 0, n) == 0) {
                    std::vector<int32_t> sequence = tokenize(text.substr(n), false, false);
                    sequence.insert(sequence.begin(), token);
                    sequence.resize(std::min(sequence.size(), longest_sequence));
                    breakers.push_back(std::move(sequence));
                }
            }
        }
    }
    std::sort(breakers.begin(), breakers.end());
    breakers.erase(std::unique(breakers.begin(), breakers.end()), breakers.end());
    return breakers;
}

std::unique_ptr<Grammar> Model::grammar(const std::string & gbnf, const Grammar::Start & start) const {
    return std::make_unique<Grammar>(loaded(), gbnf, start);
}

std::unique_ptr<ChatTemplate> Model::chat_template(const std::string & source) const {
    const auto model = loaded();
    tokenizer(*model);
    return std::make_unique<ChatTemplate>(model, source);
}

bool Model::has_chat_template() const {
    return ChatTemplate::exists(*loaded());
}

void Model::check_token(const std::string & argument, int32_t token) const {
    if (token < 0 || token >= n_vocab_) {
        throw std::invalid_argument(argument + ": " + std::to_string(token) + " is not in the vocabulary (0 to " +
                                    std::to_string(n_vocab_ - 1) + ")");
    }
}

std::shared_ptr<Context> Model::take_context(bool clear) {
    std::shared_ptr<Context> context;
    {
        const std::lock_guard lock(mutex_);
        context.swap(idle_);
    }
    if (!context) {
        context = make_context(1);
    }
    if (clear) {
        context->clear();
    }
    return context;
}

std::shared_ptr<Context> Model::make_context(uint32_t n_outputs) {
    return make_context(context_options(n_outputs, {}));
}

std::shared_ptr<Context> Model::make_batch_context(uint32_t n_sequences, uint32_t n_ctx) {
    ContextOptions options = context_options(1, {});
    options.n_ctx = n_ctx;
    options.n_sequences = n_sequences;
    options.n_outputs = n_sequences;
    options.n_batch = std::max(options.n_batch, n_sequences);
    return make_context(options);
}

std::shared_ptr<Context> Model::make_timed_context(ggml_backend_sched_eval_callback on_node, void * data) {
    ContextOptions options = context_options(1, {});
    options.on_node = on_node;
    options.on_node_data = data;
    return make_context(options);
}

std::shared_ptr<Context> Model::make_context(const ContextOptions & options) {
    if (!cannot_generate_.empty()) {
        throw Error("the model " + name_ + " " + cannot_generate_);
    }
    const auto model = loaded();
    ContextOptions with_servers = options;
    std::shared_ptr<ggml_threadpool> threadpool;
    {
        const std::lock_guard lock(mutex_);
        threadpool = threadpool_;
        with_servers.servers = servers_;
    }
    const std::lock_guard turn(turns_);
    return std::make_shared<Context>(model, threadpool, with_servers);
}

void Model::give_back(std::shared_ptr<Context> context) {
    const std::lock_guard lock(mutex_);
    // Not if its logits are still looked at: the next stream would write over them.
    if (model_ && !idle_ && context.use_count() == 1) {
        idle_ = std::move(context);
    }
    // Otherwise it goes here, with what it keeps alive.
}

template <typename Open>
void Model::add_to(std::vector<std::weak_ptr<Open>> & all, const std::shared_ptr<Open> & one) {
    const std::lock_guard lock(mutex_);
    if (!model_) {
        throw ClosedError("the model " + name_ + " is closed");
    }
    all.erase(std::remove_if(all.begin(), all.end(), [](const auto & open) { return open.expired(); }), all.end());
    all.push_back(one);
}

void Model::add(const std::shared_ptr<Generation> & generation) {
    add_to(generations_, generation);
}

void Model::add(const std::shared_ptr<BatchGeneration> & batch) {
    add_to(batches_, batch);
}

}  // namespace overspill
