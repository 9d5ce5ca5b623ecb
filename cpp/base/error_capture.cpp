#include "base/error_capture.h"

#include <utility>

namespace overspill {

namespace {

thread_local ErrorCapture * capture = nullptr;

}  // namespace

ErrorCapture::ErrorCapture(bool every_level) : every_level_(every_level), outer_(std::exchange(capture, this)) {}

ErrorCapture::~ErrorCapture() {
    capture = outer_;
}

void ErrorCapture::keep(const std::string & line, bool is_error) {
    if (capture != nullptr && (is_error || capture->every_level_)) {
        capture->lines_.push_back(line);
    }
}

std::string ErrorCapture::reason(const std::string & otherwise) const {
    if (lines_.empty()) {
        return otherwise;
    }
    // Upstream reports the cause first and then every function that gave up because of it; a
    // line with this mark holds the text of the exception.
    static const std::string mark = "error loading model: ";
    for (const auto & line : lines_) {
        const size_t start = line.find(mark);
        if (start != std::string::npos && line.find("error loading model hyperparameters", start) != start) {
            return line.substr(start + mark.size());
        }
    }
    const std::string & line = lines_.front();
    const size_t colon = line.find(": ");
    const bool names_function = colon != std::string::npos && line.find(' ') > colon;
    return names_function ? line.substr(colon + 2) : line;
}

}  // namespace overspill
