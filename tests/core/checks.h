// Checks that are counted, and told of when they fail.
#pragma once

#include <cstdio>
#include <string>

inline int n_checks = 0;
inline int n_failures = 0;

inline void check(bool holds, const std::string & what) {
    ++n_checks;
    if (!holds) {
        ++n_failures;
        std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    }
}

template <typename Expected, typename Work>
void check_throws(Work && work, const std::string & text, const std::string & what) {
    try {
        work();
        check(false, what + ": nothing was thrown");
    } catch (const Expected & error) {
        check(std::string(error.what()).find(text) != std::string::npos, what + ": " + error.what());
    }
}
