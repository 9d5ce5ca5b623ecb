// Bytes in, whole characters out.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace overspill {

// Collects the bytes of tokens and gives them out as valid UTF-8. A character whose bytes are
// spread over tokens waits until it is whole. Bytes that cannot become one come out as U+FFFD,
// once for each maximal subpart (Unicode, chapter 3, "U+FFFD Substitution of Maximal
// Subparts"), which is what Python's decoder does with errors="replace".
class Utf8Buffer {
  public:
    // Appends what has become whole to `text`.
    void push(std::string_view bytes, std::string & text) {
        waiting_.append(bytes);
        size_t done = 0;
        while (done < waiting_.size()) {
            const Sequence sequence = look_at(done);
            if (sequence.kind == Kind::incomplete) {
                break;
            }
            if (sequence.kind == Kind::valid) {
                text.append(waiting_, done, sequence.length);
            } else {
                text.append(replacement);
            }
            done += sequence.length;
        }
        waiting_.erase(0, done);
    }

    // Appends a replacement for what still waits: nothing more will come.
    void flush(std::string & text) {
        if (!waiting_.empty()) {
            text.append(replacement);
            waiting_.clear();
        }
    }

  private:
    static constexpr const char * replacement = "\xEF\xBF\xBD";
    enum class Kind { valid, invalid, incomplete };
    struct Sequence {
        Kind kind;
        size_t length;
    };

    // Unicode, table 3-7: after some lead bytes the second byte has a narrower range.
    Sequence look_at(size_t start) const {
        const auto byte = [&](size_t offset) { return static_cast<unsigned char>(waiting_[start + offset]); };
        const unsigned char lead = byte(0);
        if (lead < 0x80) {
            return {Kind::valid, 1};
        }
        size_t length = 0;
        unsigned char low = 0x80;
        unsigned char high = 0xBF;
        if (lead >= 0xC2 && lead <= 0xDF) {
            length = 2;
        } else if (lead >= 0xE0 && lead <= 0xEF) {
            length = 3;
            low = lead == 0xE0 ? 0xA0 : low;
            high = lead == 0xED ? 0x9F : high;
        } else if (lead >= 0xF0 && lead <= 0xF4) {
            length = 4;
            low = lead == 0xF0 ? 0x90 : low;
            high = lead == 0xF4 ? 0x8F : high;
        } else {
            return {Kind::invalid, 1};
        }
        for (size_t i = 1; i < length; ++i) {
            if (start + i == waiting_.size()) {
                return {Kind::incomplete, i};
            }
            if (byte(i) < low || byte(i) > high) {
                return {Kind::invalid, i};
            }
            low = 0x80;
            high = 0xBF;
        }
        return {Kind::valid, length};
    }

    std::string waiting_;
};

inline std::string valid_utf8(std::string_view bytes) {
    std::string text;
    Utf8Buffer buffer;
    buffer.push(bytes, text);
    buffer.flush(text);
    return text;
}

}  // namespace overspill
