#include "generate/generation.h"

#include "base/error.h"
#include "base/stopwatch.h"
#include "model/model.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <system_error>
#include <utility>

#ifndef _WIN32
#include <sys/resource.h>
#endif

namespace overspill {

namespace {

constexpr std::array<std::pair<StopReason, const char *>, 7> reason_names{{
    {StopReason::eos, "eos"},
    {StopReason::stop_string, "stop_string"},
    {StopReason::max_tokens, "max_tokens"},
    {StopReason::context_full, "context_full"},
    {StopReason::closed, "closed"},
    {StopReason::interrupted, "interrupted"},
    {StopReason::error, "error"},
}};

// Of the process, which had to wait for a disk; -1 where the system does not tell.
int64_t major_page_faults() {
#ifdef _WIN32
    return -1;
#else
    rusage usage{};
    return getrusage(RUSAGE_SELF, &usage) == 0 ? int64_t{usage.ru_majflt} : -1;
#endif
}

}  // namespace

const char * stop_reason_name(StopReason reason) {
    for (const auto & [known, name] : reason_names) {
        if (known == reason) {
            return name;
        }
    }
    return "none";
}

StopReason stop_reason_of(const std::string & name) {
    for (const auto & [reason, known] : reason_names) {
        if (known == name) {
            return reason;
        }
    }
    throw std::invalid_argument("reason: " + name + " is not a stop reason");
}

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
    if (std::any_of(stops_.begin(), stops_.end(), [](const std::string & stop) { return stop.empty(); })) {
        throw std::invalid_argument("stop must not contain an empty string");
    }
}

std::string StopStrings::push(std::string text, bool & found) {
    if (stops_.empty()) {
        return text;
    }
    held_ += text;
    size_t first = std::string::npos;
    size_t n_held = 0;
    for (const auto & stop : stops_) {
        first = std::min(first, held_.find(stop));
        // The longest end of the text that is a beginning of the stop string.
        for (size_t n = std::min(stop.size() - 1, held_.size()); n > n_held; --n) {
            if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) {
                n_held = n;
            }
        }
    }
    found = first != std::string::npos;
    text = held_.substr(0, found ? first : held_.size() - n_held);
    held_.erase(0, found ? std::string::npos : text.size());
    return text;
}

std::string StopStrings::flush() {
    return std::exchange(held_, {});
}

std::shared_ptr<Generation> Generation::start(std::shared_ptr<Model> model, std::vector<int32_t> prompt,
                                              GenerationOptions options) {
    // Where Python chooses, or looks at the logits, a step cannot be taken before it is asked for.
    options.look_ahead = options.look_ahead && !options.choose && !options.keep_logits &&
                         (!options.constraint || options.constraint->is_native());
    std::shared_ptr<Generation> generation(new Generation(model, std::move(prompt), std::move(options)));
    model->add(generation);
    return generation;
}

Sequence::Sequence(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options)
    : model_(std::move(model)),
      tokens_(std::make_shared<std::vector<int32_t>>(std::move(prompt))),
      n_prompt_(tokens_->size()),
      options_(std::move(options)),
      stops_(options_.stop) {
    if (tokens_->empty()) {
        throw std::invalid_argument("prompt must have at least one token");
    }
    for (size_t i = 0; i < tokens_->size(); ++i) {
        model_->check_token("prompt[" + std::to_string(i) + "]", (*tokens_)[i]);
    }
    if (options_.max_tokens == 0 || options_.max_tokens < -1) {
        throw std::invalid_argument("max_tokens must be at least 1, not " + std::to_string(options_.max_tokens));
    }
    constexpr int32_t most_logprobs = 1000;
    if (options_.n_logprobs < -1 || options_.n_logprobs > most_logprobs) {
        throw std::invalid_argument("logprobs must be 0 to 1000, not " + std::to_string(options_.n_logprobs));
    }
    if (!options_.sampler) {
        options_.sampler = std::make_shared<Sampler>(SamplingOptions{});
    }
    for (const auto & [token, bias] : options_.sampler->options().logit_bias) {
        model_->check_token("logit_bias", token);
    }
    for (const auto & [from, to] : options_.droppable) {
        if (from >= to || to > n_prompt_) {
            throw std::invalid_argument("droppable must be spans of the prompt");
        }
    }
    std::sort(options_.named.begin(), options_.named.end());
}

void Sequence::accept_prompt() {
    for (const int32_t token : *tokens_) {
        options_.sampler->accept(token);
    }
}

void Sequence::release() {
    options_.choose = {};
    options_.constraint = {};
}

void Sequence::drop(uint32_t from, uint32_t to) {
    tokens_->erase(tokens_->begin() + from, tokens_->begin() + to);
    n_prompt_ -= to - from;
}

Generation::Generation(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options)
    : model_(std::move(model)), sequence_(model_, std::move(prompt), std::move(options)) {
    GenerationOptions & checked = sequence_.options();
    context_ = model_->take_context(/*clear =*/!checked.reuse);
    if (!context_->can_drop()) {
        checked.droppable.clear();
    }
    const size_t n_prompt = sequence_.n_prompt();
    if (n_prompt > context_->n_ctx()) {
        const std::string n_ctx = std::to_string(context_->n_ctx());
        model_->give_back(std::move(context_));
        throw ContextFullError("the prompt has " + std::to_string(n_prompt) + " tokens, but the context holds " +
                               n_ctx + "; load the model with a larger n_ctx, or shorten the prompt");
    }
    sequence_.reserve(size_t{context_->n_ctx()} + 1);
    stats_.n_prompt_tokens = n_prompt;
    stats_.breakdown.n_graph_splits = context_->n_graph_splits();
}

Generation::~Generation() {
    stop_ahead();
    if (context_) {
        model_->give_back(std::move(context_));
    }
}

float * Generation::prefill(const Interrupt::Poll & poll, size_t & n_cached) {
    float * logits = nullptr;
    const auto n_prompt = static_cast<uint32_t>(sequence_.n_prompt());
    const bool reuse = sequence_.options().reuse;
    if (reuse) {
        const Turn turn(model_->turns(), interrupt_);
        n_cached = context_->keep(sequence_.tokens());
    }
    auto done = static_cast<uint32_t>(n_cached);
    // The next prompt may differ in its last tokens from this one, which ask for the reply.
    constexpr uint32_t n_of_question = 16;
    const uint32_t to_remember =
        reuse && context_->needs_to_remember() && n_prompt > done + n_of_question ? n_prompt - n_of_question : 0;
    while (done < n_prompt) {
        const uint32_t n = std::min(context_->n_batch(), (done < to_remember ? to_remember : n_prompt) - done);
        // Between two batches other streams have their turn, and close() its chance.
        const Turn turn(model_->turns(), interrupt_);
        // A GPU does not ask during a batch.
        if (interrupt_.cancelled() || (poll && poll())) {
            throw CancelledError("interrupted");
        }
        logits = context_->decode(sequence_.tokens().data() + done, n, interrupt_, poll);
        done += n;
        if (done == to_remember) {
            context_->remember();
        }
    }
    sequence_.accept_prompt();
    return logits;
}

Generation::Step Generation::step(const Interrupt::Poll & poll) {
    const Stopwatch watch;
    Step step;
    float * logits = nullptr;
    if (first_) {
        logits = prefill(poll, step.n_cached);
        first_ = false;
        step.prefill_s = watch.seconds();
    } else {
        Stopwatch waiting;
        const Turn turn(model_->turns(), interrupt_);
        step.times.wait_s = waiting.lap();
        step.n_dropped = context_->n_decoded() == context_->n_ctx() ? make_room() : 0;
        logits = context_->decode(&sequence_.tokens().back(), 1, interrupt_, poll, /*all =*/false, &step.times);
    }
    const bool is_full = context_->n_decoded() == context_->n_ctx() && sequence_.options().droppable.empty();
    step.reason = sequence_.choose(logits, context_, is_full, step.token, step.times);
    if (sequence_.options().keep_logits) {
        step.token.context = context_;
        step.token.logits = logits;
        step.token.n_decodes = context_->n_decodes();
    }
    step.seconds = watch.seconds();
    return step;
}

// Drops the first span of the prompt that may be, and returns how many tokens that were; 0 if none may.
size_t Generation::make_room() {
    auto & droppable = sequence_.options().droppable;
    if (droppable.empty()) {
        return 0;
    }
    const auto [from, to] = droppable.front();
    if (!context_->drop(from, to)) {
        droppable.clear();
        return 0;
    }
    droppable.erase(droppable.begin());
    const uint32_t n = to - from;
    for (auto & [later_from, later_to] : droppable) {
        later_from -= n;
        later_to -= n;
    }
    sequence_.drop(from, to);
    return n;
}

bool Sequence::is_named(int32_t token) const {
    return std::binary_search(options_.named.begin(), options_.named.end(), token);
}

int32_t Sequence::choose_id(float * logits, const std::shared_ptr<Context> & context, Token & token,
                            Breakdown & times) {
    Stopwatch watch;
    const auto n_vocab = static_cast<size_t>(model_->n_vocab());
    Logprobs * logprobs = nullptr;
    if (options_.n_logprobs >= 0) {
        logprobs_.top.resize(static_cast<size_t>(options_.n_logprobs));
        logprobs = &logprobs_;
    }
    std::optional<int32_t> chosen;
    if (options_.choose) {
        chosen = options_.choose({logits, context, tokens_});
        times.python_s += watch.lap();
    }
    if (chosen) {
        model_->check_token("the sampler's answer", *chosen);
        if (options_.constraint && !options_.constraint->allows(*chosen)) {
            throw std::invalid_argument("the sampler's answer: " + std::to_string(*chosen) +
                                        " is not a token that the grammar allows here");
        }
        if (logprobs != nullptr) {
            options_.sampler->measure_logprobs(logits, n_vocab, *chosen, *logprobs);
        }
    } else if (options_.constraint) {
        chosen = options_.constraint->sample(*options_.sampler, logits, n_vocab, logprobs);
    } else {
        chosen = options_.sampler->sample(logits, n_vocab, nullptr, 0, logprobs);
    }
    if (logprobs != nullptr) {
        token.logprob = logprobs->chosen;
        token.top_logprobs = logprobs->top;
    }
    options_.sampler->accept(*chosen);
    if (options_.constraint) {
        options_.constraint->accept(*chosen);
    }
    const bool in_python = options_.constraint && !options_.constraint->is_native();
    (in_python ? times.python_s : times.sample_s) += watch.lap();
    return *chosen;
}

StopReason Sequence::choose(float * logits, const std::shared_ptr<Context> & context, bool is_full, Token & token,
                            Breakdown & times) {
    const auto & vocab = *llama_model_get_vocab(&context->model());
    token.id = choose_id(logits, context, token, times);
    const Stopwatch watch;
    struct Timed {
        const Stopwatch & watch;
        double & seconds;
        ~Timed() { seconds += watch.seconds(); }
    } const timed{watch, times.text_s};
    tokens_->push_back(token.id);
    bytes_.clear();
    append_token_bytes(vocab, token.id, /*special =*/is_named(token.id), bytes_);
    characters_.push(bytes_, token.text);

    StopReason reason = StopReason::none;
    if (llama_vocab_is_eog(&vocab, token.id)) {
        reason = StopReason::eos;
    } else if (static_cast<int64_t>(tokens_->size() - n_prompt_) == options_.max_tokens) {
        reason = StopReason::max_tokens;
    } else if (is_full) {
        reason = StopReason::context_full;
    }
    if (reason != StopReason::none) {
        characters_.flush(token.text);
    }
    bool found = false;
    token.text = stops_.push(std::move(token.text), found);
    if (found) {
        return StopReason::stop_string;
    }
    if (reason != StopReason::none) {
        token.text += stops_.flush();
    }
    return reason;
}

std::optional<Token> Generation::next(const Interrupt::Poll & poll) {
    if (stepping_.load() == std::this_thread::get_id()) {
        throw Error("the stream is in the middle of a step on this very thread");
    }
    const std::lock_guard lock(step_);
    if (!context_) {
        return std::nullopt;
    }
    stepping_.store(std::this_thread::get_id());
    struct Stepped {
        std::atomic<std::thread::id> & thread;
        ~Stepped() { thread.store({}); }
    } const stepped{stepping_};
    // Handing a step to another thread takes some microseconds, so it is done only for callers
    // that take longer than that between two tokens.
    constexpr auto worth_it = std::chrono::microseconds(50);
    const auto away = first_ ? std::chrono::steady_clock::duration{} : std::chrono::steady_clock::now() - returned_at_;
    const bool busy_caller = away > worth_it;
    try {
        Token token = deliver(is_ahead_ ? take_ahead(poll) : step(poll), std::chrono::duration<double>(away).count());
        if (context_ && busy_caller && sequence_.options().look_ahead) {
            start_ahead();
        }
        returned_at_ = std::chrono::steady_clock::now();
        return token;
    } catch (const CancelledError &) {
        const bool by_close = closing_.load();
        finish(by_close ? StopReason::closed : StopReason::interrupted);
        if (by_close) {
            return std::nullopt;
        }
        throw;
    } catch (...) {
        finish(StopReason::error);
        throw;
    }
}

Token Generation::deliver(Step step, double caller_s) {
    {
        const std::lock_guard lock(stats_mutex_);
        stats_.n_cached_tokens += step.n_cached;
        stats_.n_dropped_tokens += step.n_dropped;
        if (stats_.n_tokens++ == 0) {
            stats_.prefill_s = step.prefill_s;
            stats_.time_to_first_token_s = step.seconds;
            n_page_faults_before_ = major_page_faults();
        } else {
            stats_.decode_s += step.seconds;
            stats_.breakdown.add(step.times);
            stats_.breakdown.caller_s += caller_s;
        }
    }
    if (step.reason != StopReason::none) {
        finish(step.reason);
    }
    return std::move(step.token);
}

void Generation::finish(StopReason reason) {
    stop_ahead();
    {
        const std::lock_guard lock(stats_mutex_);
        stats_.breakdown.n_major_page_faults = page_faults();
        stats_.stop_reason = reason;
    }
    // What was asked of Python is let go of by the thread that came from there.
    sequence_.release();
    model_->give_back(std::move(context_));
}

void Generation::close(StopReason reason) {
    closing_.store(true);
    interrupt_.cancel();
    if (stepping_.load() == std::this_thread::get_id()) {
        return;  // the step ends by itself
    }
    const std::lock_guard lock(step_);
    if (context_) {
        finish(reason);
        return;
    }
    const std::lock_guard stats_lock(stats_mutex_);
    if (stats_.stop_reason == StopReason::closed && reason == StopReason::interrupted) {
        stats_.stop_reason = reason;
    }
}

// --- The step ahead -----------------------------------------------------------------------------

void Generation::start_ahead() {
    is_ahead_ = true;
    {
        const std::lock_guard lock(ahead_mutex_);
        ahead_ = Ahead::wanted;
    }
    if (ahead_thread_.joinable()) {
        ahead_changed_.notify_all();
    } else {
        try {
            ahead_thread_ = std::thread([this] { work_ahead(); });
        } catch (const std::system_error &) {
            is_ahead_ = false;  // no thread is to be had: so it waits to be asked
            sequence_.options().look_ahead = false;
        }
    }
}

void Generation::work_ahead() {
    std::unique_lock lock(ahead_mutex_);
    while (true) {
        ahead_changed_.wait(lock, [this] { return ahead_ == Ahead::wanted || ahead_ == Ahead::over; });
        if (ahead_ == Ahead::over) {
            return;
        }
        lock.unlock();
        Step done;
        std::exception_ptr error;
        try {
            done = step({});
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        ahead_step_ = std::move(done);
        ahead_error_ = error;
        if (ahead_ == Ahead::wanted) {
            ahead_ = Ahead::done;
        }
        ahead_changed_.notify_all();
    }
}

Generation::Step Generation::take_ahead(const Interrupt::Poll & poll) {
    constexpr auto interval = std::chrono::milliseconds(50);
    bool stopped = false;
    std::unique_lock lock(ahead_mutex_);
    while (!ahead_changed_.wait_for(lock, interval, [this] { return ahead_ == Ahead::done; })) {
        lock.unlock();  // the question may take the GIL
        if (!stopped && poll && poll()) {
            stopped = true;
            interrupt_.cancel();
        }
        lock.lock();
    }
    ahead_ = Ahead::idle;
    is_ahead_ = false;
    if (ahead_error_) {
        std::rethrow_exception(std::exchange(ahead_error_, nullptr));
    }
    if (stopped) {
        throw CancelledError("interrupted");  // though the step came to its end
    }
    return std::move(ahead_step_);
}

void Generation::stop_ahead() {
    if (!ahead_thread_.joinable()) {
        return;
    }
    interrupt_.cancel();  // what it works on will not be wanted
    {
        const std::lock_guard lock(ahead_mutex_);
        ahead_ = Ahead::over;
    }
    ahead_changed_.notify_all();
    ahead_thread_.join();
}

// Since the first token.
int64_t Generation::page_faults() const {
    const int64_t now = stats_.n_tokens > 0 ? major_page_faults() : 0;
    return now < 0 ? now : now - n_page_faults_before_;
}

GenerationStats Generation::stats() const {
    const std::lock_guard lock(stats_mutex_);
    GenerationStats stats = stats_;
    if (stats.stop_reason == StopReason::none) {
        stats.breakdown.n_major_page_faults = page_faults();
    }
    return stats;
}

}  // namespace overspill
