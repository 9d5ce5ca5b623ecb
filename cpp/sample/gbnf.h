// Grammars in llama.cpp's GBNF: their text becomes rules.
#pragma once

#include <llama.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace overspill {

// Unicode scalar values: code points without surrogates, which no text has.
class CharacterSet {
  public:
    using Range = std::pair<uint32_t, uint32_t>;  // both ends belong to it

    CharacterSet(std::vector<Range> ranges, bool negated);
    bool empty() const { return ranges_.empty(); }
    bool has(uint32_t character) const {
        return character < 128 ? (ascii_[character / 64] >> (character % 64) & 1U) != 0 : meets(character, character);
    }
    bool meets(uint32_t low, uint32_t high) const;
    const std::vector<Range> & ranges() const { return ranges_; }

  private:
    std::vector<Range> ranges_;  // in order, disjoint
    std::array<uint64_t, 2> ascii_{};
};

struct GrammarRules {
    enum class Kind : uint8_t { end, rule, characters, token, other_token };
    struct Step {
        Kind kind;
        uint32_t value;  // a rule, a place in `sets`, or a token
    };
    struct Alternatives {
        uint32_t begin, end;  // in `starts`
    };

    std::vector<Step> steps;       // each alternative's, up to an `end`
    std::vector<uint32_t> starts;  // of alternatives, in `steps`
    std::vector<Alternatives> rules;
    std::vector<CharacterSet> sets;
    uint32_t root = 0;
    // Whatever has begun can be finished: alternatives that no text fits are left out.
};

// Grammars have at most this many steps: characters of literals, classes, names and tokens, each counted as often
// as it is repeated.
constexpr size_t most_grammar_steps = 1'000'000;
constexpr size_t most_grammar_nesting = 500;  // of parentheses

// Throws std::invalid_argument that names the place in the grammar.
GrammarRules parse_gbnf(const llama_vocab & vocab, const std::string & gbnf);

}  // namespace overspill
