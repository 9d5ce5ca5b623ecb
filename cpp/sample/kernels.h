// The passes over a whole row of logits, built once per instruction set.
//
// Every build of them gives the same bits: they are the same sixteen lanes of IEEE single
// precision, in the same order, with fused multiply-add in the same places and nowhere else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace overspill {

// Rows are cut into blocks of so many logits; the last may be shorter.
constexpr size_t block_size = 256;
constexpr size_t block_count(size_t n) {
    return (n + block_size - 1) / block_size;
}

// One bit per token, the lowest first; a token whose bit is not set counts as -inf.
using TokenBits = const uint32_t *;

// What exp_sums adds up: exp((logit - largest) * scale) for every logit of at least `low`.
struct ExpSumOptions {
    float largest;  // nothing in the range is above it
    float scale;    // 1 / temperature
    float low;      // finite
    float split;    // only for exp_sums_split
};

struct Kernels {
    const char * name;

    // Writes the maximum of each block and returns whether no logit is NaN, masked ones included.
    bool (*block_maxima)(const float * logits, size_t n, TokenBits allowed, float * maxima);

    // Writes the sum of each block. Blocks whose maximum is below `low` are not looked at.
    void (*exp_sums)(const float * logits, size_t n, TokenBits allowed, const float * maxima,
                     const ExpSumOptions & options, float * sums);
    // The same, and of each block the part of the sum from logits that are at least `split`.
    void (*exp_sums_split)(const float * logits, size_t n, TokenBits allowed, const float * maxima,
                           const ExpSumOptions & options, float * sums, float * parts);
    // The same, and the sums of exp(x) * x, where x is the scaled difference from the largest.
    void (*exp_sums_weighted)(const float * logits, size_t n, TokenBits allowed, const float * maxima,
                              const ExpSumOptions & options, float * sums, float * weighted);

    // exp((logit - largest) * scale), one by one; 0 if it is under 1e-37.
    void (*exps)(const float * logits, size_t n, float largest, float scale, float * out);

    // Writes the ids of the logits in [low, high), low finite, in their order, and returns how many.
    size_t (*find)(const float * logits, size_t n, TokenBits allowed, const float * maxima, float low, float high,
                   int32_t * ids);

    // Writes, of each block, the sum of (logit - largest) and of its square over the logits that
    // are not -inf, and returns how many those are.
    size_t (*moments)(const float * logits, size_t n, TokenBits allowed, float largest, float * sums, float * squares);
};

// The best that this CPU has, or the one that the environment variable OVERSPILL_SIMD names.
// Throws std::invalid_argument if this CPU or this build has no such one.
const Kernels & kernels();

// All that this CPU can run; "scalar", which every build has, comes first, the fastest last.
std::vector<const Kernels *> available_kernels();

}  // namespace overspill
