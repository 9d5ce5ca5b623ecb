// A reply is read in the format of a template, whole and in part, or refused by an Error.

#include "base/error.h"
#include "inputs.h"
#include "text/chat_template.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace {

using Parsers = std::vector<std::shared_ptr<const overspill::ReplyParser>>;

// Of every template in the folder that OVERSPILL_FUZZ_TEMPLATES names.
Parsers parsers() {
    const auto model = vocabulary();
    std::vector<std::filesystem::path> files;
    for (const auto & entry : std::filesystem::directory_iterator(environment("OVERSPILL_FUZZ_TEMPLATES"))) {
        files.push_back(entry.path());
    }
    std::sort(files.begin(), files.end());
    overspill::ChatOptions options;
    options.messages = R"([{"role": "user", "content": "Hi"}])";
    const std::string tools = R"([{"type": "function", "function": {"name": "get_weather", "description": "Weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}])";
    Parsers found;
    for (const auto & file : files) {
        std::ifstream stream(file);
        const std::string source{std::istreambuf_iterator<char>(stream), {}};
        for (const std::string & offered : {std::string(), tools}) {
            options.tools = offered;
            try {
                found.push_back(overspill::ChatTemplate(*model, source).render(options).form.parser);
            } catch (const std::exception &) {  // one that wants other messages, or the folder's readme
            }
        }
    }
    return found;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const Parsers all = parsers();
    if (size < 2) {
        return 0;
    }
    const auto & parser = all.at((data[0] + 256U * data[1]) % all.size());
    const std::string text(reinterpret_cast<const char *>(data) + 2, size - 2);
    for (const bool is_partial : {true, false}) {
        try {
            parser->parse(text, is_partial);
        } catch (const overspill::Error &) {
        }
    }
    return 0;
}
