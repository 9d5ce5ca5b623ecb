#include "generate/sequence.h"

#include "base/stopwatch.h"
#include "model/vocabulary.h"
#include "sample/grammar.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace overspill {

namespace {

std::vector<std::string> all_stops(const GenerationOptions & options) {
    std::vector<std::string> stops = options.stop;
    stops.insert(stops.end(), options.form.stop.begin(), options.form.stop.end());
    return stops;
}

}  // namespace

Sequence::Sequence(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options)
    : model_(std::move(model)),
      loaded_(model_->loaded()),
      tokens_(std::make_shared<std::vector<int32_t>>(std::move(prompt))),
      n_prompt_(tokens_->size()),
      options_(std::move(options)),
      stops_(all_stops(options_)),
      threads_(*model_) {
    model_->check_tokens("prompt", *tokens_);
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
    for (const auto & [from, to] : options_.form.droppable) {
        if (from >= to || to > n_prompt_) {
            throw std::invalid_argument("droppable must be spans of the prompt");
        }
    }
    std::sort(options_.form.named.begin(), options_.form.named.end());
    constrain();
}

void Sequence::constrain() {
    const int n_constraints =
        (options_.grammar ? 1 : 0) + (options_.form.grammar ? 1 : 0) + (options_.constraint ? 1 : 0);
    if (n_constraints > 1) {
        throw std::invalid_argument("give either tools or grammar: calls to tools have a grammar of their own");
    }
    if (options_.grammar) {
        options_.constraint = std::make_shared<Grammar>(model_->loaded(), *options_.grammar, Grammar::Start{});
    } else if (options_.form.grammar) {
        options_.constraint = std::make_shared<Grammar>(model_->loaded(), *options_.form.grammar, options_.form.start,
                                                        options_.form.named);
    }
}

void Sequence::ModelThreads::run(const Pass & pass) {
    Turns & turns = model_.turns();
    std::unique_lock<Turns> turn;
    if (!turns.owned_here()) {  // as it is in a step of a batch
        turn = std::unique_lock(turns, std::try_to_lock);
    }
    if (!turns.is_here() || !turns.owned_here() || threads_->failed()) {
        pass(0, 1);
        return;
    }
    threads_->run(pass);
}

// Before the first token, so that penalties count the prompt.
void Sequence::accept_prompt() {
    has_accepted_prompt_ = true;
    for (const int32_t token : *tokens_) {
        options_.sampler->accept(token);
    }
}

void Sequence::release() {
    options_.choose = {};
    options_.constraint = {};
    loaded_.reset();
}

void Sequence::drop(uint32_t from, uint32_t to) {
    tokens_->erase(tokens_->begin() + from, tokens_->begin() + to);
    n_prompt_ -= to - from;
}

bool Sequence::is_named(int32_t token) const {
    return std::binary_search(options_.form.named.begin(), options_.form.named.end(), token);
}

int32_t Sequence::choose_id(const StepLogits & given, Token & token, Breakdown & times,
                            const Constraint::ShouldStop & should_stop) {
    Stopwatch watch;
    threads_.use(given.threads.get());
    const bool can_help = given.threads->size() > 1;
    const LogitsRow row{given.logits, static_cast<size_t>(model_->n_vocab()), can_help ? &threads_ : nullptr};
    Logprobs * logprobs = nullptr;
    if (options_.n_logprobs >= 0) {
        logprobs_.top.resize(static_cast<size_t>(options_.n_logprobs));
        logprobs = &logprobs_;
    }
    std::optional<int32_t> chosen;
    if (options_.choose) {
        chosen = options_.choose({given.logits, row.n, given.owner, tokens_});
        times.python_s += watch.lap();
    }
    if (chosen) {
        model_->check_token("the sampler's answer", *chosen);
        if (options_.constraint && !options_.constraint->allows(*chosen, should_stop)) {
            throw std::invalid_argument("the sampler's answer: " + std::to_string(*chosen) +
                                        " is not a token that the grammar allows here");
        }
        if (logprobs != nullptr) {
            options_.sampler->measure_logprobs(row, *chosen, *logprobs);
        }
    } else if (options_.constraint) {
        chosen = options_.constraint->sample(*options_.sampler, row, logprobs, should_stop);
    } else {
        chosen = options_.sampler->sample(row, nullptr, 0, logprobs);
    }
    if (logprobs != nullptr) {
        token.logprob = logprobs->chosen;
        token.top_logprobs = logprobs->top;
    }
    options_.sampler->accept(*chosen);
    if (options_.constraint) {
        options_.constraint->accept(*chosen, should_stop);
    }
    const bool in_python = options_.constraint && !options_.constraint->is_native();
    (in_python ? times.python_s : times.sample_s) += watch.lap();
    return *chosen;
}

StopReason Sequence::choose(const StepLogits & row, bool is_full, Token & token, Breakdown & times,
                            const Constraint::ShouldStop & should_stop) {
    const auto & vocab = *llama_model_get_vocab(loaded_.get());
    if (!has_accepted_prompt_) {
        accept_prompt();
    }
    token.id = choose_id(row, token, times, should_stop);
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

}  // namespace overspill
