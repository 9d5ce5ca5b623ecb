// What the core throws. A caller's mistake is std::invalid_argument, naming the argument and
// the range; everything else is an Error, whose text is one line for the user.
#pragma once

#include "base/utf8_buffer.h"

#include <algorithm>
#include <cstddef>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

namespace overspill {

inline std::string one_line_of(std::string text) {
    std::replace_if(text.begin(), text.end(), [](char c) { return c == '\n' || c == '\r'; }, ' ');
    return text;
}

// What of a text that a file or upstream had a part in belongs into a message.
inline std::string beginning_of(std::string text) {
    constexpr size_t longest = 500;
    if (text.size() > longest) {
        text.resize(longest);
        text += "...";
    }
    return text;
}

struct Error : std::runtime_error {
    // The text may quote a damaged file, or a file's name, which may be any bytes.
    explicit Error(const std::string & text) : std::runtime_error(one_line_of(valid_utf8(text))) {}
};

// The file is missing, damaged, or not a model that can be loaded.
struct ModelLoadError : Error {
    using Error::Error;
};

// A device refused memory that a model or its context needs.
struct OutOfMemoryError : Error {
    OutOfMemoryError(const std::string & text, std::string device_name, size_t needed)
        : Error(text), device(std::move(device_name)), needed_bytes(needed) {}
    std::string device;   // llama.cpp's name for it
    size_t needed_bytes;  // in one piece; 0 if llama.cpp does not say
};

// Prompt and reply do not fit into the context.
struct ContextFullError : Error {
    using Error::Error;
};

// The model was closed.
struct ClosedError : Error {
    using Error::Error;
};

// The caller stopped a load or a step: by a progress callback, or by a signal.
struct CancelledError : Error {
    using Error::Error;
};

// A buffer would have to move while somebody looks at it. Python's BufferError.
struct ViewsInUseError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace overspill
