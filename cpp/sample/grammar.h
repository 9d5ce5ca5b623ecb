// What may come next, by a grammar.
#pragma once

#include "sample/constraint.h"
#include "sample/grammar_matcher.h"

#include <llama.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <regex>
#include <string>
#include <vector>

namespace overspill {

// A grammar in llama.cpp's GBNF, whose start symbol is `root`.
class Grammar : public Constraint {
  public:
    struct Start {
        // The grammar holds from the match of one of these regular expressions (its first group, if it has one) or
        // one of these tokens on; from the start, if there are none.
        std::vector<std::string> trigger_patterns = {};
        std::vector<int32_t> trigger_tokens = {};
        std::vector<int32_t> begun = {};  // what has come of it already
    };
    // `named` are special tokens whose names are text of the reply. Others have no text, so only a grammar that names
    // the token lets them through. Throws std::invalid_argument that names the place in the grammar. Keeps the model
    // alive.
    Grammar(std::shared_ptr<llama_model> model, const std::string & gbnf, const Start & start,
            std::vector<int32_t> named = {});

    int32_t sample(Sampler & sampler, const LogitsRow & row, Logprobs * logprobs,
                   const ShouldStop & should_stop) override;
    bool allows(int32_t token, const ShouldStop & should_stop) override;
    void accept(int32_t token, const ShouldStop & should_stop) override;
    bool is_native() const override { return true; }

  private:
    struct Trigger {
        std::regex pattern;
        bool is_whole;  // it has to match all that has come
    };
    struct Piece {
        int32_t token;
        size_t end;  // in `before_`
    };
    const std::string & text_of(int32_t token, bool is_named);
    const std::string & text_of(int32_t token);
    bool is_end(int32_t token) const { return llama_vocab_is_eog(&vocab_, token); }
    void wait(int32_t token, const ShouldStop & should_stop);
    std::optional<size_t> find_trigger(size_t n_known) const;
    bool follow(int32_t token, std::string_view text, const ShouldStop & should_stop);
    void find_allowed(size_t n, const ShouldStop & should_stop);
    const TokenTexts & texts(size_t n);

    std::shared_ptr<llama_model> model_;
    const llama_vocab & vocab_;
    std::optional<GrammarMatcher> matcher_;  // none once a lazy grammar was left
    std::vector<int32_t> named_;
    std::vector<Trigger> triggers_;
    std::vector<int32_t> trigger_tokens_;
    bool is_lazy_ = false;
    bool waits_ = false;  // for what triggers a lazy grammar
    std::string before_;  // what has come before that
    std::vector<Piece> pieces_;
    std::string text_;  // of one token, kept for its memory
    std::vector<uint32_t> bits_;
    TokenTexts texts_;           // of all tokens but those that end a reply, once they were asked for
    std::vector<int32_t> ends_;  // those
};

}  // namespace overspill
