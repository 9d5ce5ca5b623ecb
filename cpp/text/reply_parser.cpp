#include "text/reply_parser.h"

#include "base/process.h"

#include <chat-peg-parser.h>
#include <chat.h>
#include <json.h>
#include <peg-parser.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <set>
#include <string_view>
#include <utility>

namespace overspill {

namespace {

using Builder = common_chat_peg_builder;

// Tags that llama.cpp's own do not collide with: of a literal, of any text that its parsers pass over, of any text that
// is all of a part, and of a string between quotes.
constexpr const char * mark_tag = "overspill-mark";
constexpr const char * skipped_tag = "overspill-skipped";
constexpr const char * run_tag = "overspill-run";
constexpr const char * string_tag = "overspill-string";

bool is_space(char c) {
    return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

bool is_blank(std::string_view text) {
    return std::all_of(text.begin(), text.end(), is_space);
}

bool starts_with(std::string_view text, std::string_view beginning) {
    return text.substr(0, beginning.size()) == beginning;
}

std::string trimmed(std::string_view text) {
    while (!text.empty() && is_space(text.front())) {
        text.remove_prefix(1);
    }
    while (!text.empty() && is_space(text.back())) {
        text.remove_suffix(1);
    }
    return std::string(text);
}

// The length of the longest end of `text` with which `word` may begin, short of all of it.
size_t begun_at_end(std::string_view text, std::string_view word) {
    for (size_t n = std::min(text.size(), word.empty() ? 0 : word.size() - 1); n > 0; --n) {
        if (text.substr(text.size() - n) == word.substr(0, n)) {
            return n;
        }
    }
    return 0;
}

struct Span {
    size_t begin, end;
};

// A part of the reply, as a span of the input that was parsed.
struct Part {
    ReplyPart kind;
    size_t begin, end;
    std::optional<ToolCall> call = std::nullopt;
    bool is_run = false;  // any text up to a delimiter
};

// A string in a call that has not ended. Its middle makes no difference to how the rest is read.
struct OpenString {
    Span span;
    bool has_escapes;  // as JSON's
};

// The beginning of a reply, as the format reads it.
struct Reading {
    bool is_good = false;    // it follows the format, as far as it goes
    bool has_ended = false;  // the format has nothing after `end`
    size_t end = 0;
    size_t settled = 0;        // what is before is in a part, or a mark
    size_t nested_from = 0;    // brackets before that are text, or closed
    bool is_in_call = false;   // a call that has not ended is after that
    bool is_calling = false;   // and its tool is named
    bool has_skipped = false;  // a part is text that the format passes over
    std::optional<OpenString> open_string;
    std::vector<Part> parts;
};

struct Format {
    common_chat_format kind;
    common_peg_arena arena;
    std::set<std::string> call_rules;     // rules that hold calls with their marks
    std::set<std::string> run_rules;      // rules of any text up to a delimiter
    std::vector<std::string> delimiters;  // at which texts end
    std::vector<std::string> marks;       // that a text would not have
    std::string opening;                  // what the prompt has of the reply
    std::string thought_end;
    bool needs_header = false;  // a plain text is no reply

    explicit Format(const common_chat_params & chat)
        : kind(chat.format), marks(chat.preserved_tokens), opening(chat.generation_prompt) {
        if (!chat.thinking_end_tags.empty()) {
            thought_end = trimmed(chat.thinking_end_tags.front());
        }
        marks.erase(std::remove_if(marks.begin(), marks.end(), [](const auto & mark) { return mark.size() < 3; }),
                    marks.end());
        load(chat.parser.empty()
                 ? build_chat_peg_parser([](Builder & p) { return p.content(p.rest()) + p.end(); }).save()
                 : chat.parser);
        needs_header = !opening.empty() && !read(opening + "x", opening.size(), /*is_open =*/true).is_good;
    }

    // The parser, with tags on marks and on texts that it passes over.
    void load(const std::string & saved) {
        common_json data = common_json::parse(saved);
        common_json & parsers = data["parsers"];
        const auto wrap = [&](size_t id, const char * tag) {
            const common_json parser = parsers[id];
            parsers[id] = common_json{{"type", "tag"}, {"child", parsers.size()}, {"tag", tag}};
            parsers.push_back(parser);
        };
        const size_t n = parsers.size();
        std::vector<bool> is_seen(n, false);
        std::vector<size_t> next{data["root"].get<size_t>()};
        while (!next.empty()) {
            const size_t id = next.back();
            next.pop_back();
            if (id >= n || is_seen[id]) {
                continue;
            }
            is_seen[id] = true;
            const common_json parser = parsers[id];
            const std::string type = parser.at("type");
            if (type == "tag" || type == "schema") {
                continue;  // what is in there is a part
            }
            if (type == "literal" || type == "until" || type == "any") {
                wrap(id, type == "literal" ? mark_tag : skipped_tag);
            } else if (type == "ref") {
                next.push_back(data["rules"].at(parser.at("name").get<std::string>()).get<size_t>());
            } else if (parser.contains("child")) {
                next.push_back(parser.at("child").get<size_t>());
            } else if (parser.contains("children")) {
                for (const size_t child : parser.at("children").get<std::vector<size_t>>()) {
                    next.push_back(child);
                }
            }
        }
        for (size_t id = 0; id < n; ++id) {
            const common_json parser = parsers[id];
            const std::string type = parser.at("type");
            const std::string tag = type == "tag" ? parser.at("tag").get<std::string>() : "";
            if (type == "string") {
                wrap(id, string_tag);
            } else if (!tag.empty() && tag != mark_tag && tag != skipped_tag) {
                const size_t child = parser.at("child").get<size_t>();
                if (parsers[child].at("type").get<std::string>() == "until") {
                    wrap(child, run_tag);
                }
            }
        }
        arena = common_peg_arena::from_json(data);
        for (size_t id = 0; id < arena.size(); ++id) {
            const common_peg_parser_variant & parser = arena.get(id);
            if (const auto * until = std::get_if<common_peg_until_parser>(&parser)) {
                delimiters.insert(delimiters.end(), until->delimiters.begin(), until->delimiters.end());
            } else if (const auto * rule = std::get_if<common_peg_rule_parser>(&parser)) {
                take_rule(*rule);
            }
        }
    }

    void take_rule(const common_peg_rule_parser & rule) {
        if (rule.trigger) {
            call_rules.insert(rule.name);
        }
        const common_peg_parser_variant & child = arena.get(rule.child);
        const auto * tag = std::get_if<common_peg_tag_parser>(&child);
        if (std::holds_alternative<common_peg_until_parser>(tag != nullptr ? arena.get(tag->child) : child)) {
            run_rules.insert(rule.name);
        }
    }

    // `begin` is where the reply begins in the input. A call at the end of an open one may still go on.
    Reading read(const std::string & input, size_t begin, bool is_open) const;
};

// Takes the parts from llama.cpp's tree.
class TreeReader {
  public:
    TreeReader(const Format & format, const common_peg_parse_context & parsed, size_t begin, bool is_open,
               Reading & reading)
        : format_(format), parsed_(parsed), begin_(begin), is_open_(is_open), reading_(reading) {
        reading_.settled = reading_.nested_from = begin;
    }

    void read(const common_peg_parse_result & result) {
        for (const common_peg_ast_id id : result.nodes) {
            visit(id, false);
        }
        if (result.success() && !is_unfinished_) {
            take_skipped(result.end);
            settle(result.end);
        }
    }

  private:
    void visit(common_peg_ast_id id, bool is_in_call) {
        const common_peg_ast_node & node = parsed_.ast.get(id);
        if (is_unfinished_) {
            return;
        }
        if (node.tag == Builder::REASONING || node.tag == Builder::CONTENT) {
            take_text(node);
        } else if (is_call(node)) {
            take_call(node);
        } else if (node.tag == mark_tag) {
            // The marks before a call belong to it until it is complete.
            if (!node.is_partial && !is_skipping_ && (!is_in_call || has_called_)) {
                settle(node.end);
            }
        } else if (node.tag == skipped_tag) {
            is_skipping_ |= node.end > std::max(node.start, begin_);
        } else {
            const bool is_calls = !is_in_call && format_.call_rules.count(node.rule) > 0;
            if (is_calls) {
                take_skipped(std::max(node.start, begin_));
            }
            for (const common_peg_ast_id child : node.children) {
                visit(child, is_in_call || is_calls);
            }
        }
    }

    bool is_call(const common_peg_ast_node & node) const {
        return node.tag == Builder::TOOL ||
               std::any_of(node.children.begin(), node.children.end(),
                           [&](common_peg_ast_id id) { return parsed_.ast.get(id).tag == Builder::TOOL_OPEN; });
    }

    void take_text(const common_peg_ast_node & node) {
        const size_t start = std::max(node.start, begin_), end = std::max(node.end, begin_);
        take_skipped(start);
        const ReplyPart kind = node.tag == Builder::REASONING ? ReplyPart::reasoning : ReplyPart::answer;
        // Some templates always have marks for reasoning, and models then write nothing between them.
        const bool is_run = is_run_alone(node);
        if (kind == ReplyPart::answer || !is_blank(view(start, end))) {
            add({kind, start, end, std::nullopt, is_run});
        }
        const size_t nested_from = is_run ? end : std::max(reading_.nested_from, start);
        settle(end);
        reading_.nested_from = nested_from;
    }

    // Whether a part is one text up to a delimiter.
    bool is_run_alone(const common_peg_ast_node & node) const {
        const common_peg_ast_node * at = &node;
        while (at->children.size() == 1) {
            at = &parsed_.ast.get(at->children[0]);
        }
        const bool is_run = at->tag == run_tag || at->tag == skipped_tag || format_.run_rules.count(at->rule) > 0;
        return is_run && at->start == node.start && at->end == node.end;
    }

    // The string at the end of a call that goes on.
    std::optional<OpenString> open_string(const common_peg_ast_node & call) const {
        const common_peg_ast_node * at = &call;
        while (!at->children.empty() && parsed_.ast.get(at->children.back()).is_partial) {
            at = &parsed_.ast.get(at->children.back());
        }
        const bool has_escapes = at->tag == string_tag;
        if (!at->is_partial || !(has_escapes || at->tag == run_tag || format_.run_rules.count(at->rule) > 0)) {
            return std::nullopt;
        }
        return OpenString{{at->start, at->end}, has_escapes};
    }

    void take_call(const common_peg_ast_node & node) {
        if (node.is_partial || (is_open_ && node.end == parsed_.input.size())) {
            is_unfinished_ = reading_.is_in_call = true;
            reading_.open_string = open_string(node);
            reading_.is_calling = parsed_.ast.find_by_tag(node, Builder::TOOL_NAME, 8) != COMMON_PEG_INVALID_AST_ID;
            return;
        }
        std::optional<ToolCall> call = call_of(node);
        if (!call) {
            is_skipping_ = true;
            return;
        }
        take_skipped(std::max(node.start, begin_));
        reading_.parts.push_back({ReplyPart::call, reading_.settled, node.end, std::move(call)});
        settle(node.end);
        has_called_ = true;
    }

    std::optional<ToolCall> call_of(const common_peg_ast_node & node) const {
        common_chat_msg message;
        const common_peg_parse_result alone(COMMON_PEG_PARSE_RESULT_SUCCESS, node.start, node.end, {node.id});
        if (format_.kind == COMMON_CHAT_FORMAT_PEG_GEMMA4) {
            common_chat_peg_gemma4_mapper(message).from_ast(parsed_.ast, alone);
        } else if (format_.kind == COMMON_CHAT_FORMAT_PEG_MINIMAX_M3) {
            common_chat_peg_minimax_m3_mapper(message).from_ast(parsed_.ast, alone);
        } else {
            common_chat_peg_mapper(message).from_ast(parsed_.ast, alone);
        }
        if (message.tool_calls.size() != 1 || message.tool_calls[0].name.empty()) {
            return std::nullopt;
        }
        const common_chat_tool_call & call = message.tool_calls[0];
        return ToolCall{call.name, call.arguments, call.id};
    }

    // Text that the format passes over is for the reader all the same.
    void take_skipped(size_t end) {
        if (is_skipping_) {
            is_skipping_ = false;
            reading_.has_skipped = true;
            add({ReplyPart::answer, reading_.settled, end});
            settle(end);
        }
    }

    void add(const Part & part) {
        std::vector<Part> & parts = reading_.parts;
        if (part.begin == part.end) {
            return;
        }
        if (!parts.empty() && parts.back().kind == part.kind && parts.back().end == part.begin) {
            parts.back().end = part.end;
            parts.back().is_run = false;
        } else {
            parts.push_back(part);
        }
    }

    void settle(size_t end) { reading_.settled = reading_.nested_from = std::max(reading_.settled, end); }

    std::string_view view(size_t from, size_t to) const {
        return std::string_view(parsed_.input).substr(from, to - from);
    }

    const Format & format_;
    const common_peg_parse_context & parsed_;
    const size_t begin_;
    const bool is_open_;
    Reading & reading_;
    bool is_skipping_ = false;
    bool is_unfinished_ = false;
    bool has_called_ = false;
};

Reading Format::read(const std::string & input, size_t begin, bool is_open) const {
    Reading reading;
    reading.settled = reading.nested_from = begin;
    try {
        common_peg_parse_context parsed(input, COMMON_PEG_PARSE_FLAG_LENIENT);
        const common_peg_parse_result result = arena.parse(parsed);
        if (!result.fail()) {
            reading.end = std::max(result.end, begin);
            reading.has_ended = result.success() && result.end < input.size();
            TreeReader(*this, parsed, begin, is_open, reading).read(result);
            reading.is_good = true;
        }
    } catch (const std::exception &) {
        // A text that upstream's parser throws at does not follow the format; is_good tells.
    }
    return reading;
}

class Reader : public ReplyReader {
  public:
    explicit Reader(std::shared_ptr<const Format> format)
        : format_(std::move(format)), input_(format_->opening), begin_(input_.size()), n_good_(begin_), at_(begin_) {
        last_.settled = last_.nested_from = begin_;
    }

    std::vector<ReplyPiece> add(const std::string & text) override {
        const auto lock = origin_.lock(mutex_);
        input_ += text;
        advance(/*is_over =*/false);
        return std::exchange(pieces_, {});
    }

    std::vector<ReplyPiece> finish(bool is_whole) override {
        const auto lock = origin_.lock(mutex_);
        const bool was_malformed = is_malformed_;
        advance(/*is_over =*/true);
        if (!is_whole) {
            is_malformed_ = was_malformed;  // it was only cut off
        }
        return std::exchange(pieces_, {});
    }

    bool is_malformed() const override {
        const auto lock = origin_.lock(mutex_);
        return is_malformed_;
    }

  private:
    void advance(bool is_over) {
        // Each turn of the loop reads one message, or what is none; a reply may have several.
        while (is_plain_ ? !give_plain(is_over) : !follow(is_over)) {
        }
    }

    // Whether it is done; otherwise there is more to read, another message begins, or plain text.
    bool follow(bool is_over) {
        const size_t deep = first_too_deep();
        const bool is_deep = deep < input_.size();
        // What may be the beginning of a delimiter waits: until it is whole, upstream's parser may take it for
        // anything.
        const bool is_end = is_over && !is_deep;
        size_t n = deep - (is_end ? 0 : n_begun(deep));
        if (n <= n_good_ && !is_end) {
            if (is_deep) {
                leave();
            }
            return !is_deep;
        }
        if (is_end) {
            n += restore();
        }
        Reading now = read(n, !is_end);
        if (!shortened_.empty() && (!now.is_in_call || now.parts.size() > last_.parts.size())) {
            n += restore();
            now = read(n, !is_end);
        }
        if (!continues(now)) {
            give_longest(n + restore());
            leave();
            return false;
        }
        give(std::move(now), n);
        if (last_.has_ended) {
            return follow_on(is_over);
        }
        if (is_end && !is_blank(view(last_.settled, input_.size()))) {
            leave();
            return false;
        }
        shorten();
        return !is_deep;
    }

    void leave() {
        restore();
        begin_plain(last_.settled, last_.is_calling);
    }

    // --- what is read again and again

    // Upstream's parser calls itself for every bracket of JSON, and a stack has its end. Returns where one is that is
    // within too many others, or the end of the input. Brackets in texts do not count; those of a text that has not
    // been read do, until it has.
    size_t first_too_deep() const {
        constexpr int deepest = 128;
        int depth = 0;
        auto string = strings_.begin();
        for (size_t at = last_.nested_from; at < input_.size(); ++at) {
            if (string != strings_.end() && at == string->begin) {
                at = string->end;
                ++string;
                if (at >= input_.size()) {
                    break;
                }
            }
            const char c = input_[at];
            depth += c == '[' || c == '{' ? 1 : (c == ']' || c == '}') && depth > 0 ? -1 : 0;
            if (depth > deepest) {
                return at;
            }
        }
        return input_.size();
    }

    // Cuts out the middle of a long text, so that its end costs no more to read than its beginning. A text of a part
    // was given out, and a string of a call comes back by restore().
    void shorten() {
        constexpr size_t longest = 1024;
        constexpr size_t kept = 256;  // at both ends, more than a mark has
        if (last_.open_string) {
            const Span span = last_.open_string->span;
            if (span.end - span.begin > longest) {
                const size_t from = boundary(span.begin, span.begin + kept);
                const size_t to = boundary(from, span.end - kept);
                shortened_.push_back({from, input_.substr(from, to - from)});
                strings_.back().end = last_.open_string->span.end = span.end - cut(from, to);
            }
        } else if (!last_.parts.empty() && last_.parts.back().is_run) {
            Part & part = last_.parts.back();
            if (part.end - part.begin > longest) {
                const size_t from = boundary(part.begin, part.begin + kept);
                const size_t n_less = cut(from, boundary(from, part.end - kept));
                part.end -= n_less;
                last_.settled -= n_less;
                last_.nested_from -= n_less;
            }
        }
    }

    // A character that is in no mark takes the place of what is cut out, so that both ends do not become one. Returns
    // how many bytes there are less.
    size_t cut(size_t from, size_t to) {
        input_.replace(from, to - from, 1, filler);
        const size_t n_less = to - from - 1;
        n_good_ -= n_less;
        last_.end -= n_less;
        return n_less;
    }

    // Returns how many bytes there are more.
    size_t restore() {
        size_t n_more = 0;
        for (auto part = shortened_.rbegin(); part != shortened_.rend(); ++part) {
            input_.replace(part->begin, 1, part->text);
            const size_t n = part->text.size() - 1;
            for (Span & span : strings_) {
                span.begin += span.begin > part->begin ? n : 0;
                span.end += span.end > part->begin ? n : 0;
            }
            n_good_ += n;
            last_.end += n;
            n_more += n;
        }
        shortened_.clear();
        if (last_.open_string) {
            last_.open_string->span = strings_.back();
        }
        return n_more;
    }

    // The first place from `at` on, at or behind `least`, that is not within an escape or a character.
    size_t boundary(size_t at, size_t least) const {
        const bool has_escapes = last_.open_string && last_.open_string->has_escapes;
        for (; at < least; ++at) {
            if (has_escapes && input_[at] == '\\') {
                at += input_[at + 1] == 'u' ? 5 : 1;
            }
        }
        while ((static_cast<unsigned char>(input_[at]) & 0xC0U) == 0x80U) {
            ++at;
        }
        return at;
    }

    // Strings of the call that goes on, whose brackets are no JSON.
    void take_strings() {
        if (!strings_.empty() && strings_.front().begin < last_.nested_from) {
            strings_.clear();
        }
        if (last_.open_string) {
            const Span span = last_.open_string->span;
            if (strings_.empty() || strings_.back().begin != span.begin) {
                strings_.push_back(span);
            } else {
                strings_.back().end = span.end;
            }
        }
    }

    // After the end of a message, with text that is not in it.
    bool follow_on(bool is_over) {
        size_t at = last_.end;
        const std::string & opening = format_->opening;
        while (at < input_.size()) {
            const std::string_view rest = std::string_view(input_).substr(at);
            if (format_->needs_header && at >= n_searched_ && starts_with(rest, opening)) {
                restart(at);
                return false;
            }
            if (!is_over && ((format_->needs_header && starts_with(opening, rest)) ||
                             std::any_of(format_->marks.begin(), format_->marks.end(), [&](const auto & mark) {
                                 return mark.size() > rest.size() && starts_with(mark, rest);
                             }))) {
                return true;
            }
            const auto mark = std::find_if(format_->marks.begin(), format_->marks.end(),
                                           [&](const auto & one) { return starts_with(rest, one); });
            if (mark == format_->marks.end() && !is_space(rest[0])) {
                begin_plain(last_.end, false);
                return false;
            }
            at += mark == format_->marks.end() ? 1 : mark->size();
        }
        return true;
    }

    // Another message of the same reply; it has its own opening.
    void restart(size_t at) {
        input_.erase(0, at);
        begin_ = at_ = 0;
        n_good_ = 0;
        last_ = {};
        strings_.clear();
        is_plain_ = false;
        n_searched_ = format_->opening.size();
    }

    Reading read(size_t n, bool is_open) const { return format_->read(input_.substr(0, n), begin_, is_open); }

    // Whether a reading keeps to what was given out.
    bool continues(const Reading & now) const {
        const std::vector<Part> & before = last_.parts;
        if (!now.is_good || now.parts.size() < before.size()) {
            return false;
        }
        for (size_t i = 0; i < before.size(); ++i) {
            const Part &was = before[i], &is = now.parts[i];
            const bool may_grow = i + 1 == before.size() && was.kind != ReplyPart::call;
            if (was.kind != is.kind || was.begin != is.begin || is.end < was.end || (is.end > was.end && !may_grow)) {
                return false;
            }
        }
        return true;
    }

    void give(Reading && now, size_t n) {
        const std::vector<Part> & before = last_.parts;
        for (size_t i = before.empty() ? 0 : before.size() - 1; i < now.parts.size(); ++i) {
            const Part & part = now.parts[i];
            const size_t from = i < before.size() ? before[i].end : part.begin;
            if (from < part.end) {
                pieces_.push_back({part.kind, std::string(view(from, part.end)), part.call});
            }
        }
        last_ = std::move(now);
        n_good_ = n;
        take_strings();
        is_malformed_ |= last_.has_skipped;
    }

    // Gives what the longest beginning says that follows the format, of less than `n` bytes.
    void give_longest(size_t n) {
        size_t good = n_good_;
        while (n - good > 1) {
            const size_t middle = good + (n - good) / 2;
            const size_t whole = whole_characters(middle);
            const size_t sure = std::max(good, whole - n_begun(whole));
            (sure == good || continues(read(sure, /*is_open =*/true)) ? good : n) = middle;
        }
        // Nothing that comes continues it, so it is taken as it is.
        good = whole_characters(good);
        for (const size_t end : {good, std::max(n_good_, good - n_begun(good))}) {
            Reading longest = read(end, /*is_open =*/false);
            if (continues(longest)) {
                give(std::move(longest), end);
                return;
            }
        }
    }

    // Upstream takes a character that has come in part for the rest of any mark.
    size_t whole_characters(size_t end) const {
        while (end > n_good_ && end < input_.size() && (static_cast<unsigned char>(input_[end]) & 0xC0U) == 0x80U) {
            --end;
        }
        return end;
    }

    // How many bytes before `end` may be the beginning of a delimiter; without them, others may be one in turn.
    size_t n_begun(size_t end) const {
        constexpr int most_turns = 16;  // a text may have many of the same character
        size_t n = 0;
        for (int turn = 0; turn < most_turns; ++turn) {
            size_t longest = 0;
            for (const std::string & delimiter : format_->delimiters) {
                longest = std::max(longest, begun_at_end(view(begin_, end - n), delimiter));
            }
            if (longest == 0) {
                break;
            }
            n += longest;
        }
        return n;
    }

    // --- text that does not follow the format

    void begin_plain(size_t at, bool is_calling) {
        is_plain_ = true;
        at_ = at;
        is_malformed_ |= is_calling || format_->needs_header;
        is_thinking_ = false;
        if (!last_.parts.empty() && last_.parts.back().kind == ReplyPart::reasoning && !format_->thought_end.empty()) {
            const std::string_view after = view(last_.parts.back().end, input_.size());
            is_thinking_ =
                !starts_with(trimmed(after.substr(0, 2 * format_->thought_end.size())), format_->thought_end);
        }
    }

    bool give_plain(bool is_over) {
        if (is_thinking_) {
            const std::string & end = format_->thought_end;
            const size_t found = input_.find(end, at_);
            give_up_to(found != std::string::npos ? found : input_.size() - (is_over ? 0 : n_of(end)),
                       ReplyPart::reasoning);
            if (found == std::string::npos) {
                return true;
            }
            at_ += end.size();
            is_thinking_ = false;
        }
        if (format_->needs_header) {
            const std::string & opening = format_->opening;
            const size_t found = input_.find(opening, std::max(at_, n_searched_));
            if (found != std::string::npos) {
                give_up_to(found, ReplyPart::answer);
                restart(found);
                return false;
            }
            give_up_to(input_.size() - (is_over ? 0 : n_of(opening)), ReplyPart::answer);
        } else {
            give_up_to(input_.size(), ReplyPart::answer);
        }
        return true;
    }

    size_t n_of(const std::string & word) const { return begun_at_end(view(at_, input_.size()), word); }

    void give_up_to(size_t end, ReplyPart part) {
        if (end <= at_) {
            return;
        }
        pieces_.push_back({part, input_.substr(at_, end - at_), std::nullopt});
        for (const std::string & mark : format_->marks) {
            const size_t from = std::max(begin_, at_ - std::min(at_, mark.size() - 1));
            is_malformed_ |= view(from, end).find(mark) != std::string_view::npos;
        }
        at_ = end;
    }

    std::string_view view(size_t from, size_t to) const { return std::string_view(input_).substr(from, to - from); }

    const std::shared_ptr<const Format> format_;
    const Origin origin_;
    mutable std::mutex mutex_;  // a stream may be closed while it steps
    std::string input_;         // what is parsed: of a first message, it begins with what the prompt has of it
    size_t begin_;              // where the reply begins in it
    Reading last_;              // of its first n_good_ bytes, whose parts were given out
    size_t n_good_;
    struct Shortened {
        size_t begin;  // of the filler
        std::string text;
    };
    static constexpr char filler = '\x01';
    std::vector<Shortened> shortened_;  // of the call that goes on
    std::vector<Span> strings_;         // the same
    bool is_plain_ = false;             // the rest, from at_, does not follow the format
    bool is_thinking_ = false;          // and stands in the reasoning
    size_t at_;
    size_t n_searched_ = 0;  // bytes in which no other message begins
    bool is_malformed_ = false;
    std::vector<ReplyPiece> pieces_;
};

class Parser : public ReplyParser {
  public:
    explicit Parser(const common_chat_params & chat) : format_(std::make_shared<const Format>(chat)) {}

    std::unique_ptr<ReplyReader> begin() const override { return std::make_unique<Reader>(format_); }

  private:
    std::shared_ptr<const Format> format_;
};

}  // namespace

std::shared_ptr<const ReplyParser> make_reply_parser(const common_chat_params & chat) {
    return std::make_shared<const Parser>(chat);
}

}  // namespace overspill
