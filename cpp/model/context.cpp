#include "model/context.h"

#include "base/activity.h"
#include "base/error.h"
#include "base/error_capture.h"
#include "base/log.h"
#include "base/stopwatch.h"
#include "device/compute_hooks.h"
#include "device/devices.h"
#include "device/out_of_memory.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <utility>

namespace overspill {

namespace {

// Of all contexts: a model's sequences may be in several.
std::atomic<uint64_t> n_decodes{0};
// Of the cells of a sequence.
constexpr uint32_t block = 256;

// Less than all of the prompt: its last token has to be decoded.
size_t n_common(const std::vector<int32_t> & decoded, const std::vector<int32_t> & prompt) {
    const auto [end, unused] = std::mismatch(decoded.begin(), decoded.end(), prompt.begin(), prompt.end());
    return std::min(static_cast<size_t>(end - decoded.begin()), prompt.empty() ? 0 : prompt.size() - 1);
}

}  // namespace

// Work that does not compute: where an assertion fails, other contexts of the model go on.
template <typename Work>
auto Context::guarded(Work && work) const {
    threads_->check();
    const AssertionGuard guard;
    return work();
}

Context::Context(std::shared_ptr<llama_model> model, std::shared_ptr<ThreadPool> threads,
                 const ContextOptions & options)
    : servers_(options.servers),
      products_(std::make_unique<ProductGraphs>(options.products, cpu_quantize)),
      model_(std::move(model)),
      threads_(std::move(threads)),
      experts_(options.experts),
      n_ctx_(options.n_ctx),
      n_batch_(std::min(options.n_batch, options.n_ctx * options.n_sequences)),
      n_outputs_(std::min(options.n_outputs, n_batch_)),
      n_ubatch_(std::min(options.n_ubatch, n_batch_)),
      dry_run_(options.dry_run),
      offload_min_batch_(options.offload_min_batch),
      can_be_freed_half_done_(options.can_be_freed_half_done),
      n_threads_(options.n_threads),
      form_{options.type_k,
            options.type_v,
            llama_model_is_recurrent(model_.get()),
            llama_model_is_hybrid(model_.get()),
            llama_model_n_swa(model_.get()) > 0,
            options.long_from > 0 && (options.n_ctx + block - 1) / block * block > options.long_from},
      partial_memory_(form_.has_windows || form_.is_recurrent || form_.is_hybrid),
      sequences_(options.n_sequences) {
    const Activity activity("creating a context");
    llama_context_params params = llama_context_default_params();
    // Each sequence has cells of its own, in whole blocks: in one pool, attention looks at the others' as well, which
    // took 3.3 times as long with 64 of 50 tokens on two cores, 1.6 times with 16 of 300.
    params.n_ctx =
        options.n_sequences == 1 ? options.n_ctx : (options.n_ctx + block - 1) / block * block * options.n_sequences;
    params.kv_unified = false;
    params.n_batch = n_batch_;
    // Rows of logits are reserved twice: per batch in the output buffer, per ubatch in the graph.
    constexpr uint32_t n_ubatch_for_all = 64;
    n_ubatch_ = n_outputs_ > 1 && options.n_sequences == 1 ? std::min(n_ubatch_, n_ubatch_for_all) : n_ubatch_;
    params.n_ubatch = n_ubatch_;
    params.n_seq_max = options.n_sequences;
    params.n_outputs_max = n_outputs_;  // n_batch of them would be reserved otherwise
    params.n_threads = options.n_threads;
    params.n_threads_batch = options.n_threads;
    params.type_k = options.type_k;
    params.type_v = options.type_v;
    params.flash_attn_type = options.flash_attention;
    params.swa_full = false;
    params.no_perf = true;
    params.cb_eval = options.on_node;
    params.cb_eval_user_data = options.on_node_data;
    params.abort_callback_data = this;
    params.abort_callback = [](void * data) {
        const auto * self = static_cast<const Context *>(data);
        return self->interrupt_ != nullptr && self->interrupt_->should_stop(*self->poll_);
    };
    products_->share(experts_.get());
    hook_devices();
    const ComputeScope scope(offload_min_batch_, products_.get());
    const ErrorCapture errors;
    guarded([&] { context_.reset(llama_init_from_model(model_.get(), params)); });
    if (servers_) {
        servers_->check("a context was made");
    }
    if (!context_) {
        const std::string what = "no context of " + std::to_string(options.n_ctx) + " tokens could be made: ";
        throw_if_out_of_memory(errors, what);
        throw Error(what + errors.reason("too little memory?") + " (a smaller n_ctx needs less)");
    }
    n_splits_ = logged_graph_splits();
    batch_.reset(new llama_batch(llama_batch_init(static_cast<int32_t>(n_batch_), 0, 1)));
    llama_attach_threadpool(context_.get(), threads_->get(), threads_->get());
}

Context::~Context() {
    const NoAssertionGuard destructors;
    if (threads_->failed() && !can_be_freed_half_done_) {
        // Kept for good, with its model: the destructors of some backends would end the process.
        context_.release();
        static_cast<void>(std::make_unique<std::shared_ptr<ExpertCache>>(experts_).release());
        static_cast<void>(std::make_unique<std::shared_ptr<llama_model>>(model_).release());
    }
    context_.reset();
}

MemoryReport Context::memory() const {
    const Activity activity("reading a model's placement back");
    const ComputeScope scope(offload_min_batch_, products_.get());
    MemoryReport report = guarded(
        [&] { return report_memory(*context_, std::min(n_ctx_ * n_sequences(), n_ubatch_), n_outputs_, dry_run_); });
    report.n_splits = n_splits_;
    return report;
}

std::vector<MappedTensor> Context::mapped_weights() const {
    const Activity activity("looking for mapped weights");
    const ComputeScope scope(offload_min_batch_, products_.get());
    return guarded(
        [&] { return overspill::mapped_weights(*context_, std::min(n_ctx_ * n_sequences(), n_ubatch_), n_outputs_); });
}

void Context::record_experts(std::shared_ptr<ExpertRecorder> recorder) {
    products_->record(recorder.get());
    recorder_ = std::move(recorder);
}

bool Context::can_continue_text() const {
    return llama_get_memory(context_.get()) != nullptr;
}

void Context::clear(uint32_t sequence) {
    guarded([&] {
        llama_memory_t memory = llama_get_memory(context_.get());
        if (sequences_.size() == 1) {
            // Not the data: cells without a position are never looked at.
            llama_memory_clear(memory, /*data =*/false);
        } else {
            llama_memory_seq_rm(memory, static_cast<llama_seq_id>(sequence), -1, -1);
        }
    });
    sequences_[sequence] = {};
}

size_t Context::keep(uint32_t sequence, const std::vector<int32_t> & tokens) {
    const Activity activity("going back to the beginning that two prompts share");
    const size_t n = go_back(sequence, n_common(sequences_[sequence].tokens, tokens));
    sequences_[sequence].may_come_back = true;
    return n;
}

// Of a sliding window, only what the next tokens look at has to be there still.
bool Context::has_before(uint32_t sequence, size_t n) const {
    const auto window = static_cast<llama_pos>(llama_model_n_swa(model_.get()));
    return !partial_memory_ ||
           llama_memory_seq_pos_min(llama_get_memory(context_.get()), static_cast<llama_seq_id>(sequence)) <=
               std::max(0, static_cast<llama_pos>(n) - window);
}

// To its first n tokens, or as many as its memory allows.
size_t Context::go_back(uint32_t sequence, size_t n) {
    Decoded & decoded = sequences_[sequence];
    if (n == 0 || decoded.is_incomplete) {
        clear(sequence);
        return 0;
    }
    if (n == decoded.tokens.size()) {
        return n;
    }
    const bool is_back = guarded([&] {
        llama_memory_t memory = llama_get_memory(context_.get());
        const auto id = static_cast<llama_seq_id>(sequence);
        if (has_before(sequence, n) && llama_memory_seq_rm(memory, id, static_cast<llama_pos>(n), -1)) {
            return true;
        }
        const std::vector<uint8_t> & state = decoded.remembered;
        n = decoded.n_remembered <= n && !state.empty() ? decoded.n_remembered : 0;
        return n > 0 &&
               llama_state_seq_set_data_ext(context_.get(), state.data(), state.size(), id,
                                            LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == state.size() &&
               llama_memory_seq_rm(memory, id, static_cast<llama_pos>(n), -1);
    });
    if (!is_back) {
        clear(sequence);
        return 0;
    }
    decoded.tokens.resize(n);
    if (decoded.n_remembered > n) {
        decoded.remembered.clear();
    }
    return n;
}

void Context::remember(uint32_t sequence) {
    if (!partial_memory_) {
        return;
    }
    const Activity activity("remembering the state of a context");
    Decoded & decoded = sequences_[sequence];
    std::vector<uint8_t> & state = decoded.remembered;
    const auto id = static_cast<llama_seq_id>(sequence);
    guarded([&] {
        state.resize(llama_state_seq_get_size_ext(context_.get(), id, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY));
        state.resize(llama_state_seq_get_data_ext(context_.get(), state.data(), state.size(), id,
                                                  LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY));
    });
    decoded.n_remembered = decoded.tokens.size();
}

std::shared_ptr<SequenceState> Context::save(uint32_t sequence) const {
    const Activity activity("saving the state of a context");
    const Decoded & decoded = sequences_[sequence];
    auto saved = std::make_shared<SequenceState>();
    saved->n_streams = n_sequences();
    saved->is_long = form_.is_long;
    saved->tokens = decoded.tokens;
    const ErrorCapture errors;
    const size_t n = guarded([&] {
        const auto id = static_cast<llama_seq_id>(sequence);
        saved->state.resize(llama_state_seq_get_size(context_.get(), id));
        return llama_state_seq_get_data(context_.get(), saved->state.data(), saved->state.size(), id);
    });
    if (servers_) {
        servers_->check("saving the state of a stream");
    }
    if (n == 0 || n != saved->state.size()) {
        throw Error("the KV cache cannot be saved: " + errors.reason("llama.cpp gives no state of this model"));
    }
    if (!decoded.remembered.empty()) {
        saved->n_remembered = decoded.n_remembered;
        saved->remembered = decoded.remembered;
    }
    if (saved->n_streams > 1) {
        auto state = with_streams(saved->state, 1, form_, /*partial =*/false);
        auto remembered = saved->remembered.empty() ? std::vector<uint8_t>()
                                                    : with_streams(saved->remembered, 1, form_, /*partial =*/true);
        if (state && remembered) {
            saved->state = std::move(*state);
            saved->remembered = std::move(*remembered);
            saved->n_streams = 1;
        }
    }
    return saved;
}

void Context::restore(uint32_t sequence, const SequenceState & saved) {
    const Activity activity("restoring the state of a context");
    if (saved.tokens.size() > n_ctx_) {
        throw ContextFullError("the saved state has " + std::to_string(saved.tokens.size()) +
                               " tokens, but the context holds " + std::to_string(n_ctx_) +
                               "; load the model with a larger n_ctx");
    }
    const std::string what = "the saved state cannot be restored here: ";
    if (saved.is_long != form_.is_long) {
        throw Error(what +
                    "this model rotates keys otherwise in longer contexts; it needs the n_ctx that it was saved with");
    }
    std::optional<std::vector<uint8_t>> state;
    std::optional<std::vector<uint8_t>> remembered = saved.remembered;
    if (saved.n_streams != n_sequences()) {
        if (saved.n_streams == 1) {
            state = with_streams(saved.state, n_sequences(), form_, /*partial =*/false);
            remembered = saved.remembered.empty()
                             ? saved.remembered
                             : with_streams(saved.remembered, n_sequences(), form_, /*partial =*/true);
        }
        if (!state || !remembered) {
            throw Error(what + "it was saved with n_parallel=" + std::to_string(saved.n_streams) +
                        ", and caches of this architecture need the same");
        }
    }
    clear(sequence);
    const std::vector<uint8_t> & bytes = state ? *state : saved.state;
    const ErrorCapture errors;
    try {
        const bool is_restored = guarded([&] {
            const auto id = static_cast<llama_seq_id>(sequence);
            return llama_state_seq_set_data(context_.get(), bytes.data(), bytes.size(), id) == bytes.size() &&
                   llama_memory_seq_pos_max(llama_get_memory(context_.get()), id) + 1 ==
                       static_cast<llama_pos>(saved.tokens.size());
        });
        if (servers_) {
            servers_->check("restoring the state of a stream");
        }
        if (!is_restored) {
            throw Error(what + errors.reason("llama.cpp does not accept it") +
                        "; it needs the flash_attention, type_k and type_v that it was saved with");
        }
    } catch (...) {
        sequences_[sequence].is_incomplete = true;  // what llama.cpp took of it goes before the next use
        throw;
    }
    Decoded & decoded = sequences_[sequence];
    decoded.tokens = saved.tokens;
    decoded.n_remembered = saved.n_remembered;
    decoded.remembered = std::move(*remembered);
    decoded.used_at = n_decodes.fetch_add(1, std::memory_order_relaxed) + 1;
    decoded.may_come_back = true;
}

size_t Context::state_bytes(uint32_t sequence) const {
    const size_t n =
        guarded([&] { return llama_state_seq_get_size(context_.get(), static_cast<llama_seq_id>(sequence)); });
    return n + sequences_[sequence].tokens.size() * sizeof(int32_t) + sequences_[sequence].remembered.size();
}

size_t Context::window() const {
    return static_cast<size_t>(std::max(0, llama_model_n_swa(model_.get())));
}

size_t Context::n_kept_of(const SequenceState & saved, const std::vector<int32_t> & prompt) const {
    return saved.n_kept(n_common(saved.tokens, prompt), form_, window());
}

size_t Context::n_kept_of(uint32_t sequence, const std::vector<int32_t> & prompt) const {
    const Decoded & decoded = sequences_[sequence];
    const size_t n = n_common(decoded.tokens, prompt);
    const bool can_go_back =
        !form_.is_recurrent && !form_.is_hybrid && guarded([&] { return has_before(sequence, n); });
    if (decoded.is_incomplete || n == 0 || n == decoded.tokens.size() || can_go_back) {
        return decoded.is_incomplete ? 0 : n;
    }
    return !decoded.remembered.empty() && decoded.n_remembered <= n ? decoded.n_remembered : 0;
}

bool Context::can_drop() const {
    // Recurrent layers say that they can, and forget nothing; learned positions would stay as they were.
    return llama_memory_can_shift(llama_get_memory(context_.get())) && !llama_model_is_recurrent(model_.get()) &&
           !llama_model_is_hybrid(model_.get()) && llama_model_rope_type(model_.get()) != LLAMA_ROPE_TYPE_NONE;
}

bool Context::drop(uint32_t sequence, uint32_t from, uint32_t to) {
    Decoded & decoded = sequences_[sequence];
    if (from >= to || to > decoded.tokens.size() || !can_drop()) {
        return false;
    }
    const Activity activity("dropping old tokens");
    const auto id = static_cast<llama_seq_id>(sequence);
    const auto begin = static_cast<llama_pos>(from);
    const auto end = static_cast<llama_pos>(to);
    const bool dropped = guarded([&] {
        llama_memory_t memory = llama_get_memory(context_.get());
        if (!llama_memory_seq_rm(memory, id, begin, end)) {
            return false;
        }
        llama_memory_seq_add(memory, id, end, -1, begin - end);
        return true;
    });
    if (!dropped) {
        return false;
    }
    decoded.tokens.erase(decoded.tokens.begin() + begin, decoded.tokens.begin() + end);
    decoded.remembered.clear();
    return true;
}

// What the callback of a decode asks while this exists.
class Context::Asking {
  public:
    Asking(Context & context, Interrupt & interrupt, const Interrupt::Poll & poll) : context_(context) {
        context_.interrupt_ = &interrupt;
        context_.poll_ = &poll;
    }
    ~Asking() {
        context_.interrupt_ = nullptr;
        context_.poll_ = nullptr;
    }
    Asking(const Asking &) = delete;
    Asking & operator=(const Asking &) = delete;

  private:
    Context & context_;
};

void Context::compute_with(int32_t n_threads) {
    if (std::exchange(n_threads_, n_threads) != n_threads) {
        llama_set_n_threads(context_.get(), n_threads, n_threads);
    }
}

// Where the token is one more of the batch.
void Context::add(const BatchToken & token) {
    llama_batch & batch = *batch_;
    const auto i = static_cast<size_t>(batch.n_tokens++);
    Decoded & decoded = sequences_[token.sequence];
    batch.token[i] = token.token;
    batch.pos[i] = static_cast<llama_pos>(decoded.tokens.size());
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = static_cast<llama_seq_id>(token.sequence);
    batch.logits[i] = token.wants_logits ? 1 : 0;
    decoded.tokens.push_back(token.token);
    decoded.used_at = n_decodes.load(std::memory_order_relaxed) + 1;
}

// llama.cpp may have decoded a part of the batch, which is forgotten.
void Context::restore_after_failure() noexcept {
    const auto try_to_go_back = [this](uint32_t sequence, size_t n) {
        try {
            go_back(sequence, n);
        } catch (...) {  // of a model that cannot be used any more
            sequences_[sequence] = {};
            sequences_[sequence].is_incomplete = true;
        }
    };
    if (llama_model_is_recurrent(model_.get()) || llama_model_is_hybrid(model_.get())) {
        // The states of other sequences may have been on their way to other cells.
        for (uint32_t sequence = 0; sequence < n_sequences(); ++sequence) {
            try_to_go_back(sequence, 0);
        }
        return;
    }
    const llama_batch & batch = *batch_;
    for (size_t i = 0; i < static_cast<size_t>(batch.n_tokens); ++i) {
        const auto sequence = static_cast<uint32_t>(batch.seq_id[i][0]);
        const auto n_before = static_cast<size_t>(batch.pos[i]);
        if (n_before < sequences_[sequence].tokens.size()) {
            try_to_go_back(sequence, n_before);
        }
    }
}

void Context::decode_batch(Interrupt & interrupt, const Interrupt::Poll & poll, Breakdown * times) {
    const auto n = static_cast<uint32_t>(batch_->n_tokens);
    const Activity activity("decoding");
    const Asking asking(*this, interrupt, poll);
    const ComputeScope scope(offload_min_batch_, products_.get(), interrupt, poll);
    const ErrorCapture errors;
    n_decodes.fetch_add(1, std::memory_order_relaxed);
    struct Restored {
        Context & context;
        bool is_well = false;
        ~Restored() {
            if (!is_well) {
                context.restore_after_failure();
            }
        }
    } restored{*this};
    // Longer batches wait less often for a thread, and take all.
    constexpr uint32_t most_tokens_of_a_step = 32;
    const bool is_step = n <= most_tokens_of_a_step;
    compute_with(is_step ? threads_->n_decoding() : threads_->size());
    std::optional<Disturbance> disturbance;
    if (is_step && threads_->adapts()) {
        disturbance.emplace();
    }
    const int32_t n_reused = llama_perf_context(context_.get()).n_reused;
    Stopwatch watch;
    double decode_s = 0;
    if (recorder_) {
        recorder_->start(n, n_ubatch_);
    }
    if (experts_) {
        experts_->start(n);
    }
    const int32_t status = threads_->use([&] {
        const int32_t ended = llama_decode(context_.get(), *batch_);
        decode_s = watch.lap();
        if (ended == 0 || ended == 2) {
            // A GPU may still be working: the step ends here and not in the sampler, or where what it reads is freed.
            llama_synchronize(context_.get());
        }
        return ended;
    });
    if (times != nullptr) {
        times->decode_s += decode_s;
        times->sync_s += watch.lap();
        times->n_graphs_reused += llama_perf_context(context_.get()).n_reused - n_reused;
        times->n_threads_left_out += threads_->size() - n_threads_;
    }
    if (disturbance && status == 0) {
        threads_->decoded(n, watch.seconds(), *disturbance);
    }
    if (experts_) {
        experts_->finish(status == 0, watch.seconds());
    }
    if (recorder_) {
        recorder_->finish(status == 0);
    }
    if (status == 2) {
        throw CancelledError("interrupted");
    }
    if (servers_) {
        servers_->check("decoding");
    }
    if (status == 1) {
        throw ContextFullError("the KV cache has no room for " + std::to_string(n) + " more tokens");
    }
    if (status != 0) {
        throw_if_out_of_memory(errors, "decoding failed: ");
        throw Error("decoding failed: " + errors.reason("llama_decode returned " + std::to_string(status)));
    }
    restored.is_well = true;
}

float * Context::decode(const int32_t * tokens, uint32_t n, Interrupt & interrupt, const Interrupt::Poll & poll,
                        bool all, Breakdown * times) {
    if (sequences_.front().tokens.size() + n > n_ctx_) {
        throw ContextFullError("the context of " + std::to_string(n_ctx_) + " tokens is full");
    }
    batch_->n_tokens = 0;
    for (uint32_t i = 0; i < n; ++i) {
        add({tokens[i], 0, all || i + 1 == n});
    }
    decode_batch(interrupt, poll, times);
    float * logits = threads_->use(
        [&] { return all ? llama_get_logits(context_.get()) : llama_get_logits_ith(context_.get(), -1); });
    if (logits == nullptr) {
        throw Error("decoding gave no logits");
    }
    return logits;
}

void Context::decode(const std::vector<BatchToken> & tokens, Interrupt & interrupt, const Interrupt::Poll & poll,
                     Breakdown & times) {
    batch_->n_tokens = 0;
    for (const BatchToken & one : tokens) {
        add(one);
    }
    decode_batch(interrupt, poll, &times);
}

float * Context::logits_of(size_t place) {
    float * logits = threads_->use([&] { return llama_get_logits_ith(context_.get(), static_cast<int32_t>(place)); });
    if (logits == nullptr) {
        throw Error("there are no logits of token " + std::to_string(place) + " of the batch");
    }
    return logits;
}

}  // namespace overspill
