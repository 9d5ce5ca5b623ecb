// Text as replies: what of it is reasoning, what the answer, what calls of tools.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

struct common_chat_params;  // of llama.cpp's common library

namespace overspill {

struct ToolCall {
    std::string name;
    std::string arguments;  // JSON, if the model has written JSON
    std::string id;         // empty if the model gives none
};

enum class ReplyPart { reasoning, answer, call };

struct ReplyPiece {
    ReplyPart part;
    std::string text;              // of a call: as the model wrote it, with its marks
    std::optional<ToolCall> call;  // of a call, which is complete
};

// Reads one reply as it comes. All of its text is in one of the pieces, or a mark of the model's format: what does not
// follow the format is in the answer, or in the reasoning that it stands in. A piece is never taken back.
class ReplyReader {
  public:
    virtual ~ReplyReader() = default;
    // What is sure by now. Text that may become a mark or a call waits.
    virtual std::vector<ReplyPiece> add(const std::string & text) = 0;
    // The rest; `is_whole` says that the model has ended the reply by itself.
    virtual std::vector<ReplyPiece> finish(bool is_whole) = 0;
    // Whether the reply has left the format, so that marks may be in the pieces.
    virtual bool is_malformed() const = 0;
};

// The format of a model's replies. From any thread.
class ReplyParser {
  public:
    virtual ~ReplyParser() = default;
    virtual std::unique_ptr<ReplyReader> begin() const = 0;
};

// The one that goes with the template that made `chat`.
std::shared_ptr<const ReplyParser> make_reply_parser(const common_chat_params & chat);

}  // namespace overspill
