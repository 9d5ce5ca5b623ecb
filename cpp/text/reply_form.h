// How the reply to a conversation is to be made, and read.
#pragma once

#include "sample/grammar.h"
#include "text/reply_parser.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace overspill {

struct ReplyForm {
    std::optional<std::string> grammar = {};  // GBNF that the reply must follow
    Grammar::Start start = {};                // from when on it must
    std::vector<int32_t> named = {};          // special tokens whose names are part of the text, for the parser
    std::vector<std::string> stop = {};
    std::string generation_prompt = {};  // the end of the prompt, with which the parser begins
    // When the context is full: spans [from, to) of the prompt's tokens that may be dropped, in their order, one each
    // time.
    std::vector<std::pair<uint32_t, uint32_t>> droppable = {};
    std::shared_ptr<const ReplyParser> parser = {};  // of the reply's text
};

}  // namespace overspill
