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
#include <stdexcept>
#include <string>
#include <utility>

namespace py = pybind11;
using namespace py::literals;

namespace overspill {

namespace {

std::unique_ptr<ChatTemplate> new_chat_template(const std::shared_ptr<Model> & model, const std::string & source) {
    return without_gil([&] { return std::make_unique<ChatTemplate>(*model, source); });
}

ReplyForm form(const ChatTemplate & chat, std::string messages, std::string tools, std::string tools_by_call,
               std::string tools_by_parameter, ToolChoice tool_choice, bool has_schema, std::string rules,
               bool enable_thinking, std::map<std::string, std::string> variables) {
    ChatOptions options{std::move(messages)};
    options.tools = std::move(tools);
    options.tools_by_call = std::move(tools_by_call);
    options.tools_by_parameter = std::move(tools_by_parameter);
    options.tool_choice = tool_choice;
    options.has_schema = has_schema;
    options.rules = std::move(rules);
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
    py::native_enum<ReplyPart>(m, "ReplyPart", "enum.Enum")
        .value("reasoning", ReplyPart::reasoning)
        .value("answer", ReplyPart::answer)
        .value("call", ReplyPart::call)
        .finalize();
    py::class_<ReplyPiece>(m, "ReplyPiece", py::is_final())
        .def_readonly("part", &ReplyPiece::part)
        .def_property_readonly("text", lenient(&ReplyPiece::text))
        .def_readonly("call", &ReplyPiece::call);
    py::class_<ReplyReader>(m, "ReplyReader", py::is_final())
        .def(
            "add",
            [](ReplyReader & reader, const std::string & text) {
                return without_gil([&] { return reader.add(text); });
            },
            "text"_a)
        .def(
            "finish",
            [](ReplyReader & reader, bool is_whole) { return without_gil([&] { return reader.finish(is_whole); }); },
            "is_whole"_a)
        .def_property_readonly("is_malformed", &ReplyReader::is_malformed);

    py::class_<ReplyForm>(m, "ReplyForm", py::is_final())
        .def(py::init<>())
        .def_readonly("named", &ReplyForm::named)
        .def_readwrite("droppable", &ReplyForm::droppable)
        .def_property_readonly("generation_prompt", lenient(&ReplyForm::generation_prompt))
        .def("new_reader", [](const ReplyForm & form) {
            if (!form.parser) {
                throw std::invalid_argument("new_reader: the form is not of a chat's reply");
            }
            return form.parser->begin();
        });

    py::class_<ChatTemplate>(m, "ChatTemplate", py::is_final())
        .def(py::init(&new_chat_template), "model"_a, "source"_a)
        .def("form", &form, "messages"_a, py::kw_only(), "tools"_a, "tools_by_call"_a, "tools_by_parameter"_a,
             "tool_choice"_a, "has_schema"_a, "rules"_a, "enable_thinking"_a, "variables"_a)
        .def(
            "amended", [](const ChatTemplate & chat, bool with_tools) { return lenient_str(chat.amended(with_tools)); },
            "with_tools"_a);
}

}  // namespace overspill
