// A reply is read in the format of a template, and says the same however it is cut.

#include "base/utf8_buffer.h"
#include "inputs.h"
#include "text/chat_template.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace {

std::vector<std::shared_ptr<const overspill::ReplyParser>> parsers;

// What the reply says, by part.
std::array<std::string, 3> read(const overspill::ReplyParser & parser, const std::string & text, size_t piece) {
    std::array<std::string, 3> said;
    const auto keep = [&said](const std::vector<overspill::ReplyPiece> & pieces) {
        for (const overspill::ReplyPiece & one : pieces) {
            said.at(static_cast<size_t>(one.part)) += one.text;
        }
    };
    const auto reader = parser.begin();
    for (size_t at = 0; at < text.size();) {
        size_t end = std::min(text.size(), at + piece);
        while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80) {
            ++end;  // tokens' texts are whole characters
        }
        keep(reader->add(text.substr(at, end - at)));
        at = end;
    }
    keep(reader->finish(/*is_whole =*/true));
    return said;
}

}  // namespace

// Takes the formats of all templates in the folder that OVERSPILL_FUZZ_TEMPLATES names.
extern "C" int LLVMFuzzerInitialize(int *, char ***) {
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
    for (const auto & file : files) {
        std::ifstream stream(file);
        const std::string source{std::istreambuf_iterator<char>(stream), {}};
        for (const std::string & offered : {std::string(), tools}) {
            options.tools_by_call = options.tools_by_parameter = options.tools = offered;
            try {
                parsers.push_back(overspill::ChatTemplate(*model, source).form(options).parser);
            } catch (const std::exception &) {  // one that wants other messages, or knows no tools
            }
        }
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 3) {
        return 0;
    }
    const auto & parser = *parsers.at((data[0] + 256U * data[1]) % parsers.size());
    const std::string text = overspill::valid_utf8({reinterpret_cast<const char *>(data) + 3, size - 3});
    if (read(parser, text, text.size()) != read(parser, text, 1U + data[2] % 16U)) {
        std::abort();
    }
    return 0;
}
