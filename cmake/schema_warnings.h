// Included by force before json-schema-to-grammar.cpp of llama.cpp, which prints its only warning
// to standard error: that part of a schema was left out of the grammar. We make an error of it.
#pragma once

#include <cstdio>

void overspill_schema_warning(const char * format, const char * text);

#define fprintf(stream, ...) overspill_schema_warning(__VA_ARGS__)
