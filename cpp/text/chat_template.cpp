#include "text/chat_template.h"

#include "base/error.h"
#include "model/vocabulary.h"

#include <chat.h>
#include <common.h>
#include <log.h>

#include <algorithm>
#include <stdexcept>

namespace overspill {

namespace {

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
constexpr std::string_view schema_mark = R"({"const":"overspill-reply"})";
constexpr std::string_view spaced_schema_mark = R"({"const": "overspill-reply"})";
constexpr std::string_view mark_in_grammar = R"("\"overspill-reply\"")";

bool replace_all(std::string & text, std::string_view from, std::string_view to) {
    bool found = false;
    for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
        text.replace(at, from.size(), to);
        found = true;
    }
    return found;
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
    try {
        templates_->of_model = common_chat_templates_init(loaded.get(), source);
        source_ = common_chat_templates_source(templates_->of_model.get());
    } catch (const std::exception & error) {
        throw Error("the chat template has a mistake: " + one_line_of(error));
    }
}

ChatTemplate::~ChatTemplate() = default;

ChatPrompt ChatTemplate::render(const ChatOptions & options) const {
    common_chat_templates_inputs inputs;
    inputs.tool_choice = tool_choice_of(options.tool_choice);
    inputs.add_generation_prompt = options.add_generation_prompt;
    inputs.reasoning_format = COMMON_REASONING_FORMAT_AUTO;
    inputs.enable_thinking = options.enable_thinking;
    inputs.json_schema = options.json_schema.empty() ? "" : schema_mark;
    inputs.chat_template_kwargs = options.variables;
    const auto model = model_.lock();
    if (!model) {
        throw ClosedError("the model of the chat template is closed");
    }
    const llama_vocab & vocab = *llama_model_get_vocab(model.get());
    inputs.add_bos = llama_vocab_get_add_bos(&vocab);
    inputs.add_eos = llama_vocab_get_add_eos(&vocab);
    common_chat_params chat;
    try {
        inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(options.messages));
        if (!options.tools.empty()) {
            inputs.tools = common_chat_tools_parse_oaicompat(common_json::parse(options.tools));
        }
        chat = common_chat_templates_apply(templates_->of_model.get(), inputs);
    } catch (const std::exception & error) {
        throw std::invalid_argument("messages: " + one_line_of(error));
    }
    if (!options.json_schema.empty()) {
        // Some templates tell the model of the schema.
        replace_all(chat.prompt, schema_mark, options.json_schema);
        replace_all(chat.prompt, spaced_schema_mark, options.json_schema);
        if (!replace_all(chat.grammar, mark_in_grammar, "fits")) {
            chat.grammar = "root ::= fits\n";  // the template's replies have no form for it
            chat.grammar_lazy = false;
            chat.generation_prompt.clear();
        }
        chat.grammar += options.schema_grammar;
    }
    ReplyForm form;
    form.stop = chat.additional_stops;
    if (!chat.grammar.empty()) {
        form.grammar = chat.grammar;
    }
    if (chat.grammar_lazy) {
        take_triggers(chat, form.start);
    } else if (!chat.grammar.empty() && options.add_generation_prompt) {
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
    return {chat.prompt, std::move(form)};
}

}  // namespace overspill
