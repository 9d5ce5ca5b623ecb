#include "generation.h"

#include "error.h"
#include "model.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <utility>

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

class Stopwatch {
  public:
    double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

  private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point start_ = Clock::now();
};

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
    std::shared_ptr<Generation> generation(new Generation(model, std::move(prompt), std::move(options)));
    model->add(generation);
    return generation;
}

Generation::Generation(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options)
    : model_(std::move(model)),
      prompt_(std::move(prompt)),
      options_(std::move(options)),
      sampler_(options_.sampling, model_->n_vocab(), static_cast<int32_t>(model_->n_ctx())),
      stops_(options_.stop) {
    if (prompt_.empty()) {
        throw std::invalid_argument("prompt must have at least one token");
    }
    for (size_t i = 0; i < prompt_.size(); ++i) {
        model_->check_token("prompt[" + std::to_string(i) + "]", prompt_[i]);
    }
    if (options_.max_tokens == 0 || options_.max_tokens < -1) {
        throw std::invalid_argument("max_tokens must be at least 1, not " + std::to_string(options_.max_tokens));
    }
    context_ = model_->take_context();
    if (prompt_.size() > context_->n_ctx()) {
        const std::string n_ctx = std::to_string(context_->n_ctx());
        model_->give_back(std::move(context_));
        throw ContextFullError("the prompt has " + std::to_string(prompt_.size()) + " tokens, but the context holds " +
                               n_ctx + "; load the model with a larger n_ctx, or shorten the prompt");
    }
    stats_.n_prompt_tokens = prompt_.size();
}

Generation::~Generation() {
    if (context_) {
        model_->give_back(std::move(context_));
    }
}

const float * Generation::prefill(const Interrupt::Poll & poll) {
    const float * logits = nullptr;
    const auto n_prompt = static_cast<uint32_t>(prompt_.size());
    for (uint32_t done = 0; done < n_prompt;) {
        const uint32_t n = std::min(context_->n_batch(), n_prompt - done);
        // Between two batches other streams have their turn, and close() its chance.
        const std::lock_guard turn(model_->turns());
        // A GPU does not ask during a batch.
        if (interrupt_.cancelled() || (poll && poll())) {
            throw CancelledError("interrupted");
        }
        logits = context_->decode(prompt_.data() + done, n, interrupt_, poll);
        done += n;
    }
    for (const int32_t token : prompt_) {
        sampler_.accept(token);
    }
    return logits;
}

std::optional<Token> Generation::next(const Interrupt::Poll & poll) {
    if (stepping_.load() == std::this_thread::get_id()) {
        throw Error("the stream is in the middle of a step on this very thread");
    }
    const std::lock_guard step(step_);
    if (!context_) {
        return std::nullopt;
    }
    stepping_.store(std::this_thread::get_id());
    struct Stepped {
        std::atomic<std::thread::id> & thread;
        ~Stepped() { thread.store({}); }
    } const stepped{stepping_};
    try {
        const Stopwatch watch;
        const bool first = last_token_ < 0;
        const float * logits = nullptr;
        double prefill_s = 0;
        if (first) {
            logits = prefill(poll);
            prefill_s = watch.seconds();
        } else {
            const std::lock_guard turn(model_->turns());
            logits = context_->decode(&last_token_, 1, interrupt_, poll);
        }
        Token token = take_token(logits);
        const double seconds = watch.seconds();
        const std::lock_guard lock(stats_mutex_);
        if (first) {
            stats_.prefill_s = prefill_s;
            stats_.time_to_first_token_s = seconds;
        } else {
            stats_.decode_s += seconds;
        }
        return token;
    } catch (const CancelledError &) {
        const bool by_close = interrupt_.cancelled();
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

Token Generation::take_token(const float * logits) {
    const auto & vocab = *llama_model_get_vocab(&context_->model());
    Token token{sampler_.sample(logits), {}, {}};
    sampler_.accept(token.id);
    last_token_ = token.id;
    if (options_.logprobs) {
        token.logprob = log_probability(logits, static_cast<size_t>(model_->n_vocab()), token.id);
    }
    bytes_.clear();
    append_token_bytes(vocab, token.id, /*special =*/false, bytes_);
    characters_.push(bytes_, token.text);

    int64_t n_tokens = 0;
    {
        const std::lock_guard lock(stats_mutex_);
        n_tokens = ++stats_.n_tokens;
    }
    StopReason reason = StopReason::none;
    if (llama_vocab_is_eog(&vocab, token.id)) {
        reason = StopReason::eos;
    } else if (n_tokens == options_.max_tokens) {
        reason = StopReason::max_tokens;
    } else if (context_->n_decoded() == context_->n_ctx()) {
        reason = StopReason::context_full;
    }
    if (reason != StopReason::none) {
        characters_.flush(token.text);
    }
    bool found = false;
    token.text = stops_.push(std::move(token.text), found);
    if (found) {
        reason = StopReason::stop_string;
    } else if (reason != StopReason::none) {
        token.text += stops_.flush();
    }
    if (reason != StopReason::none) {
        finish(reason);
    }
    return token;
}

void Generation::finish(StopReason reason) {
    {
        const std::lock_guard lock(stats_mutex_);
        stats_.stop_reason = reason;
    }
    model_->give_back(std::move(context_));
}

void Generation::close(StopReason reason) {
    interrupt_.cancel();
    if (stepping_.load() == std::this_thread::get_id()) {
        return;  // the step ends by itself
    }
    const std::lock_guard step(step_);
    if (context_) {
        finish(reason);
        return;
    }
    const std::lock_guard lock(stats_mutex_);
    if (stats_.stop_reason == StopReason::closed && reason == StopReason::interrupted) {
        stats_.stop_reason = reason;
    }
}

GenerationStats Generation::stats() const {
    const std::lock_guard lock(stats_mutex_);
    return stats_;
}

}  // namespace overspill
