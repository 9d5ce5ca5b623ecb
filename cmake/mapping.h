// Included by force before llama-mmap.cpp of llama.cpp, which maps files.
//
// There a mapped file is read whole within one call of the system, which tells no progress, cannot be interrupted, and
// drives itself out of RAM where the file is larger. Here the pages come when they are used:
// cpp/device/mapped_pages.h reads those that stay in RAM, in pieces, where there is room for them.
#pragma once

#ifdef __linux__
#include <sys/mman.h>

#undef MAP_POPULATE
#define MAP_POPULATE 0

static inline int advise_without_reading(void * address, size_t n_bytes, int advice) {
    return advice == POSIX_MADV_WILLNEED ? 0 : posix_madvise(address, n_bytes, advice);
}
#define posix_madvise advise_without_reading
#endif
