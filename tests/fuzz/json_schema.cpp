// A schema becomes a grammar, or is refused as an argument.

#include "sample/json_schema.h"

#include <cstdint>
#include <stdexcept>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    try {
        overspill::grammar_of_json_schema(std::string(reinterpret_cast<const char *>(data), size));
    } catch (const std::invalid_argument &) {
    }
    return 0;
}
