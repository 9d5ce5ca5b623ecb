// Force-included into ggml's AMX source when GCC compiles it.
//
// Before GCC 14, _tile_loadconfig tells the compiler that it reads 8 bytes of the tile
// configuration. It reads 64: the compiler drops the stores to the other 56, the
// configuration is invalid, and the first AMX instruction dies of SIGILL.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 14 && defined(__AMX_TILE__)

#include <immintrin.h>

static inline void overspill_tile_loadconfig(const void * config) {
    using Config = const unsigned char[64];
    __asm__ volatile("ldtilecfg\t%X0" : : "m"(*static_cast<Config *>(config)));
}

#undef _tile_loadconfig
#define _tile_loadconfig(config) overspill_tile_loadconfig(config)

#endif
