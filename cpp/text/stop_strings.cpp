#include "text/stop_strings.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace overspill {

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
    if (std::any_of(stops_.begin(), stops_.end(), [](const std::string & stop) { return stop.empty(); })) {
        throw std::invalid_argument("stop must not contain an empty string");
    }
}

std::string StopStrings::push(std::string text, bool & found) {
    if (stops_.empty()) {
        return text;
    }
    held_ += text;
    size_t first = std::string::npos;
    size_t n_held = 0;
    for (const auto & stop : stops_) {
        first = std::min(first, held_.find(stop));
        // The longest end of the text that is a beginning of the stop string.
        for (size_t n = std::min(stop.size() - 1, held_.size()); n > n_held; --n) {
            if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) {
                n_held = n;
            }
        }
    }
    found = first != std::string::npos;
    text = held_.substr(0, found ? first : held_.size() - n_held);
    held_.erase(0, found ? std::string::npos : text.size());
    return text;
}

std::string StopStrings::flush() {
    return std::exchange(held_, {});
}

}  // namespace overspill
