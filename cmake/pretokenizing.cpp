// Compiled into llama.cpp's library: see pretokenizing.h. Matches what std::regex matches, of the expressions that
// pre-tokenizers have, in a time that grows with the text and without calling itself for each character.
#include "pretokenizing.h"

#include <algorithm>
#include <bitset>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <utility>

namespace {

thread_local void (*poll_function)(void *) = nullptr;
thread_local void * poll_data = nullptr;
thread_local size_t n_steps = 0;

// The characters that an element of an expression takes.
class CharacterSet {
  public:
    void add(char32_t first, char32_t last) {
        for (char32_t c = first; c <= last && c < low_.size(); ++c) {
            low_.set(c);
        }
        if (last >= low_.size()) {
            ranges_.emplace_back(first, last);
        }
    }
    void add_class(char32_t letter) {
        switch (letter) {
            case U's': add(U'\t', U'\r'), add(U' ', U' '); return;
            case U'd': add(U'0', U'9'); return;
            case U'S': add(0, 8), add(14, 31), add(33, 0x10FFFF); return;
            default: throw std::invalid_argument("an unknown class of characters");
        }
    }
    void negate() { negated_ = true; }
    bool has(char32_t c) const {
        if (c < low_.size()) {
            return low_[c] != negated_;
        }
        return std::any_of(ranges_.begin(), ranges_.end(),
                           [c](const auto & range) { return range.first <= c && c <= range.second; }) != negated_;
    }

  private:
    std::bitset<256> low_;
    std::vector<std::pair<char32_t, char32_t>> ranges_;
    bool negated_ = false;
};

enum class Operation { take, choose, jump, look, at_end, done };

// Places are relative, so that code can be repeated.
struct Instruction {
    Operation operation;
    int32_t first = 0;   // take: a set; choose, jump: where to go on; look: where to go on after what is looked for
    int32_t second = 0;  // choose: where else; look: whether it must not be there
    int32_t number = 0;  // choose: which of its kind
};

struct Code {
    std::vector<Instruction> instructions;
    bool may_be_empty = true;

    int32_t size() const { return static_cast<int32_t>(instructions.size()); }
    void append(const Code & other) {
        instructions.insert(instructions.end(), other.instructions.begin(), other.instructions.end());
        may_be_empty = may_be_empty && other.may_be_empty;
    }
};

struct Program {
    std::vector<Instruction> code;
    std::vector<CharacterSet> sets;
    int32_t n_choices = 0;
    bool looks_far = false;  // whether what is looked for has choices
};

class Compiler {
  public:
    explicit Compiler(const std::u32string & expression) : expression_(expression) {
        Code code = alternatives();
        if (at_ != expression.size()) {
            throw std::invalid_argument("an unmatched bracket");
        }
        code.instructions.push_back({Operation::done});
        program_.code = std::move(code.instructions);
        for (Instruction & one : program_.code) {
            if (one.operation == Operation::choose) {
                one.number = program_.n_choices++;
            }
        }
    }
    Program program() { return std::move(program_); }

  private:
    bool next_is(char32_t c) const { return at_ < expression_.size() && expression_[at_] == c; }
    bool skip(std::u32string_view text) {
        const bool found = expression_.compare(at_, text.size(), text) == 0;
        at_ += found ? text.size() : 0;
        return found;
    }
    char32_t read() {
        if (at_ == expression_.size()) {
            throw std::invalid_argument("an unexpected end");
        }
        return expression_[at_++];
    }

    Code alternatives() {
        Code code = sequence();
        if (skip(U"|")) {
            const Code other = alternatives();
            Code both;
            both.instructions.push_back({Operation::choose, 1, code.size() + 2});
            both.append(code);
            both.instructions.push_back({Operation::jump, other.size() + 1});
            both.append(other);
            both.may_be_empty = code.may_be_empty || other.may_be_empty;
            return both;
        }
        return code;
    }

    Code sequence() {
        Code code;
        while (at_ < expression_.size() && !next_is(U'|') && !next_is(U')')) {
            code.append(repeated(element()));
        }
        return code;
    }

    static Code optional(const Code & code) {
        Code result;
        result.instructions.push_back({Operation::choose, 1, code.size() + 1});
        result.append(code);
        result.may_be_empty = true;
        return result;
    }

    static Code any_number(const Code & code) {
        if (code.may_be_empty) {
            throw std::invalid_argument("something empty that is repeated");
        }
        Code looped = code;
        looped.instructions.push_back({Operation::jump, -code.size() - 1});
        return optional(looped);
    }

    Code repeated(const Code & code) {
        if (skip(U"*")) {
            return any_number(code);
        }
        size_t least = 1;
        size_t most = 1;
        bool bounded = true;
        if (skip(U"?")) {
            least = 0;
        } else if (skip(U"+")) {
            bounded = false;
        } else if (skip(U"{")) {
            least = most = number();
            if (skip(U",")) {
                bounded = !next_is(U'}');
                most = bounded ? number() : least;
            }
            if (!skip(U"}") || most < least) {
                throw std::invalid_argument("a number of times that cannot be");
            }
        } else {
            return code;
        }
        if (next_is(U'?') || next_is(U'*') || next_is(U'+')) {
            throw std::invalid_argument("a lazy or possessive repetition");
        }
        Code rest;
        for (size_t i = least; i < most; ++i) {
            Code one = code;
            one.append(rest);
            rest = optional(one);
        }
        Code result;
        for (size_t i = 0; i < least; ++i) {
            result.append(code);
        }
        result.append(bounded ? rest : any_number(code));
        result.may_be_empty = code.may_be_empty || least == 0;
        return result;
    }

    size_t number() {
        constexpr size_t most = 10000;
        size_t value = 0;
        do {
            const char32_t digit = read();
            if (digit < U'0' || digit > U'9' || value > most) {
                throw std::invalid_argument("a number of times that cannot be");
            }
            value = value * 10 + (digit - U'0');
        } while (!next_is(U',') && !next_is(U'}'));
        return value;
    }

    Code element() {
        if (skip(U"(?:")) {
            return group();
        }
        const bool ahead = skip(U"(?=");
        if (ahead || skip(U"(?!")) {
            const Code body = group();
            Code code;
            code.instructions.push_back({Operation::look, body.size() + 2, ahead ? 0 : 1});
            code.append(body);
            code.instructions.push_back({Operation::done});
            code.may_be_empty = true;
            const auto chooses = [](const Instruction & one) { return one.operation == Operation::choose; };
            program_.looks_far =
                program_.looks_far || std::any_of(body.instructions.begin(), body.instructions.end(), chooses);
            return code;
        }
        if (skip(U"(")) {
            if (next_is(U'?')) {
                throw std::invalid_argument("an unknown kind of group");
            }
            return group();
        }
        Code code;
        if (skip(U"$")) {
            code.instructions.push_back({Operation::at_end});
            return code;
        }
        if (std::u32string_view(U"^.*+?{}]").find(expression_[at_]) != std::u32string_view::npos) {
            throw std::invalid_argument("an unexpected character");
        }
        CharacterSet set;
        if (skip(U"[")) {
            bracket(set);
        } else if (skip(U"\\")) {
            escaped(set);
        } else {
            const char32_t c = read();
            set.add(c, c);
        }
        code.instructions.push_back({Operation::take, static_cast<int32_t>(program_.sets.size())});
        code.may_be_empty = false;
        program_.sets.push_back(std::move(set));
        return code;
    }

    Code group() {
        Code code = alternatives();
        if (!skip(U")")) {
            throw std::invalid_argument("an unmatched bracket");
        }
        return code;
    }

    static bool is_class(char32_t letter) { return letter == U's' || letter == U'S' || letter == U'd'; }

    // What follows a backslash, where it is one character.
    static char32_t meant(char32_t letter) {
        switch (letter) {
            case U'n': return U'\n';
            case U'r': return U'\r';
            case U't': return U'\t';
            case U'f': return U'\f';
            case U'v': return U'\v';
            default: break;
        }
        if ((letter >= U'a' && letter <= U'z') || (letter >= U'A' && letter <= U'Z') ||
            (letter >= U'0' && letter <= U'9')) {
            throw std::invalid_argument("an unknown escape");
        }
        return letter;
    }

    void escaped(CharacterSet & set) {
        const char32_t letter = read();
        if (is_class(letter)) {
            set.add_class(letter);
        } else {
            set.add(meant(letter), meant(letter));
        }
    }

    void bracket(CharacterSet & set) {
        const bool negated = skip(U"^");
        while (!skip(U"]")) {
            char32_t first = read();
            if (first == U'\\') {
                first = read();
                if (is_class(first)) {
                    set.add_class(first);
                    continue;
                }
                first = meant(first);
            }
            char32_t last = first;
            if (next_is(U'-') && at_ + 1 < expression_.size() && expression_[at_ + 1] != U']') {
                ++at_;
                last = read();
                last = last == U'\\' ? meant(read()) : last;
                if (last < first) {
                    throw std::invalid_argument("a range that ends before it begins");
                }
            }
            set.add(first, last);
        }
        if (negated) {
            set.negate();
        }
    }

    const std::u32string & expression_;
    size_t at_ = 0;
    Program program_;
};

// A bit for each choice at each place of the text, from a place on.
class Marks {
  public:
    Marks(size_t first, int32_t n_choices) : first_(first), n_choices_(static_cast<size_t>(n_choices)) {}
    // Returns whether it was set before.
    bool set(size_t place, int32_t number) {
        const size_t i = index(place, number);
        if (i >= bits_.size()) {
            bits_.resize(std::max(i + 1, bits_.size() * 2));
        }
        const bool before = bits_[i];
        bits_[i] = true;
        return before;
    }
    bool has(size_t place, int32_t number) const {
        const size_t i = index(place, number);
        return i < bits_.size() && bits_[i];
    }

  private:
    size_t index(size_t place, int32_t number) const {
        return (place - first_) * n_choices_ + static_cast<size_t>(number);
    }

    size_t first_;
    size_t n_choices_;
    std::vector<bool> bits_;
};

// Finds one match after the other in a fragment of a text. Where a choice failed once, it fails again, since nothing
// but the place in text and program decides: so what failed is marked, and time grows with the text only.
class Matcher {
  public:
    Matcher(const Program & program, const char32_t * text, size_t n)
        : program_(program),
          text_(text),
          n_(n),
          seen_ahead_(0, program.n_choices),
          found_ahead_(0, program.n_choices) {}

    // The first match that begins at `from` or later, or there only; false if there is none.
    bool search(size_t from, bool there_only, bool may_be_empty, size_t & begin, size_t & end) {
        n_search_steps_ = 0;
        seen_.reset();
        from_ = from;
        for (begin = from; begin <= n_; ++begin) {
            if (match(0, begin, may_be_empty ? n_ + 1 : begin, end)) {
                return true;
            }
            if (there_only) {
                return false;
            }
        }
        return false;
    }

  private:
    struct Choice {
        size_t pc;
        size_t place;
        size_t n_path;  // how much of the path leads here
    };

    static size_t moved(size_t pc, int32_t by) { return static_cast<size_t>(static_cast<int64_t>(pc) + by); }

    // Whether a choice need not be made, because it was made before, at the same place and without success.
    bool is_vain(size_t place, int32_t number) {
        if (depth_ > 0) {
            return program_.looks_far && seen_ahead_.set(place, number);
        }
        // Words are short: nothing is worth marking for most.
        constexpr size_t steps_of_a_long_word = 512;
        if (!seen_) {
            if (n_search_steps_ < steps_of_a_long_word) {
                return false;
            }
            seen_ = std::make_unique<Marks>(from_, program_.n_choices);
        }
        return seen_->set(place, number);
    }

    // `refused` is an end that does not count.
    bool match(size_t pc, size_t place, size_t refused, size_t & end) {
        const size_t n_choices_before = choices_.size();
        const size_t n_path_before = path_.size();
        bool found = false;
        while (true) {
            ++n_search_steps_;
            overspill_tokenizing_step();
            const Instruction & now = program_.code[pc];
            bool goes_on = true;
            switch (now.operation) {
                case Operation::take:
                    goes_on = place < n_ && program_.sets[static_cast<size_t>(now.first)].has(text_[place]);
                    ++place;
                    ++pc;
                    break;
                case Operation::choose:
                    if (depth_ > 0 && program_.looks_far) {
                        if (found_ahead_.has(place, now.number)) {
                            found = true;
                            break;
                        }
                        path_.emplace_back(place, now.number);
                    }
                    if (is_vain(place, now.number)) {
                        goes_on = false;
                        break;
                    }
                    choices_.push_back({moved(pc, now.second), place, path_.size()});
                    pc = moved(pc, now.first);
                    break;
                case Operation::jump: pc = moved(pc, now.first); break;
                case Operation::look: {
                    size_t ignored = 0;
                    ++depth_;
                    const bool is_ahead = match(pc + 1, place, n_ + 1, ignored);
                    --depth_;
                    goes_on = is_ahead == (now.second == 0);
                    pc = moved(pc, now.first);
                    break;
                }
                case Operation::at_end:
                    goes_on = place == n_;
                    ++pc;
                    break;
                case Operation::done:
                    goes_on = place != refused;
                    found = goes_on;
                    end = place;
                    break;
            }
            if (found) {
                // All that led here leads here again.
                for (size_t i = n_path_before; i < path_.size(); ++i) {
                    found_ahead_.set(path_[i].first, path_[i].second);
                }
                break;
            }
            if (!goes_on) {
                if (choices_.size() == n_choices_before) {
                    break;
                }
                pc = choices_.back().pc;
                place = choices_.back().place;
                path_.resize(choices_.back().n_path);
                choices_.pop_back();
            }
        }
        choices_.resize(n_choices_before);
        path_.resize(n_path_before);
        return found;
    }

    const Program & program_;
    const char32_t * text_;
    size_t n_;
    size_t from_ = 0;
    size_t n_search_steps_ = 0;
    int depth_ = 0;                // of what is looked for
    std::vector<Choice> choices_;  // still to be tried
    std::vector<std::pair<size_t, int32_t>> path_;
    std::unique_ptr<Marks> seen_;  // of this search
    Marks seen_ahead_;             // in what is looked for: what leads to nothing or is being tried
    Marks found_ahead_;            // and what leads to success
};

const Program & program_of(const std::u32string & expression) {
    constexpr size_t most = 64;  // a model has six at most
    thread_local std::unordered_map<std::u32string, Program> programs;
    auto found = programs.find(expression);
    if (found == programs.end()) {
        if (programs.size() >= most) {
            programs.clear();
        }
        try {
            found = programs.emplace(expression, Compiler(expression).program()).first;
        } catch (const std::invalid_argument & error) {
            throw std::runtime_error(std::string("the pre-tokenizer's expression has ") + error.what());
        }
    }
    return found->second;
}

}  // namespace

void overspill_poll_while_tokenizing(void (*poll)(void *), void * data) {
    poll_function = poll;
    poll_data = data;
}

void overspill_tokenizing_step(size_t n) {
    constexpr size_t steps_between_polls = 1024;
    n_steps += n;
    if (n_steps >= steps_between_polls) {
        n_steps = 0;
        if (poll_function != nullptr) {
            poll_function(poll_data);
        }
    }
}

std::vector<size_t> overspill_split(const std::u32string & text, const std::u32string & expression,
                                    const std::vector<size_t> & offsets) {
    const Program & program = program_of(expression);
    std::vector<size_t> lengths;
    lengths.reserve(offsets.size());
    size_t start = 0;
    for (const size_t n : offsets) {
        Matcher matcher(program, text.data() + start, n);
        size_t done = 0;
        size_t begin = 0;
        size_t end = 0;
        bool found = matcher.search(0, false, true, begin, end);
        while (found) {
            if (begin > done) {
                lengths.push_back(begin - done);
            }
            lengths.push_back(end - begin);
            done = end;
            if (begin < end) {
                found = matcher.search(end, false, true, begin, end);
            } else if (end == n) {
                found = false;
            } else {
                // As std::regex_iterator: something at the same place that is not empty, or anything later.
                const size_t from = end;
                found =
                    matcher.search(from, true, false, begin, end) || matcher.search(from + 1, false, true, begin, end);
            }
        }
        if (done < n) {
            lengths.push_back(n - done);
        }
        start += n;
    }
    return lengths;
}
