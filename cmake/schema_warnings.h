// Included by force before json-schema-to-grammar.cpp of llama.cpp, which prints its only warning to standard error:
// that a part of a schema, which is a tool's, was left out of the grammar for its arguments.
#pragma once

#include <cstdio>

#define fprintf(...) static_cast<void>(0)
