#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "text/chat_template.h"
#include "text/reply_parser.h"

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>
#include <utility>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

py::dict render_chat(const ChatTemplate & chat, std::string messages, std::string tools, std::string tool_choice,
                     std::string json_schema, bool enable_thinking, bool add_generation_prompt,
                     std::map<std::string, std::string> variables) {
    ChatOptions options{std::move(messages)};
    options.tools = std::move(tools);
    options.tool_choice = std::move(tool_choice);
    options.json_schema = std::move(json_schema);
    options.enable_thinking = enable_thinking;
    options.add_generation_prompt = add_generation_prompt;
    options.variables = std::move(variables);
    const ChatPrompt prompt = without_gil([&] { return chat.render(options); });
    py::dict result;
    result["text"] = lenient_str(prompt.text);
    result["grammar"] = prompt.grammar.empty() ? py::object(py::none()) : py::object(lenient_str(prompt.grammar));
    result["trigger_patterns"] = prompt.start.trigger_patterns;
    result["trigger_tokens"] = prompt.start.trigger_tokens;
    result["begun"] = prompt.start.begun;
    result["named"] = prompt.named;
    result["stop"] = prompt.stop;
    result["parser"] = std::const_pointer_cast<ReplyParser>(prompt.parser);  // for pybind11, which knows no const
    return result;
}

py::tuple parse_reply(const ReplyParser & parser, const std::string & text, bool is_partial) {
    const Reply reply = without_gil([&] { return parser.parse(text, is_partial); });
    py::list calls;
    for (const ToolCall & call : reply.tool_calls) {
        calls.append(py::make_tuple(lenient_str(call.name), lenient_str(call.arguments), lenient_str(call.id)));
    }
    return py::make_tuple(lenient_str(reply.reasoning), lenient_str(reply.content), calls);
}

}  // namespace

void bind_chat(py::module_ & m) {
    py::class_<ChatTemplate>(m, "ChatTemplate", py::is_final())
        .def("render", &render_chat, "messages"_a, py::kw_only(), "tools"_a, "tool_choice"_a, "json_schema"_a,
             "enable_thinking"_a, "add_generation_prompt"_a, "variables"_a)
        .def_property_readonly("source", [](const ChatTemplate & chat) { return lenient_str(chat.source()); });
    py::class_<ReplyParser, std::shared_ptr<ReplyParser>>(m, "ReplyParser", py::is_final())
        .def("parse", &parse_reply, "text"_a, "is_partial"_a);
}

}  // namespace overspill
