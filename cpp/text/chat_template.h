// Conversations as text: a model's chat template.
#pragma once

#include "model/model.h"
#include "text/reply_form.h"

#include <llama.h>

#include <map>
#include <memory>
#include <string>

namespace overspill {

enum class ToolChoice { automatic, required, none };

// A conversation, as llama.cpp's common library takes it.
struct ChatOptions {
    std::string messages;    // JSON, as OpenAI's API has them
    std::string tools = {};  // the same; empty: none
    // The tools with marks in place of all arguments, and in place of single ones: {"const": "overspill:NAME"} and
    // {"const": {"overspill": NAME}} stand for what fits a rule of this name.
    std::string tools_by_call = {}, tools_by_parameter = {};
    ToolChoice tool_choice = ToolChoice::automatic;
    bool has_schema = false;                            // the reply is what fits the rule `fits`
    std::string rules = {};                             // in GBNF, for both
    bool enable_thinking = true;                        // of models that can do without
    std::map<std::string, std::string> variables = {};  // more for the template, as JSON
};

// What a chat template says of replies. Python renders its prompts (engine/template.py), since llama.cpp's Jinja is not
// all of Jinja; llama.cpp knows the formats of replies.
class ChatTemplate {
  public:
    // `source` in Jinja; empty: the model's own. A template that llama.cpp cannot read has replies of plain text.
    // Throws Error if a model has none. Does not keep the model alive.
    ChatTemplate(const Model & model, const std::string & source);
    ~ChatTemplate();
    ChatTemplate(const ChatTemplate &) = delete;
    ChatTemplate & operator=(const ChatTemplate &) = delete;

    // The form of the reply to a conversation. From any thread. Throws ClosedError, and std::invalid_argument if the
    // model cannot be told of the tools or the schema.
    ReplyForm form(const ChatOptions & options) const;

    // The source in Jinja that the model's file has for conversations without or with tools; empty: none.
    static std::string source_of(const Model & model, bool with_tools);
    // The same as llama.cpp amends it; empty if it cannot read it.
    std::string amended(bool with_tools) const;

    // Whether the model has one of its own.
    static bool exists(const Model & model);

  private:
    struct Templates;
    std::weak_ptr<llama_model> model_;
    std::unique_ptr<Templates> templates_;
};

}  // namespace overspill
