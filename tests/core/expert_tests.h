// A cache of experts on the tests' stand-in for a GPU.
#pragma once

#include <string>

// With any small model; of one without experts, nothing is cached.
void test_cached_experts(const std::string & path);
