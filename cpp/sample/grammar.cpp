#include "sample/grammar.h"

#include "base/error.h"
#include "model/vocabulary.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace overspill {

Grammar::Grammar(std::shared_ptr<llama_model> model, const std::string & gbnf, const Start & start,
                 std::vector<int32_t> named)
    : model_(std::move(model)),
      vocab_(*llama_model_get_vocab(model_.get())),
      named_(std::move(named)),
      trigger_tokens_(start.trigger_tokens),
      is_lazy_(!start.trigger_patterns.empty() || !start.trigger_tokens.empty()),
      waits_(is_lazy_) {
    if (llama_vocab_type(&vocab_) == LLAMA_VOCAB_TYPE_NONE) {
        throw Error("a grammar needs a model with a tokenizer");
    }
    matcher_.emplace(parse_gbnf(vocab_, gbnf));
    named_.insert(named_.end(), trigger_tokens_.begin(), trigger_tokens_.end());
    std::sort(named_.begin(), named_.end());
    for (const std::string & pattern : start.trigger_patterns) {
        const bool is_whole = !pattern.empty() && pattern.front() == '^' && pattern.back() == '$';
        triggers_.push_back({std::regex(pattern), is_whole});
    }
    for (const int32_t token : start.begun) {
        if (waits_) {
            wait(token, {});
        } else if (!matcher_->accept(token, text_of(token, /*is_named =*/true))) {
            throw Error("the grammar does not go on from what asks for the reply");
        }
    }
}

const std::string & Grammar::text_of(int32_t token, bool is_named) {
    text_.clear();
    append_token_bytes(vocab_, token, is_named, text_);
    return text_;
}

const std::string & Grammar::text_of(int32_t token) {
    return text_of(token, std::binary_search(named_.begin(), named_.end(), token));
}

bool Grammar::allows(int32_t token, const ShouldStop & should_stop) {
    if (!matcher_ || waits_) {
        return true;
    }
    return is_end(token) ? matcher_->may_end() : matcher_->allows(token, text_of(token), should_stop);
}

void Grammar::accept(int32_t token, const ShouldStop & should_stop) {
    if (!matcher_) {
        return;
    }
    if (waits_) {
        wait(token, should_stop);
    } else if (is_end(token)) {
        if (!matcher_->may_end()) {
            throw Error("the reply ends where its grammar does not");
        }
    } else {
        follow(token, text_of(token), should_stop);
    }
}

bool Grammar::follow(int32_t token, std::string_view text, const ShouldStop & should_stop) {
    if (matcher_->accept(token, text, should_stop)) {
        return true;
    }
    // The token that begins what a lazy grammar is for may have begun something else.
    if (!is_lazy_) {
        throw Error("the reply left its grammar");
    }
    matcher_.reset();
    return false;
}

// Looks for what the grammar holds from; it then follows what came after the beginning of that.
void Grammar::wait(int32_t token, const ShouldStop & should_stop) {
    if (std::find(trigger_tokens_.begin(), trigger_tokens_.end(), token) != trigger_tokens_.end()) {
        waits_ = false;
        follow(token, text_of(token), should_stop);
        return;
    }
    const size_t n_before = before_.size();
    before_ += text_of(token);
    pieces_.push_back({token, before_.size()});
    const std::optional<size_t> start = find_trigger(n_before);
    if (!start) {
        return;
    }
    waits_ = false;
    size_t begin = 0;
    for (const Piece & piece : pieces_) {
        const size_t from = std::max(begin, *start);
        if (piece.end > *start &&
            !follow(piece.token, std::string_view(before_).substr(from, piece.end - from), should_stop)) {
            break;
        }
        begin = piece.end;
    }
    before_.clear();
    pieces_.clear();
}

// The first `n_known` bytes have none. Triggers are marks, and names between them; so only so much of these can belong
// to one, and the work for a token does not grow with the reply.
std::optional<size_t> Grammar::find_trigger(size_t n_known) const {
    constexpr size_t longest = 1024;
    size_t from = n_known - std::min(n_known, longest);
    while (from < n_known && (static_cast<unsigned char>(before_[from]) & 0xC0U) == 0x80U) {
        ++from;
    }
    const auto begin = before_.begin() + static_cast<std::ptrdiff_t>(from);
    const auto flags = from == 0 ? std::regex_constants::match_default : std::regex_constants::match_not_bol;
    for (const Trigger & trigger : triggers_) {
        if (trigger.is_whole && from > 0) {
            continue;
        }
        std::smatch match;
        if (trigger.is_whole ? std::regex_match(begin, before_.end(), match, trigger.pattern)
                             : std::regex_search(begin, before_.end(), match, trigger.pattern, flags)) {
            for (size_t i = 1; i < match.size(); ++i) {
                if (match.length(i) > 0) {
                    return from + static_cast<size_t>(match.position(i));
                }
            }
            return from + static_cast<size_t>(match.position(0));
        }
    }
    return std::nullopt;
}

void Grammar::find_allowed(size_t n, const ShouldStop & should_stop) {
    if (!matcher_ || waits_) {
        bits_.assign((n + 31) / 32, ~0U);
        return;
    }
    bits_.assign((n + 31) / 32, 0U);
    const auto allow = [this](int32_t token) {
        bits_[static_cast<size_t>(token) / 32] |= 1U << (static_cast<uint32_t>(token) % 32);
    };
    matcher_->find_allowed(texts(n), allow, should_stop);
    for (const int32_t token : ends_) {
        if (matcher_->may_end()) {
            allow(token);
        }
    }
}

const TokenTexts & Grammar::texts(size_t n) {
    if (texts_.size() == 0 && ends_.empty()) {
        for (size_t i = 0; i < n; ++i) {
            const auto token = static_cast<int32_t>(i);
            if (is_end(token)) {
                ends_.push_back(token);
            } else {
                texts_.add(token, text_of(token));
            }
        }
        texts_.sort();
    }
    return texts_;
}

int32_t Grammar::sample(Sampler & sampler, const LogitsRow & row, Logprobs * logprobs, const ShouldStop & should_stop) {
    // To ask about one token costs a microsecond, about the whole vocabulary many milliseconds. So draw,
    // ask, and draw again without those that were refused: the first that is allowed comes up as
    // often as if only allowed ones had been drawn from, where nothing truncates.
    constexpr int n_tries = 64;
    bits_.assign((row.n + 31) / 32, ~0U);
    const bool each_draw_counts = sampler.options().mirostat != 0;
    for (int i = 0; i < n_tries && !each_draw_counts; ++i) {
        const int32_t token = sampler.sample(row, i == 0 ? nullptr : bits_.data(), bits_.size());
        if (allows(token, should_stop)) {
            if (logprobs != nullptr) {
                sampler.measure_logprobs(row, token, *logprobs);
            }
            return token;
        }
        bits_[static_cast<size_t>(token) / 32] &= ~(1U << (static_cast<uint32_t>(token) % 32));
    }
    find_allowed(row.n, should_stop);
    return sampler.sample(row, bits_.data(), bits_.size(), logprobs);
}

}  // namespace overspill
