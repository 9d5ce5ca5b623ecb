#include "text/chat_template.h"

#include "base/error.h"
#include "model/vocabulary.h"

#include <chat.h>
#include <common.h>
#include <log.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>

namespace overspill {

namespace {

// What llama.cpp's Jinja may use up while it learns from a template: real ones make some ten thousand values.
class Budget {
  public:
    Budget() : before_(current), stack_(reinterpret_cast<std::uintptr_t>(this)) { current = this; }
    ~Budget() { current = before_; }
    Budget(const Budget &) = delete;
    Budget & operator=(const Budget &) = delete;

    void take(std::size_t n_bytes) {
        n_values_ += 1;
        n_bytes_ += n_bytes;
        const auto here = reinterpret_cast<std::uintptr_t>(&n_bytes);
        const std::uintptr_t depth = here < stack_ ? stack_ - here : here - stack_;
        if (n_values_ > most_values || n_bytes_ > most_bytes || depth > deepest) {
            is_spent_ = true;
        }
        if (is_spent_) {
            throw std::runtime_error("the template uses up too much");
        }
    }
    bool is_spent() const { return is_spent_; }

    static thread_local Budget * current;

  private:
    static constexpr std::size_t most_values = 1'000'000;
    static constexpr std::size_t most_bytes = std::size_t(1) << 24;
    static constexpr std::uintptr_t deepest = std::uintptr_t(1) << 18;  // bytes of the stack; some have 512 KiB

    Budget * before_;
    std::uintptr_t stack_;
    std::size_t n_values_ = 0;
    std::size_t n_bytes_ = 0;
    bool is_spent_ = false;
};

thread_local Budget * Budget::current = nullptr;

std::vector<int32_t> tokens_of(const llama_vocab & vocab, const std::string & text) {
    std::vector<int32_t> tokens = tokenize(vocab, text, /*add_special =*/false, /*parse_special =*/true);
    // Some tokenizers begin every text with a space.
    const std::string first = tokens.empty() ? "" : common_token_to_piece(&vocab, tokens[0], /*special =*/true);
    if (!first.empty() && first[0] == ' ' && text[0] != ' ') {
        tokens.erase(tokens.begin());
    }
    return tokens;
}

common_chat_tool_choice tool_choice_of(ToolChoice choice) {
    switch (choice) {
        case ToolChoice::required: return COMMON_CHAT_TOOL_CHOICE_REQUIRED;
        case ToolChoice::none: return COMMON_CHAT_TOOL_CHOICE_NONE;
        default: return COMMON_CHAT_TOOL_CHOICE_AUTO;
    }
}

void take_triggers(const common_chat_params & chat, Grammar::Start & start) {
    for (const common_grammar_trigger & trigger : chat.grammar_triggers) {
        switch (trigger.type) {
            case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN: start.trigger_tokens.push_back(trigger.token); break;
            case COMMON_GRAMMAR_TRIGGER_TYPE_WORD: start.trigger_patterns.push_back(regex_escape(trigger.value)); break;
            case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN: start.trigger_patterns.push_back(trigger.value); break;
            case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL:
                start.trigger_patterns.push_back("^(?:" + trigger.value + ")$");
                break;
        }
    }
}

// Templates' grammars get this schema in place of the reply's, whose own rules then take the place of its literal.
constexpr std::string_view schema_mark = R"({"const":"overspill:fits"})";

// Replaces literals that are marks by the rules that they name.
bool replace_marks(std::string & grammar) {
    struct Form {
        std::string_view before, after;
    };
    constexpr Form forms[] = {{R"("\"overspill:)", R"(\"")"}, {R"("{\"overspill\":\")", R"(\"}")"}};
    bool found = false;
    for (const auto & [before, after] : forms) {
        for (size_t at = grammar.find(before); at != std::string::npos; at = grammar.find(before, at)) {
            const size_t name = at + before.size();
            const size_t end = grammar.find(after, name);
            if (end == std::string::npos) {
                break;
            }
            grammar.replace(at, end + after.size() - at, grammar.substr(name, end - name));
            found = true;
        }
    }
    return found;
}

// Drops the text that llama.cpp lets go before a required call, without an end. Reasoning is in brackets, and stays.
void drop_text_before_calls(std::string & grammar) {
    constexpr std::string_view begin = "root ::= ", text = " until-";
    size_t at = grammar.find(begin);
    int depth = 0;
    for (bool in_literal = false; at < grammar.size() && grammar[at] != '\n'; at++) {
        const char c = grammar[at];
        if (c == '\\') {
            at++;
        } else if (c == '"') {
            in_literal = !in_literal;
        } else if (!in_literal && (c == '(' || c == ')')) {
            depth += c == '(' ? 1 : -1;
        } else if (!in_literal && depth == 0 && grammar.compare(at, text.size(), text) == 0) {
            size_t end = grammar.find_first_not_of("0123456789", at + text.size());
            end += end < grammar.size() && grammar[end] == '?';
            grammar.erase(at, end - at);
            return;
        }
    }
}

// Whether a format has arguments as one JSON object, whose schema its parser knows.
bool has_json_arguments(const common_chat_params & chat) {
    return chat.parser.find(R"("type":"schema")") != std::string::npos;
}

}  // namespace

struct ChatTemplate::Templates {
    common_chat_templates_ptr of_model;
};

bool ChatTemplate::exists(const Model & model) {
    const auto loaded = model.loaded();
    return llama_model_chat_template(loaded.get(), nullptr) != nullptr ||
           llama_model_chat_template(loaded.get(), "tool_use") != nullptr;
}

std::string ChatTemplate::source_of(const Model & model, bool with_tools) {
    const auto loaded = model.loaded();
    const char * source = llama_model_chat_template(loaded.get(), with_tools ? "tool_use" : nullptr);
    return source == nullptr ? "" : source;
}

ChatTemplate::ChatTemplate(const Model & model, const std::string & source)
    : templates_(std::make_unique<Templates>()) {
    model.tokenizer();  // which it needs
    const auto loaded = model.loaded();
    model_ = loaded;
    if (source.empty() && !exists(model)) {
        throw Error("the model has no chat template");
    }
    // Upstream's common library would print.
    common_log_set_verbosity_thold(-1);
    const Budget budget;
    try {
        templates_->of_model = common_chat_templates_init(loaded.get(), source);
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception &) {
        return;
    }
    if (budget.is_spent()) {
        templates_->of_model.reset();
    }
}

ChatTemplate::~ChatTemplate() = default;

std::string ChatTemplate::amended(bool with_tools) const {
    const common_chat_templates * templates = templates_->of_model.get();
    return templates == nullptr ? "" : common_chat_templates_source(templates, with_tools ? "tool_use" : "");
}

namespace {

// What llama.cpp makes of a conversation; nothing if it cannot cope with the template.
std::optional<common_chat_params> applied(const common_chat_templates * templates,
                                          const common_chat_templates_inputs & inputs) {
    if (templates == nullptr) {
        return std::nullopt;
    }
    const Budget budget;
    try {
        common_chat_params chat = common_chat_templates_apply(templates, inputs);
        return budget.is_spent() ? std::nullopt : std::make_optional(std::move(chat));
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception &) {
        return std::nullopt;
    }
}

}  // namespace

ReplyForm ChatTemplate::form(const ChatOptions & options) const {
    common_chat_templates_inputs inputs;
    inputs.tool_choice = tool_choice_of(options.tool_choice);
    inputs.reasoning_format = COMMON_REASONING_FORMAT_AUTO;
    inputs.enable_thinking = options.enable_thinking;
    inputs.json_schema = options.has_schema ? schema_mark : "";
    inputs.chat_template_kwargs = options.variables;
    const auto model = model_.lock();
    if (!model) {
        throw ClosedError("the model of the chat template is closed");
    }
    const llama_vocab & vocab = *llama_model_get_vocab(model.get());
    inputs.add_bos = llama_vocab_get_add_bos(&vocab);
    inputs.add_eos = llama_vocab_get_add_eos(&vocab);
    try {
        inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(options.messages));
    } catch (const std::exception & error) {
        throw std::invalid_argument("messages: " + one_line_of(beginning_of(error.what())));
    }
    const bool has_tools = !options.tools.empty() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE;
    const auto apply = [&](const std::string & tools) {
        if (!tools.empty()) {
            inputs.tools = common_chat_tools_parse_oaicompat(common_json::parse(tools));
        }
        std::optional<common_chat_params> made = applied(templates_->of_model.get(), inputs);
        if (!made) {
            // Its Jinja may fail for these messages alone. The form depends on their last one at most.
            common_chat_msg question;
            question.role = "user";
            question.content = "x";
            inputs.messages = {question};
            made = applied(templates_->of_model.get(), inputs);
        }
        return made;
    };
    std::optional<common_chat_params> made = apply(options.tools_by_call);
    if (made && has_tools && !has_json_arguments(*made)) {
        // One format divides values further, by their schemas.
        made = apply(made->format == COMMON_CHAT_FORMAT_PEG_MINIMAX_M3 ? options.tools : options.tools_by_parameter);
    }
    if (!made && has_tools && inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED) {
        throw std::invalid_argument("tool_choice must not be required: the template's form of calls is not known");
    }
    common_chat_params chat = made ? std::move(*made) : common_chat_params();
    const bool found = replace_marks(chat.grammar);
    if (has_tools && inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED) {
        drop_text_before_calls(chat.grammar);
    }
    if (options.has_schema && !found) {
        chat.grammar = "root ::= fits\n";  // the template's replies have no form for it
        chat.grammar_lazy = false;
        chat.generation_prompt.clear();
    }
    if (!chat.grammar.empty()) {
        chat.grammar += options.rules;
    }
    ReplyForm form;
    form.stop = chat.additional_stops;
    form.generation_prompt = chat.generation_prompt;
    if (!chat.grammar.empty()) {
        form.grammar = chat.grammar;
    }
    if (chat.grammar_lazy) {
        take_triggers(chat, form.start);
    } else if (!chat.grammar.empty()) {
        // The grammar begins with what asks for the reply, which is in the prompt already.
        form.start.begun = tokens_of(vocab, chat.generation_prompt);
    }
    for (const std::string & name : chat.preserved_tokens) {
        const std::vector<int32_t> tokens = tokens_of(vocab, name);
        if (tokens.size() == 1) {
            form.named.push_back(tokens[0]);
        }
    }
    form.parser = make_reply_parser(chat);
    return form;
}

}  // namespace overspill

void overspill_check_jinja_value(std::size_t n_bytes) {
    if (overspill::Budget::current != nullptr) {
        overspill::Budget::current->take(n_bytes);
    }
}
