// Included by force before ggml-alloc.c and ggml-backend.cpp of llama.cpp, which write into some of the memory that
// they ask for without looking whether they have it. Here that is a failed assertion, as upstream's others, which
// cpp/base/assertions.h makes an exception.
#pragma once

#include <ggml.h>

#include <stdlib.h>
#include <string.h>
#ifdef __cplusplus
#include <algorithm>
#include <vector>
#endif

static inline void * overspill_obtained(void * memory) {
    GGML_ASSERT(memory != NULL);
    return memory;
}

#define malloc(n_bytes) overspill_obtained(malloc(n_bytes))
#define calloc(n, n_bytes) overspill_obtained(calloc(n, n_bytes))
#define realloc(memory, n_bytes) overspill_obtained(realloc(memory, n_bytes))
