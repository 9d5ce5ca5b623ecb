#pragma once

#include <stdexcept>
#include <string>

namespace overspill {

// Throws std::invalid_argument, naming the argument and the range.
template <typename T>
void check_range(const char * name, T value, T low, T high) {
    if (value < low || value > high) {
        throw std::invalid_argument(std::string(name) + " must be " + std::to_string(low) + " to " +
                                    std::to_string(high) + ", not " + std::to_string(value));
    }
}

}  // namespace overspill
