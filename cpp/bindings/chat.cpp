#include "bindings/bindings.h"
#include "bindings/convert.h"
#include "bindings/gil.h"
#include "text/chat_template.h"
#include "text/reply_form.h"
#include "text/reply_parser.h"

#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>
#include <utility>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

std::unique_ptr<ChatTemplate> new_chat_template(const std::shared_ptr<Model> & model, const std::string & source) {
    return without_gil([&] { return std::make_unique<ChatTemplate>(*model, source); });
}

ReplyForm form(const ChatTemplate & chat, std::string messages, std::string tools, ToolChoice tool_choice,
               std::string json_schema, bool enable_thinking, std::map<std::string, std::string> variables) {
    ChatOptions options{std::move(messages)};
    options.tools = std::move(tools);
    options.tool_choice = tool_choice;
    options.json_schema = std::move(json_schema);
    options.enable_thinking = enable_thinking;
    options.variables = std::move(variables);
    return without_gil([&] { return chat.form(options); });
}

}  // namespace

void bind_chat(py::module_ & m) {
    py::native_enum<ToolChoice>(m, "ToolChoice", "enum.Enum")
        .value("auto", ToolChoice::automatic)
        .value("required", ToolChoice::required)
        .value("none", ToolChoice::none)
        .finalize();

    py::class_<ToolCall>(m, "ToolCall", py::is_final())
        .def_property_readonly("name", lenient(&ToolCall::name))
        .def_property_readonly("arguments", lenient(&ToolCall::arguments))
        .def_property_readonly("id", lenient(&ToolCall::id));
    py::class_<Reply>(m, "Reply", py::is_final())
        .def_property_readonly("reasoning", lenient(&Reply::reasoning))
        .def_property_readonly("content", lenient(&Reply::content))
        .def_readonly("tool_calls", &Reply::tool_calls);
    py::class_<ReplyParser, std::shared_ptr<ReplyParser>>(m, "ReplyParser", py::is_final())
        .def(
            "parse",
            [](const ReplyParser & parser, const std::string & text, bool is_partial) {
                return without_gil([&] { return parser.parse(text, is_partial); });
            },
            "text"_a, "is_partial"_a);

    py::class_<ReplyForm>(m, "ReplyForm", py::is_final())
        .def(py::init<>())
        .def_readonly("named", &ReplyForm::named)
        .def_readwrite("droppable", &ReplyForm::droppable)
        .def_property_readonly("generation_prompt", lenient(&ReplyForm::generation_prompt))
        .def_property_readonly("parser", [](const ReplyForm & form) {
            return std::const_pointer_cast<ReplyParser>(form.parser);  // for pybind11, which knows no const
        });
    py::class_<ChatTemplate>(m, "ChatTemplate", py::is_final())
        .def(py::init(&new_chat_template), "model"_a, "source"_a)
        .def("form", &form, "messages"_a, py::kw_only(), "tools"_a, "tool_choice"_a, "json_schema"_a,
             "enable_thinking"_a, "variables"_a)
        .def(
            "amended", [](const ChatTemplate & chat, bool with_tools) { return lenient_str(chat.amended(with_tools)); },
            "with_tools"_a);
}

}  // namespace overspill
