#include "sample/json_schema.h"

#include <json-schema-to-grammar.h>

#include <algorithm>
#include <stdexcept>

namespace {

thread_local std::string schema_warning;

}  // namespace

void overspill_schema_warning(const char * format, const char * text);
void overspill_schema_warning(const char * /*format*/, const char * text) {
    schema_warning = text;
}

namespace overspill {

std::string grammar_of_json_schema(const std::string & schema) {
    schema_warning.clear();
    std::string grammar;
    try {
        grammar = json_schema_to_grammar(common_json::parse(schema), /*force_gbnf =*/true);
    } catch (const std::exception & error) {
        std::string why = error.what();
        std::replace(why.begin(), why.end(), '\n', ' ');
        for (const std::string prefix : {"JSON schema conversion failed: ", "JSON schema error at "}) {
            why.erase(0, why.rfind(prefix, 0) == 0 ? prefix.size() : 0);
        }
        throw std::invalid_argument("json_schema: " + why);
    }
    if (!schema_warning.empty()) {
        throw std::invalid_argument("json_schema: " + schema_warning +
                                    "; llguidance may be able to (see overspill.guidance)");
    }
    return grammar;
}

}  // namespace overspill
