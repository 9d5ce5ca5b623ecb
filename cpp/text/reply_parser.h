// Text as replies: what of it is reasoning, what the answer, what calls of tools.
#pragma once

#include <memory>
#include <string>
#include <vector>

struct common_chat_params;  // of llama.cpp's common library

namespace overspill {

struct ToolCall {
    std::string name;
    std::string arguments;  // JSON, incomplete while it comes
    std::string id;         // empty if the model gives none
};

struct Reply {
    std::string reasoning;
    std::string content;
    std::vector<ToolCall> tool_calls;
};

class ReplyParser {
  public:
    virtual ~ReplyParser() = default;
    // What a reply says, or so far. From any thread. Throws Error if it does not follow the model's own format.
    virtual Reply parse(const std::string & text, bool is_partial) const = 0;
};

// The one that goes with the template that made `chat`.
std::shared_ptr<const ReplyParser> make_reply_parser(const common_chat_params & chat, bool parses_tools);

}  // namespace overspill
