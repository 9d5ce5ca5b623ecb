// What may come next, by a grammar.
#pragma once

#include "sample/constraint.h"

#include <llama.h>

#include <cstdint>
#include <memory>
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
    // Throws std::invalid_argument that names the place in the grammar. Keeps the model alive.
    Grammar(std::shared_ptr<llama_model> model, const std::string & gbnf, const Start & start);

    int32_t sample(Sampler & sampler, const float * logits, size_t n, Logprobs * logprobs) override;
    bool allows(int32_t token) override;
    void accept(int32_t token) override;
    bool is_native() const override { return true; }

  private:
    struct Deleter {
        void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
    };
    void find_allowed(size_t n);

    std::shared_ptr<llama_model> model_;
    std::unique_ptr<llama_sampler, Deleter> grammar_;  // empty once a lazy one was left
    bool is_lazy_ = false;
    std::vector<uint32_t> bits_;
    std::vector<llama_token_data> candidates_;
};

}  // namespace overspill
