// Included by force before unicode.cpp of llama.cpp, which splits texts into words by std::regex.
//
// That calls itself for each character of a word, so that a long one overflows the stack; some of its expressions take
// the square of a text's length; and nothing ends it. The functions here take the place of unicode.cpp's template of
// the same name, which they are better matches than. CMakeLists.txt checks that upstream still calls it.
#pragma once

#include "llama.h"

#include <cstddef>
#include <string>
#include <vector>

// Asked now and then while this thread tokenizes; what it throws ends that. Null: nothing is asked.
LLAMA_API void overspill_poll_while_tokenizing(void (*poll)(void * data), void * data);

// To be called for each step of work that a text makes, or for several.
void overspill_tokenizing_step(size_t n = 1);

// Lengths of the words of each fragment, whose lengths are `offsets`, and of what is between them.
LLAMA_API std::vector<size_t> overspill_split(const std::u32string & text, const std::u32string & expression,
                                              const std::vector<size_t> & offsets);

inline std::vector<size_t> unicode_regex_split_stl(const std::string & text, const std::string & expression,
                                                   const std::vector<size_t> & offsets) {
    const auto wide = [](const std::string & bytes) {
        std::u32string characters(bytes.size(), U'\0');
        for (size_t i = 0; i < bytes.size(); ++i) {
            characters[i] = static_cast<unsigned char>(bytes[i]);
        }
        return characters;
    };
    return overspill_split(wide(text), wide(expression), offsets);
}

inline std::vector<size_t> unicode_regex_split_stl(const std::wstring & text, const std::wstring & expression,
                                                   const std::vector<size_t> & offsets) {
    return overspill_split({text.begin(), text.end()}, {expression.begin(), expression.end()}, offsets);
}
