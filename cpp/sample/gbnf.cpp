#include "sample/gbnf.h"

#include "model/vocabulary.h"

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>

namespace overspill {

namespace {

using Kind = GrammarRules::Kind;
using Step = GrammarRules::Step;
using Sequence = std::vector<Step>;

constexpr uint32_t last_character = 0x10FFFF;
constexpr uint32_t first_surrogate = 0xD800;
constexpr uint32_t last_surrogate = 0xDFFF;

[[noreturn]] void refuse(const std::string & gbnf, size_t at, const std::string & why) {
    constexpr size_t shown = 100;
    at = std::min(at, gbnf.size());
    const auto line = 1 + std::count(gbnf.begin(), gbnf.begin() + static_cast<std::ptrdiff_t>(at), '\n');
    const size_t begin = at == 0 ? 0 : gbnf.rfind('\n', at - 1) + 1;  // npos + 1 is 0
    std::string text = gbnf.substr(begin, gbnf.find('\n', begin) - begin);
    if (text.size() > shown) {
        // Whole characters only: the text goes into an exception.
        size_t end = shown;
        while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) {
            --end;
        }
        text = text.substr(0, end) + " ...";
    }
    throw std::invalid_argument("grammar, line " + std::to_string(line) + ", column " + std::to_string(at - begin + 1) +
                                ": " + why + ": " + text);
}

bool is_digit(char c) {
    return '0' <= c && c <= '9';
}

bool is_word(char c) {
    return ('a' <= c && c <= 'z') || ('A' <= c && c <= 'Z') || c == '-' || is_digit(c);
}

// Rules as they are read, before those without a text are left out.
class Parser {
  public:
    Parser(const llama_vocab & vocab, const std::string & gbnf) : vocab_(vocab), gbnf_(gbnf) {}

    GrammarRules parse() {
        if (gbnf_.find('\0') != std::string::npos) {
            fail(gbnf_.find('\0'), "a NUL character");
        }
        skip_space(true);
        while (at_ < gbnf_.size()) {
            read_rule();
        }
        for (const auto & [name, rule] : named_) {
            if (!rules_[rule.id].is_defined) {
                fail(rule.at, "the rule " + std::string(name) + " is not defined");
            }
        }
        const auto root = named_.find("root");
        if (root == named_.end()) {
            throw std::invalid_argument("grammar: there is no rule named root, with which it would start");
        }
        return finish(root->second.id);
    }

  private:
    struct Rule {
        std::vector<Sequence> alternatives = {};
        bool is_defined = false;
    };
    struct Named {
        uint32_t id;
        size_t at;  // where it comes first
    };

    [[noreturn]] void fail(size_t at, const std::string & why) const { refuse(gbnf_, at, why); }

    // Users do not know the rules of schemas, whose names begin with this.
    std::string origin() const {
        const auto rule = named_.lower_bound("fits");
        const bool is_of_schema = rule != named_.end() && rule->first.substr(0, 4) == "fits";
        return !is_of_schema ? "grammar" : rule->first == "fits" ? "json_schema" : "tools";
    }

    char look(size_t ahead = 0) const { return at_ + ahead < gbnf_.size() ? gbnf_[at_ + ahead] : '\0'; }

    void skip_space(bool with_lines) {
        for (;; ++at_) {
            if (look() == '#') {
                at_ = std::min(gbnf_.find_first_of("\r\n", at_), gbnf_.size());
            }
            const char c = look();
            if (c != ' ' && c != '\t' && !(with_lines && (c == '\r' || c == '\n'))) {
                return;
            }
        }
    }

    std::string_view read_name() {
        const size_t begin = at_;
        while (is_word(look())) {
            ++at_;
        }
        if (at_ == begin) {
            fail(at_, "expecting name");
        }
        return std::string_view(gbnf_).substr(begin, at_ - begin);
    }

    uint32_t add_rule() {
        rules_.emplace_back();
        return static_cast<uint32_t>(rules_.size() - 1);
    }

    uint32_t named(std::string_view name, size_t at) {
        const auto found = named_.find(name);
        return found != named_.end() ? found->second.id : named_.emplace(name, Named{add_rule(), at}).first->second.id;
    }

    void count(size_t n_steps, size_t at) {
        n_steps_ += n_steps;
        if (n_steps_ > most_grammar_steps && origin() != "grammar") {
            throw std::invalid_argument(
                origin() + ": the grammar has more than " + std::to_string(most_grammar_steps) +
                " steps, of which each character, item and property takes as many as it has repetitions");
        }
        if (n_steps_ > most_grammar_steps) {
            fail(at, "more than " + std::to_string(most_grammar_steps) +
                         " steps, of which each literal, class and name takes as many as it has repetitions");
        }
    }

    void read_rule() {
        const size_t at = at_;
        const uint32_t id = named(read_name(), at);
        if (rules_[id].is_defined) {
            fail(at, "the rule " + gbnf_.substr(at, at_ - at) + " is defined twice");
        }
        skip_space(false);
        if (gbnf_.compare(at_, 3, "::=") != 0) {
            fail(at_, "expecting ::=");
        }
        at_ += 3;
        skip_space(true);
        read_alternatives(id, 0);
        if (look() == '\r' || look() == '\n') {
            skip_space(true);
        } else if (at_ < gbnf_.size()) {
            fail(at_, "expecting newline or end");
        }
    }

    void read_alternatives(uint32_t id, size_t depth) {
        std::vector<Sequence> alternatives;
        alternatives.push_back(read_sequence(depth));
        while (look() == '|') {
            ++at_;
            skip_space(true);
            alternatives.push_back(read_sequence(depth));
        }
        rules_[id] = {std::move(alternatives), true};
    }

    Sequence read_sequence(size_t depth) {
        Sequence sequence;
        size_t item = 0;  // where the last one begins, which a repetition repeats
        bool has_item = false;
        for (; at_ < gbnf_.size(); skip_space(depth > 0)) {
            const size_t begin = sequence.size();
            const size_t at = at_;
            const char c = look();
            if (c == '*' || c == '+' || c == '?' || c == '{') {
                if (!has_item) {
                    fail(at, "expecting preceding item to */+/?/{");
                }
                read_repetition(sequence, item);
                continue;
            }
            if (c == '"') {
                read_literal(sequence);
            } else if (c == '[') {
                read_class(sequence);
            } else if (c == '.') {
                ++at_;
                sequence.push_back({Kind::characters, set_of({}, /*negated =*/true)});
            } else if (c == '<' || c == '!') {
                read_token(sequence);
            } else if (c == '(') {
                read_group(sequence, depth + 1);
            } else if (is_word(c)) {
                sequence.push_back({Kind::rule, named(read_name(), at)});
            } else {
                break;
            }
            count(sequence.size() - begin + 1, at);
            item = begin;
            has_item = true;
        }
        return sequence;
    }

    void read_group(Sequence & sequence, size_t depth) {
        if (depth > most_grammar_nesting) {
            fail(at_, "parentheses within more than " + std::to_string(most_grammar_nesting) + " others");
        }
        const size_t at = at_++;
        skip_space(true);
        const uint32_t id = add_rule();
        read_alternatives(id, depth);
        if (look() != ')') {
            fail(at_ < gbnf_.size() ? at_ : at, at_ < gbnf_.size() ? "expecting ')'" : "unexpected end of input");
        }
        ++at_;
        sequence.push_back({Kind::rule, id});
    }

    uint32_t read_hex(size_t n_digits) {
        const size_t at = at_;
        at_ += 2;
        uint32_t value = 0;
        for (size_t i = 0; i < n_digits; ++i, ++at_) {
            const char c = look();
            const char * const digits = "0123456789abcdef0123456789ABCDEF";
            const char * const digit = c == '\0' ? nullptr : std::char_traits<char>::find(digits, 32, c);
            if (digit == nullptr) {
                fail(at, "expecting " + std::to_string(n_digits) + " hex chars");
            }
            value = value << 4U | static_cast<uint32_t>((digit - digits) % 16);
        }
        if (value > last_character) {
            fail(at, "beyond U+10FFFF, which is no character");
        }
        return value;
    }

    // A character of a literal or a class, which may be escaped.
    uint32_t read_character(size_t literal) {
        const char c = look();
        if (c == '\0') {
            fail(literal, "unexpected end of input");
        }
        if (c == '\\') {
            const char escaped = look(1);
            switch (escaped) {
                case 'x': return read_hex(2);
                case 'u': return read_hex(4);
                case 'U': return read_hex(8);
                case 't': at_ += 2; return '\t';
                case 'r': at_ += 2; return '\r';
                case 'n': at_ += 2; return '\n';
                case '\\':
                case '"':
                case '[':
                case ']':
                case '-': at_ += 2; return static_cast<uint32_t>(escaped);
                default: fail(at_, "unknown escape");
            }
        }
        // The text came as a Python string, so its UTF-8 is valid.
        const auto lead = static_cast<unsigned char>(c);
        const size_t n_more = lead < 0x80 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
        uint32_t value = n_more == 0 ? lead : lead & (0x3FU >> n_more);
        ++at_;
        for (size_t i = 0; i < n_more && at_ < gbnf_.size(); ++i, ++at_) {
            value = value << 6U | (static_cast<unsigned char>(gbnf_[at_]) & 0x3FU);
        }
        return value;
    }

    void read_literal(Sequence & sequence) {
        const size_t begin = at_++;
        while (look() != '"') {
            const size_t at = at_;
            const uint32_t character = read_character(begin);
            if (first_surrogate <= character && character <= last_surrogate) {
                fail(at, "a surrogate, which is no character of a text");
            }
            sequence.push_back({Kind::characters, set_of({{character, character}}, false)});
        }
        ++at_;
    }

    void read_class(Sequence & sequence) {
        const size_t begin = at_++;
        const bool negated = look() == '^';
        at_ += negated ? 1 : 0;
        std::vector<CharacterSet::Range> ranges;
        while (look() != ']') {
            const size_t at = at_;
            const uint32_t low = read_character(begin);
            uint32_t high = low;
            if (look() == '-' && look(1) != ']') {
                ++at_;
                high = read_character(begin);
            }
            if (high < low) {
                fail(at, "a range that ends before it begins");
            }
            ranges.emplace_back(low, high);
        }
        ++at_;
        if (ranges.empty()) {
            fail(begin, "a class without characters");
        }
        count(ranges.size(), begin);
        sequence.push_back({Kind::characters, set_of(std::move(ranges), negated)});
    }

    uint32_t set_of(std::vector<CharacterSet::Range> ranges, bool negated) {
        CharacterSet set(std::move(ranges), negated);
        const auto [place, is_new] = set_ids_.emplace(set.ranges(), static_cast<uint32_t>(sets_.size()));
        if (is_new) {
            sets_.push_back(std::move(set));
        }
        return place->second;
    }

    // <[number]>, or <name>, whose text the tokenizer makes one token of.
    void read_token(Sequence & sequence) {
        const bool other = look() == '!';
        at_ += other ? 1 : 0;
        const size_t begin = at_;
        const size_t end = gbnf_.find('>', at_);
        if (look() != '<' || end == std::string::npos) {
            fail(at_, look() == '<' ? "expecting '>'" : "expecting '<'");
        }
        const std::string text = gbnf_.substr(begin, end + 1 - begin);
        uint32_t token = 0;
        if (look(1) == '[') {
            at_ += 2;
            token = static_cast<uint32_t>(read_number());
            if (look() != ']' || at_ + 1 != end) {
                fail(at_, "expecting ']>'");
            }
            if (token >= static_cast<uint32_t>(llama_vocab_n_tokens(&vocab_))) {
                fail(begin, "the model has no such token");
            }
        } else {
            const std::vector<int32_t> tokens = tokenize(vocab_, text, /*add_special =*/false, /*parse_special =*/true);
            if (tokens.size() != 1) {
                fail(begin, "the model has no such token");
            }
            token = static_cast<uint32_t>(tokens[0]);
        }
        at_ = end + 1;
        sequence.push_back({other ? Kind::other_token : Kind::token, token});
    }

    size_t read_number() {
        const size_t begin = at_;
        size_t value = 0;
        for (; is_digit(look()); ++at_) {
            // It stops growing where it is too large for anything.
            value =
                std::min<size_t>(value * 10 + static_cast<size_t>(look() - '0'), std::numeric_limits<int32_t>::max());
        }
        if (at_ == begin) {
            fail(at_, "expecting an int");
        }
        return value;
    }

    void read_repetition(Sequence & sequence, size_t item) {
        const size_t at = at_;
        const char c = gbnf_[at_++];
        size_t least = c == '+' ? 1 : 0;
        size_t most = 1;
        bool is_bounded = c == '?';
        if (c == '{') {
            skip_space(true);
            least = most = read_number();
            is_bounded = true;
            skip_space(true);
            if (look() == ',') {
                ++at_;
                skip_space(true);
                is_bounded = is_digit(look());
                most = is_bounded ? read_number() : most;
                skip_space(true);
            }
            if (look() != '}') {
                fail(at_, "expecting '}'");
            }
            ++at_;
            if (most < least) {
                fail(at, gbnf_.substr(at, at_ - at) + ": the most, " + std::to_string(most) + ", is below the least, " +
                             std::to_string(least));
            }
        }
        repeat(sequence, item, least, is_bounded ? most - least : 0, !is_bounded, at);
    }

    // The item becomes itself `least` times, and then a rule that goes on or ends: once, or as often as there is more.
    void repeat(Sequence & sequence, size_t begin, size_t least, size_t more, bool forever, size_t at) {
        const Sequence item(sequence.begin() + static_cast<std::ptrdiff_t>(begin), sequence.end());
        if (least + more > most_grammar_steps) {
            fail(at, "more than " + std::to_string(most_grammar_steps) + " repetitions");
        }
        count(item.size() * (least + more) + 3 * (more + 1), at);
        sequence.resize(begin);
        for (size_t i = 0; i < least; ++i) {
            sequence.insert(sequence.end(), item.begin(), item.end());
        }
        uint32_t id = 0;
        for (size_t i = 0; i < more; ++i) {
            Sequence once = item;
            if (i > 0) {
                once.push_back({Kind::rule, id});
            }
            id = add_rule();
            rules_[id] = {{std::move(once), {}}, true};
        }
        if (forever) {
            id = add_rule();
            Sequence again = item;
            again.push_back({Kind::rule, id});
            rules_[id] = {{std::move(again), {}}, true};
        }
        if (more > 0 || forever) {
            sequence.push_back({Kind::rule, id});
        }
    }

    // Which alternatives some text fits: those whose characters exist and whose rules have such an alternative.
    std::vector<std::vector<bool>> find_finite() const {
        struct Place {
            uint32_t rule, alternative;
        };
        std::vector<std::vector<size_t>> n_missing(rules_.size());
        std::vector<std::vector<Place>> users(rules_.size());
        std::vector<Place> found;
        for (uint32_t id = 0; id < rules_.size(); ++id) {
            const auto & alternatives = rules_[id].alternatives;
            n_missing[id].resize(alternatives.size());
            for (uint32_t i = 0; i < alternatives.size(); ++i) {
                size_t & n = n_missing[id][i];
                for (const Step & step : alternatives[i]) {
                    if (step.kind == Kind::rule) {
                        users[step.value].push_back({id, i});
                    }
                    const bool is_empty = step.kind == Kind::characters && sets_[step.value].empty();
                    n += step.kind == Kind::rule || is_empty ? 1 : 0;
                }
                if (n == 0) {
                    found.push_back({id, i});
                }
            }
        }
        std::vector<std::vector<bool>> finite(rules_.size());
        for (uint32_t id = 0; id < rules_.size(); ++id) {
            finite[id].resize(rules_[id].alternatives.size());
        }
        std::vector<bool> is_known(rules_.size());
        while (!found.empty()) {
            const Place place = found.back();
            found.pop_back();
            finite[place.rule][place.alternative] = true;
            if (is_known[place.rule]) {
                continue;
            }
            is_known[place.rule] = true;
            for (const Place & user : users[place.rule]) {
                if (--n_missing[user.rule][user.alternative] == 0) {
                    found.push_back(user);
                }
            }
        }
        return finite;
    }

    GrammarRules finish(uint32_t root) {
        const std::vector<std::vector<bool>> finite = find_finite();
        GrammarRules made;
        made.root = root;
        made.rules.reserve(rules_.size());
        for (uint32_t id = 0; id < rules_.size(); ++id) {
            const auto begin = static_cast<uint32_t>(made.starts.size());
            for (uint32_t i = 0; i < rules_[id].alternatives.size(); ++i) {
                if (finite[id][i]) {
                    const Sequence & sequence = rules_[id].alternatives[i];
                    made.starts.push_back(static_cast<uint32_t>(made.steps.size()));
                    made.steps.insert(made.steps.end(), sequence.begin(), sequence.end());
                    made.steps.push_back({Kind::end, 0});
                }
            }
            made.rules.push_back({begin, static_cast<uint32_t>(made.starts.size())});
        }
        if (made.rules[root].begin == made.rules[root].end) {
            throw std::invalid_argument(origin() + ": no text fits it");
        }
        made.sets = std::move(sets_);
        return made;
    }

    const llama_vocab & vocab_;
    const std::string & gbnf_;
    size_t at_ = 0;
    size_t n_steps_ = 0;
    std::vector<Rule> rules_;
    std::map<std::string, Named, std::less<>> named_;
    std::vector<CharacterSet> sets_;
    std::map<std::vector<CharacterSet::Range>, uint32_t> set_ids_;
};

}  // namespace

CharacterSet::CharacterSet(std::vector<Range> ranges, bool negated) {
    if (negated) {
        ranges.emplace_back(first_surrogate, last_surrogate);
    }
    std::sort(ranges.begin(), ranges.end());
    std::vector<Range> joined;
    for (const auto & [low, high] : ranges) {
        if (!joined.empty() && low <= joined.back().second + 1) {
            joined.back().second = std::max(joined.back().second, high);
        } else {
            joined.emplace_back(low, high);
        }
    }
    if (negated) {
        uint32_t next = 0;
        for (const auto & [low, high] : joined) {
            if (low > next) {
                ranges_.emplace_back(next, low - 1);
            }
            next = high + 1;
        }
        if (next <= last_character) {
            ranges_.emplace_back(next, last_character);
        }
    } else {
        for (const auto & [low, high] : joined) {
            if (low < first_surrogate) {
                ranges_.emplace_back(low, std::min(high, first_surrogate - 1));
            }
            if (high > last_surrogate) {
                ranges_.emplace_back(std::max(low, last_surrogate + 1), high);
            }
        }
    }
    for (const auto & [low, high] : ranges_) {
        for (uint32_t c = low; c <= high && c < 128; ++c) {
            ascii_[c / 64] |= uint64_t{1} << (c % 64);
        }
    }
}

bool CharacterSet::meets(uint32_t low, uint32_t high) const {
    const auto range = std::lower_bound(ranges_.begin(), ranges_.end(), low,
                                        [](const Range & each, uint32_t value) { return each.second < value; });
    return range != ranges_.end() && range->first <= high;
}

GrammarRules parse_gbnf(const llama_vocab & vocab, const std::string & gbnf) {
    return Parser(vocab, gbnf).parse();
}

}  // namespace overspill
