#include "text/reply_parser.h"

#include "base/error.h"

#include <chat.h>

#include <stdexcept>

namespace overspill {

namespace {

// Upstream's parser calls itself for every bracket of JSON, and a stack has its end. Brackets in texts count as well:
// where a text begins cannot be told before it is parsed.
void check_depth(const std::string & text) {
    constexpr int deepest = 128;
    int depth = 0;
    for (const char c : text) {
        depth += c == '[' || c == '{' ? 1 : (c == ']' || c == '}') && depth > 0 ? -1 : 0;
        if (depth > deepest) {
            throw std::runtime_error("brackets are nested more than " + std::to_string(deepest) + " deep");
        }
    }
}

class Parser : public ReplyParser {
  public:
    Parser(const common_chat_params & chat, bool parses_tools) : params_(chat) {
        params_.reasoning_format = COMMON_REASONING_FORMAT_AUTO;
        params_.parse_tool_calls = parses_tools;
        if (!chat.parser.empty()) {
            params_.parser.load(chat.parser);
        }
    }

    Reply parse(const std::string & text, bool is_partial) const override {
        try {
            check_depth(text);
            const common_chat_msg message = common_chat_parse(text, is_partial, params_);
            Reply reply{message.reasoning_content, message.render_content(""), {}};
            for (const common_chat_tool_call & call : message.tool_calls) {
                reply.tool_calls.push_back({call.name, call.arguments, call.id});
            }
            return reply;
        } catch (const std::exception & error) {
            throw Error(one_line_of(error));
        }
    }

  private:
    common_chat_parser_params params_;
};

}  // namespace

std::shared_ptr<const ReplyParser> make_reply_parser(const common_chat_params & chat, bool parses_tools) {
    return std::make_shared<const Parser>(chat, parses_tools);
}

}  // namespace overspill
