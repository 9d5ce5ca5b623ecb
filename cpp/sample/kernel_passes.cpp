// The passes themselves. CMake compiles this file once per instruction set, with OVERSPILL_KERNELS
// set to its name. No inline function of the standard library is called here at run time: the linker
// keeps one copy of such a function, and that could be one that the CPU cannot run.
#include "sample/kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#if defined(OVERSPILL_AVX2) || defined(OVERSPILL_AVX512)
#include <immintrin.h>
#elif defined(OVERSPILL_NEON)
#include <arm_neon.h>
#elif defined(_MSC_VER)
#include <intrin.h>
#endif

namespace overspill::OVERSPILL_KERNELS {

namespace {

// --- What differs between instruction sets -------------------------------------------------

#if defined(OVERSPILL_AVX512)
typedef float Float __attribute__((vector_size(64)));
typedef int32_t Int __attribute__((vector_size(64)));
Float multiply_add(Float a, Float b, Float c) {
    return _mm512_fmadd_ps(a, b, c);
}
Float larger(Float a, Float b) {
    return a > b ? a : b;  // GCC 12 warns of its own _mm512_max_ps
}
uint32_t bits_at_least(Float x, float low) {
    return _mm512_cmp_ps_mask(x, Float{} + low, _CMP_GE_OQ);
}
#elif defined(OVERSPILL_AVX2)
typedef float Float __attribute__((vector_size(32)));
typedef int32_t Int __attribute__((vector_size(32)));
Float multiply_add(Float a, Float b, Float c) {
    return _mm256_fmadd_ps(a, b, c);
}
Float larger(Float a, Float b) {
    return _mm256_max_ps(a, b);
}
uint32_t bits_at_least(Float x, float low) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, Float{} + low, _CMP_GE_OQ)));
}
#elif defined(OVERSPILL_NEON)
typedef float Float __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));
Float multiply_add(Float a, Float b, Float c) {
    return vfmaq_f32(c, a, b);
}
Float larger(Float a, Float b) {
    return a > b ? a : b;
}
uint32_t bits_at_least(Float x, float low) {
    const uint32x4_t lanes = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(x, vdupq_n_f32(low)), lanes));
}
#else
using Float = float;
using Int = int32_t;
Float multiply_add(Float a, Float b, Float c) {
    return fmaf(a, b, c);
}
Float larger(Float a, Float b) {
    return a > b ? a : b;
}
uint32_t bits_at_least(Float x, float low) {
    return x >= low ? 1 : 0;
}
#endif

// --- Sixteen lanes, in as many registers as it takes -----------------------------------------

constexpr size_t n_lanes = 16;
constexpr size_t n_parts = n_lanes * sizeof(float) / sizeof(Float);
constexpr float infinity = std::numeric_limits<float>::infinity();

template <typename T>
struct Parts {
    T part[n_parts];
};
using Floats = Parts<Float>;
using Ints = Parts<Int>;

// Written without a loop, since GCC keeps in registers only what is indexed by constants early on.
template <typename T, typename Operation, size_t... i>
inline Parts<T> each(const Operation & operation, std::index_sequence<i...>) {
    return {{operation(i)...}};
}
template <typename T, typename Operation>
inline Parts<T> each(const Operation & operation) {
    return each<T>(operation, std::make_index_sequence<n_parts>{});
}

inline Floats all(float value) {
    return each<Float>([&](size_t) { return Float{} + value; });
}

inline Floats load(const float * from) {
    return each<Float>([&](size_t i) {
        Float result;
        std::memcpy(&result, from + i * sizeof(Float) / sizeof(float), sizeof result);
        return result;
    });
}

const int32_t lane_bits[n_lanes] = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                    1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};

// -inf where the token's bit is not set; `at` is a multiple of n_lanes.
inline Floats masked(const Floats & x, TokenBits allowed, size_t at) {
    const auto bits = static_cast<int32_t>((allowed[at / 32] >> (at % 32)) & 0xFFFFU);
    return each<Float>([&](size_t i) {
        Int lanes;
        std::memcpy(&lanes, lane_bits + i * sizeof(Int) / sizeof(int32_t), sizeof lanes);
        return ((Int{} + bits) & lanes) != Int{} ? x.part[i] : Float{} - infinity;
    });
}

inline size_t lowest_bit(uint32_t bits) {
#ifdef _MSC_VER
    unsigned long at;
    _BitScanForward(&at, bits);
    return at;
#else
    return static_cast<size_t>(__builtin_ctz(bits));
#endif
}

// The value where low <= x, elsewhere 0.
inline Floats where_at_least(const Floats & low, const Floats & x, const Floats & value) {
    return each<Float>([&](size_t i) { return low.part[i] <= x.part[i] ? value.part[i] : Float{}; });
}

inline void add(Floats & sum, const Floats & x) {
    sum = each<Float>([&](size_t i) { return sum.part[i] + x.part[i]; });
}

inline Floats product(const Floats & a, const Floats & b) {
    return each<Float>([&](size_t i) { return a.part[i] * b.part[i]; });
}

// Adds the value where low <= x. The same bits as adding 0 elsewhere, since sums are never -0.
inline void add_where_at_least(Floats & sum, const Floats & low, const Floats & x, const Floats & value) {
    sum = each<Float>([&](size_t i) { return low.part[i] <= x.part[i] ? sum.part[i] + value.part[i] : sum.part[i]; });
}

// Halves are taken together until one lane is left: the same order whatever the size of a register.
template <typename Operation>
inline float fold(const Floats & x, const Operation & operation) {
#ifdef OVERSPILL_SCALAR
    float lanes[n_lanes];
    std::memcpy(lanes, &x, sizeof lanes);
    for (size_t half = n_lanes / 2; half > 0; half /= 2) {
        for (size_t i = 0; i < half; ++i) {
            lanes[i] = operation(lanes[i], lanes[i + half]);
        }
    }
    return lanes[0];
#else
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eight[2];
    std::memcpy(eight, &x, sizeof eight);
    eight[0] = operation(eight[0], eight[1]);
    Four four[2];
    std::memcpy(four, eight, sizeof four);
    const Four lanes = operation(four[0], four[1]);
    return operation(operation(lanes[0], lanes[2]), operation(lanes[1], lanes[3]));
#endif
}

inline float sum_of(const Floats & a, const Floats & b) {
    const Floats sum = each<Float>([&](size_t i) { return a.part[i] + b.part[i]; });
    return fold(sum, [](auto left, auto right) { return left + right; });
}

// A block as the loop below wants it: the last of a row is filled up with -inf.
template <bool with_mask>
class Block {
  public:
    Block(const float * logits, size_t n, size_t begin, TokenBits allowed)
        : logits_(logits + begin), allowed_(with_mask ? allowed + begin / 32 : nullptr) {
        const size_t rest = n - begin;
        if (rest >= block_size) {
            return;
        }
        for (size_t i = 0; i < block_size; ++i) {
            filled_up_[i] = i < rest ? logits_[i] : -infinity;
        }
        logits_ = filled_up_;
        if constexpr (with_mask) {
            for (size_t i = 0; i < block_size / 32; ++i) {
                last_bits_[i] = i * 32 < rest ? allowed_[i] : 0;
            }
            allowed_ = last_bits_;
        }
    }
    Block(const Block &) = delete;
    Block & operator=(const Block &) = delete;

    // Runs work(masked logits, logits, accumulators). Two sets of accumulators take turns, so
    // that one does not wait for the other.
    template <typename Accumulators, typename Work>
    void for_each_vector(Accumulators & even, Accumulators & odd, const Work & work) const {
        for (size_t at = 0; at < block_size; at += 4 * n_lanes) {
            step(at, even, work);
            step(at + n_lanes, odd, work);
            step(at + 2 * n_lanes, even, work);
            step(at + 3 * n_lanes, odd, work);
        }
    }

  private:
    template <typename Accumulators, typename Work>
    void step(size_t at, Accumulators & to, const Work & work) const {
        const Floats x = load(logits_ + at);
        if constexpr (with_mask) {
            work(masked(x, allowed_, at), x, to);
        } else {
            work(x, x, to);
        }
    }

    const float * logits_;
    TokenBits allowed_;
    float filled_up_[block_size];
    uint32_t last_bits_[block_size / 32];
};

// --- The passes -----------------------------------------------------------------------------

template <bool with_mask>
bool block_maxima(const float * logits, size_t n, TokenBits allowed, float * maxima) {
    struct Found {
        Floats best;
        Ints not_a_number;
    };
    Found even{all(-infinity), {}};
    Found odd = even;
    for (size_t begin = 0; begin < n; begin += block_size) {
        even.best = all(-infinity);
        odd.best = even.best;
        Block<with_mask>(logits, n, begin, allowed)
            .for_each_vector(even, odd, [](const Floats & x, const Floats & raw, Found & found) {
                // NaN is never larger than a number.
                found.best = each<Float>([&](size_t i) { return larger(x.part[i], found.best.part[i]); });
                found.not_a_number =
                    each<Int>([&](size_t i) { return found.not_a_number.part[i] | (raw.part[i] != raw.part[i]); });
            });
        const Floats best = each<Float>([&](size_t i) { return larger(even.best.part[i], odd.best.part[i]); });
        maxima[begin / block_size] = fold(best, [](auto left, auto right) { return left > right ? left : right; });
    }
    const Ints either = each<Int>([&](size_t i) { return even.not_a_number.part[i] | odd.not_a_number.part[i]; });
    int32_t lanes[n_lanes];
    std::memcpy(lanes, &either, sizeof lanes);
    int32_t any = 0;
    for (const int32_t lane : lanes) {
        any |= lane;
    }
    return any == 0;
}

constexpr float log2_e = 1.44269504F;

// Wraps around far below the range of exp_of, where the caller drops the result.
template <typename I>
inline I add_to_exponent(I bits, I power) {
    constexpr int exponent_at = 23;
    if constexpr (sizeof(I) == sizeof(int32_t)) {
        const auto sum = static_cast<uint32_t>(bits) + (static_cast<uint32_t>(power) << exponent_at);
        return static_cast<int32_t>(sum);
    } else {
        return bits + (power << exponent_at);
    }
}

// exp((x - largest) * scale), where the exponent of 2 that this comes to is in -126 to 1. Its integer
// part goes into the exponent; a polynomial does the rest, -0.5 to 0.5, within 1e-7 (fitted for the
// least relative error). Exactly 1 for the largest at any scale.
inline Floats exp_of(const Floats & x, float largest, float scale) {
    const Float to_integer = Float{} + 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const Float factor = Float{} + scale * log2_e;
    return each<Float>([&](size_t i) {
        const Float difference = x.part[i] - largest;
        const Float shifted = multiply_add(difference, factor, to_integer);
        const Float rest = multiply_add(difference, factor, to_integer - shifted);
        Float p = multiply_add(Float{} + 1.326472731307149e-3F, rest, Float{} + 9.671512991189957e-3F);
        p = multiply_add(p, rest, Float{} + 5.550733581185341e-2F);
        p = multiply_add(p, rest, Float{} + 2.4022242426872253e-1F);
        p = multiply_add(p, rest, Float{} + 6.931470036506653e-1F);
        p = multiply_add(p, rest, Float{} + 1.0F);
        Int bits;
        Int power;
        std::memcpy(&bits, &p, sizeof bits);
        std::memcpy(&power, &shifted, sizeof power);
        bits = add_to_exponent(bits, power);
        Float result;
        std::memcpy(&result, &bits, sizeof result);
        return result;
    });
}

// Below this the terms are under 1e-37 and would leave the range of the exponent.
inline float least_logit(const ExpSumOptions & o) {
    return o.largest - 87.0F / o.scale;
}

enum class Second { none, split, weighted };

// Without a cut, what would leave the range of the exponent counts as 1e-38, which is cheaper than leaving it out.
template <bool with_mask, bool with_cut, Second second>
void exp_sums(const float * logits, size_t n, TokenBits allowed, const float * maxima, const ExpSumOptions & o,
              float * sums, float * seconds) {
    const float least = least_logit(o);
    const float low_or_least = with_cut ? o.low : least;
    const Floats low = all(low_or_least);
    const Floats split = all(o.split > low_or_least ? o.split : low_or_least);
    struct Sums {
        Floats sum;
        Floats other;
    };
    for (size_t begin = 0; begin < n; begin += block_size) {
        Sums even{};
        Sums odd{};
        if (maxima[begin / block_size] >= low_or_least) {
            Block<with_mask>(logits, n, begin, allowed)
                .for_each_vector(even, odd, [&](const Floats & logit, const Floats &, Sums & to) {
                    const Floats x =
                        with_cut ? logit : each<Float>([&](size_t i) { return larger(logit.part[i], low.part[i]); });
                    const Floats e = exp_of(x, o.largest, o.scale);
                    if constexpr (with_cut) {
                        add_where_at_least(to.sum, low, x, e);
                    } else {
                        add(to.sum, e);
                    }
                    if constexpr (second == Second::split) {
                        add_where_at_least(to.other, split, x, e);
                    }
                    if constexpr (second == Second::weighted) {
                        const Floats exponent =
                            each<Float>([&](size_t i) { return (x.part[i] - o.largest) * o.scale; });
                        add_where_at_least(to.other, low, x, product(e, exponent));
                    }
                });
        }
        sums[begin / block_size] = sum_of(even.sum, odd.sum);
        if constexpr (second != Second::none) {
            seconds[begin / block_size] = sum_of(even.other, odd.other);
        }
    }
}

void exps(const float * logits, size_t n, float largest, float scale, float * out) {
    const Floats least = all(largest - 87.0F / scale);
    const auto sixteen = [&](const float * from, float * to) {
        const Floats x = load(from);
        const Floats e = where_at_least(least, x, exp_of(x, largest, scale));
        std::memcpy(to, &e, sizeof e);
    };
    size_t at = 0;
    for (; at + n_lanes <= n; at += n_lanes) {
        sixteen(logits + at, out + at);
    }
    if (at < n) {
        float last[n_lanes];
        for (size_t i = 0; i < n_lanes; ++i) {
            last[i] = at + i < n ? logits[at + i] : -infinity;
        }
        sixteen(last, last);
        std::memcpy(out + at, last, (n - at) * sizeof(float));
    }
}

template <size_t... i>
inline uint32_t lanes_at_least(const Floats & x, float low, std::index_sequence<i...>) {
    return ((bits_at_least(x.part[i], low) << (i * n_lanes / n_parts)) | ...);
}

template <bool with_mask>
size_t find(const float * logits, size_t n, TokenBits allowed, const float * maxima, float low, float high,
            int32_t * ids) {
    struct None {};
    size_t n_found = 0;
    for (size_t begin = 0; begin < n; begin += block_size) {
        if (!(maxima[begin / block_size] >= low)) {
            continue;
        }
        None none;
        size_t at = begin;
        Block<with_mask>(logits, n, begin, allowed)
            .for_each_vector(none, none, [&](const Floats & x, const Floats &, None &) {
                const auto parts = std::make_index_sequence<n_parts>{};
                uint32_t bits = lanes_at_least(x, low, parts) & ~lanes_at_least(x, high, parts);
                for (; bits != 0; bits &= bits - 1) {
                    ids[n_found++] = static_cast<int32_t>(at + lowest_bit(bits));
                }
                at += n_lanes;
            });
    }
    return n_found;
}

template <bool with_mask>
size_t moments(const float * logits, size_t n, TokenBits allowed, float largest, float * sums, float * squares) {
    const Floats lowest = all(std::numeric_limits<float>::lowest());
    struct Sums {
        Floats sum;
        Floats square;
        Floats count;
    };
    size_t count = 0;
    for (size_t begin = 0; begin < n; begin += block_size) {
        Sums even{};
        Sums odd{};
        Block<with_mask>(logits, n, begin, allowed)
            .for_each_vector(even, odd, [&](const Floats & x, const Floats &, Sums & to) {
                const Floats difference = each<Float>([&](size_t i) { return x.part[i] - largest; });
                const Floats d = where_at_least(lowest, x, difference);
                add(to.sum, d);
                add(to.square, product(d, d));
                add(to.count, where_at_least(lowest, x, all(1.0F)));
            });
        sums[begin / block_size] = sum_of(even.sum, odd.sum);
        squares[begin / block_size] = sum_of(even.square, odd.square);
        count += static_cast<size_t>(sum_of(even.count, odd.count));
    }
    return count;
}

template <Second second>
void exp_sums_of(const float * logits, size_t n, TokenBits allowed, const float * maxima, const ExpSumOptions & o,
                 float * sums, float * seconds) {
    const auto pass = o.low > least_logit(o)
                          ? (allowed == nullptr ? exp_sums<false, true, second> : exp_sums<true, true, second>)
                          : (allowed == nullptr ? exp_sums<false, false, second> : exp_sums<true, false, second>);
    pass(logits, n, allowed, maxima, o, sums, seconds);
}

}  // namespace

extern const Kernels table;
const Kernels table = {
    OVERSPILL_KERNELS_NAME,
    [](const float * logits, size_t n, TokenBits allowed, float * maxima) {
        return allowed == nullptr ? block_maxima<false>(logits, n, allowed, maxima)
                                  : block_maxima<true>(logits, n, allowed, maxima);
    },
    [](const float * logits, size_t n, TokenBits allowed, const float * maxima, const ExpSumOptions & o, float * sums) {
        exp_sums_of<Second::none>(logits, n, allowed, maxima, o, sums, nullptr);
    },
    exp_sums_of<Second::split>,
    exp_sums_of<Second::weighted>,
    exps,
    [](const float * logits, size_t n, TokenBits allowed, const float * maxima, float low, float high, int32_t * ids) {
        return allowed == nullptr ? find<false>(logits, n, allowed, maxima, low, high, ids)
                                  : find<true>(logits, n, allowed, maxima, low, high, ids);
    },
    [](const float * logits, size_t n, TokenBits allowed, float largest, float * sums, float * squares) {
        return allowed == nullptr ? moments<false>(logits, n, allowed, largest, sums, squares)
                                  : moments<true>(logits, n, allowed, largest, sums, squares);
    },
};

}  // namespace overspill::OVERSPILL_KERNELS
