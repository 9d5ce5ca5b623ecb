// Bytes in pieces give the text that they give at once, and it is UTF-8.

#include "base/utf8_buffer.h"

#include <cstdint>
#include <cstdlib>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const std::string bytes(reinterpret_cast<const char *>(data), size);
    const size_t piece = size == 0 ? 1 : 1 + data[0] % 7;
    overspill::Utf8Buffer buffer;
    std::string text;
    for (size_t at = 0; at < size; at += piece) {
        buffer.push(std::string_view(bytes).substr(at, piece), text);
    }
    buffer.flush(text);
    if (text != overspill::valid_utf8(bytes) || text != overspill::valid_utf8(text)) {
        std::abort();
    }
    return 0;
}
