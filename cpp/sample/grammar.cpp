#include "sample/grammar.h"

#include "base/activity.h"
#include "base/error.h"
#include "base/error_capture.h"

#include <llama-grammar.h>

#include <algorithm>
#include <cctype>
#include <stdexcept>
#include <utility>

namespace overspill {

namespace {

[[noreturn]] void refuse(const std::string & gbnf, size_t at, const std::string & why) {
    const auto line = 1 + std::count(gbnf.begin(), gbnf.begin() + static_cast<std::ptrdiff_t>(at), '\n');
    const size_t begin = at == 0 ? 0 : gbnf.rfind('\n', at - 1) + 1;  // npos + 1 is 0
    std::string text = gbnf.substr(begin, gbnf.find('\n', begin) - begin);
    throw std::invalid_argument("grammar, line " + std::to_string(line) + ", column " + std::to_string(at - begin + 1) +
                                ": " + why + ": " + text);
}

size_t skip_space(const std::string & gbnf, size_t at) {
    while (at < gbnf.size() && (std::isspace(static_cast<unsigned char>(gbnf[at])) != 0 || gbnf[at] == '#')) {
        at = gbnf[at] == '#' ? std::min(gbnf.find('\n', at), gbnf.size()) : at + 1;
    }
    return at;
}

// The loader of llama.cpp prints what is wrong. Its parser throws it, rule by rule.
void check_gbnf([[maybe_unused]] const llama_vocab & vocab, const std::string & gbnf) {
    if (gbnf.find('\0') != std::string::npos) {
        refuse(gbnf, gbnf.find('\0'), "a NUL character");
    }
#ifndef _WIN32  // where the library exports llama.h's names only
    llama_grammar_parser parser(&vocab);
    size_t at = skip_space(gbnf, 0);
    while (at < gbnf.size()) {
        try {
            const auto next = static_cast<size_t>(parser.parse_rule(gbnf.c_str() + at) - gbnf.c_str());
            at = skip_space(gbnf, next);
        } catch (const std::exception & error) {
            // Most messages end with the rest of the grammar, which says where.
            std::string why = error.what();
            const size_t rest = why.find(" at ");
            if (rest != std::string::npos && gbnf.size() >= why.size() - rest - 4 &&
                gbnf.compare(gbnf.size() - (why.size() - rest - 4), std::string::npos, why, rest + 4) == 0) {
                at = gbnf.size() - (why.size() - rest - 4);
                why.resize(rest);
            }
            refuse(gbnf, at, why);
        }
    }
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id >= parser.rules.size() || parser.rules[id].empty()) {
            refuse(gbnf, std::min(gbnf.find(name), gbnf.size()), "the rule " + name + " is not defined");
        }
    }
    if (parser.symbol_ids.find("root") == parser.symbol_ids.end()) {
        throw std::invalid_argument("grammar: there is no rule named root, with which it would start");
    }
#endif
}

}  // namespace

Grammar::Grammar(std::shared_ptr<llama_model> model, const std::string & gbnf, const Start & start)
    : model_(std::move(model)) {
    const llama_vocab & vocab = *llama_model_get_vocab(model_.get());
    if (llama_vocab_type(&vocab) == LLAMA_VOCAB_TYPE_NONE) {
        throw Error("a grammar needs a model with a tokenizer");
    }
    check_gbnf(vocab, gbnf);
    const Activity activity("compiling a grammar");
    const ErrorCapture errors;
    if (start.trigger_patterns.empty() && start.trigger_tokens.empty()) {
        grammar_.reset(llama_sampler_init_grammar(&vocab, gbnf.c_str(), "root"));
    } else {
        is_lazy_ = true;
        std::vector<const char *> patterns;
        for (const std::string & pattern : start.trigger_patterns) {
            patterns.push_back(pattern.c_str());
        }
        grammar_.reset(llama_sampler_init_grammar_lazy_patterns(&vocab, gbnf.c_str(), "root", patterns.data(),
                                                                patterns.size(), start.trigger_tokens.data(),
                                                                start.trigger_tokens.size()));
    }
    if (!grammar_) {
        throw std::invalid_argument("grammar: " + errors.reason("it cannot be compiled"));
    }
    try {
        for (const int32_t token : start.begun) {
            accept(token);
        }
    } catch (const std::exception & error) {
        throw Error("the grammar does not go on from what asks for the reply: " + std::string(error.what()));
    }
}

bool Grammar::allows(int32_t token) {
    if (!grammar_) {
        return true;
    }
    llama_token_data candidate{token, 0.0F, 0.0F};
    llama_token_data_array candidates{&candidate, 1, -1, false};
    llama_sampler_apply(grammar_.get(), &candidates);
    return candidate.logit == 0.0F;
}

void Grammar::accept(int32_t token) {
    if (!grammar_) {
        return;
    }
    // Upstream would abort.
    if (llama_vocab_is_eog(llama_model_get_vocab(model_.get()), token) && !allows(token)) {
        throw Error("the reply ends where its grammar does not");
    }
    try {
        llama_sampler_accept(grammar_.get(), token);
    } catch (const std::exception & error) {
        // The token that begins what a lazy grammar is for may have begun something else.
        if (!is_lazy_) {
            throw Error("the reply left its grammar: " + std::string(error.what()));
        }
        grammar_.reset();
    }
}

void Grammar::find_allowed(size_t n) {
    candidates_.resize(n);
    for (size_t i = 0; i < n; ++i) {
        candidates_[i] = {static_cast<llama_token>(i), 0.0F, 0.0F};
    }
    llama_token_data_array candidates{candidates_.data(), n, -1, false};
    llama_sampler_apply(grammar_.get(), &candidates);
    bits_.assign((n + 31) / 32, 0U);
    for (size_t i = 0; i < n; ++i) {
        if (candidates_[i].logit == 0.0F) {
            bits_[i / 32] |= 1U << (i % 32);
        }
    }
}

int32_t Grammar::sample(Sampler & sampler, const float * logits, size_t n, Logprobs * logprobs) {
    // To ask about one token costs a microsecond, about the whole vocabulary many milliseconds. So draw,
    // ask, and draw again without those that were refused: the first that is allowed comes up as
    // often as if only allowed ones had been drawn from, where nothing truncates.
    constexpr int n_tries = 64;
    bits_.assign((n + 31) / 32, ~0U);
    const bool each_draw_counts = sampler.options().mirostat != 0;
    for (int i = 0; i < n_tries && !each_draw_counts; ++i) {
        const int32_t token = sampler.sample(logits, n, i == 0 ? nullptr : bits_.data(), bits_.size());
        if (allows(token)) {
            if (logprobs != nullptr) {
                sampler.measure_logprobs(logits, n, token, *logprobs);
            }
            return token;
        }
        bits_[static_cast<size_t>(token) / 32] &= ~(1U << (static_cast<uint32_t>(token) % 32));
    }
    find_allowed(n);
    return sampler.sample(logits, n, bits_.data(), bits_.size(), logprobs);
}

}  // namespace overspill
