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

struct ChatOptions {
    std::string messages;    // JSON, as OpenAI's API has them
    std::string tools = {};  // the same; empty: none
    ToolChoice tool_choice = ToolChoice::automatic;
    std::string json_schema = {};                       // of the reply; empty: none
    std::string schema_grammar = {};                    // its rules in GBNF, of which `fits` is what fits
    bool enable_thinking = true;                        // of models that can do without
    bool add_generation_prompt = true;                  // what asks for the reply
    std::map<std::string, std::string> variables = {};  // more for the template, as JSON
};

// A conversation as the model gets it, and the form of the reply to it.
struct ChatPrompt {
    std::string text;
    ReplyForm form;
};

class ChatTemplate {
  public:
    // `source` in Jinja; empty: the model's own. Throws Error if that is missing or has mistakes.
    // Does not keep the model alive.
    ChatTemplate(const Model & model, const std::string & source);
    ~ChatTemplate();
    ChatTemplate(const ChatTemplate &) = delete;
    ChatTemplate & operator=(const ChatTemplate &) = delete;

    // From any thread. Throws ClosedError, and std::invalid_argument if the messages or tools are none, or the template
    // refuses them.
    ChatPrompt render(const ChatOptions & options) const;
    const std::string & source() const { return source_; }

    // Whether the model has one of its own.
    static bool exists(const Model & model);

  private:
    struct Templates;
    std::weak_ptr<llama_model> model_;
    std::unique_ptr<Templates> templates_;
    std::string source_;
};

}  // namespace overspill
