// 64 bytes as two registers of AVX2.

#include "product/vectors_x86.h"

struct Bytes {
    __m256i a, b;
};
using Ints = Bytes;  // 16 of 32 bits, each the sum of four products of bytes
struct Floats {      // 16
    __m256 a, b;
};
using Scales = Bytes;  // 32 of 16 bits

// With the sign moved to the activations, the weights are unsigned as they are.
constexpr int signed_offset = 0;

inline __m256i load_half(const void * p) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(p));
}
inline Bytes load(const void * p) {
    return {load_half(p), load_half(static_cast<const uint8_t *>(p) + 32)};
}
inline Ints load_ints(const void * p) {
    return load(p);
}
inline Floats load_floats(const float * p) {
    return {_mm256_load_ps(p), _mm256_load_ps(p + 8)};
}
inline Bytes join(const uint8_t * a, const uint8_t * b) {
    return {load_half(a), load_half(b)};
}
inline Bytes join(const uint8_t * a, const uint8_t * b, const uint8_t * c, const uint8_t * d) {
    const auto quarter = [](const uint8_t * p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); };
    return {_mm256_inserti128_si256(_mm256_castsi128_si256(quarter(a)), quarter(b), 1),
            _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(c)), quarter(d), 1)};
}
inline Bytes table_of(const int8_t * sixteen) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(sixteen)));
    return {table, table};
}
inline Bytes low_nibbles(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high_nibbles(Bytes x) {
    return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
inline Bytes look_up(Bytes table, Bytes places) {
    return {_mm256_shuffle_epi8(table.a, places.a), _mm256_shuffle_epi8(table.b, places.b)};
}
inline Bytes look_up_low(Bytes table, Bytes x) {
    return look_up(table, low_nibbles(x));
}
inline Bytes look_up_high(Bytes table, Bytes x) {
    return look_up(table, high_nibbles(x));
}
// Bits from b on of the first 32 bytes, and from b + step on of the last, become those of `mask`, from bit 4 on.
template <int mask, int b, int step>
Bytes with_moved(Bytes x, Bytes bits) {
    const auto half = [](__m256i y, __m256i from, int n_right) {
        const __m256i moved = n_right < 0 ? _mm256_slli_epi16(from, -n_right) : _mm256_srli_epi16(from, n_right);
        return _mm256_or_si256(y, _mm256_and_si256(moved, _mm256_set1_epi8(mask)));
    };
    return {half(x.a, bits.a, b - 4), half(x.b, bits.b, b + step - 4)};
}
// Bit b of the first 32 bytes, and bit b + step of the last, as 16; added to x, which has it not.
template <int b, int step>
Bytes with_bit(Bytes x, Bytes bits) {
    return with_moved<16, b, step>(x, bits);
}
// Bits b and b + 1 of the first 32 bytes, and b + 2 and b + 3 of the last, as multiples of 16.
template <int b>
Bytes with_two_bits(Bytes x, Bytes bits) {
    return with_moved<0x30, b, 2>(x, bits);
}
// Added as 16: of each block the bits of its bytes `first` and `first` + 1, for sixteen weights.
template <int first>
Bytes with_fifth_bits(Bytes x, __m128i words) {
    const __m256i from = _mm256_broadcastsi128_si256(words);
    const auto half = [from](__m256i y, int64_t block) {
        const auto eight = [block](int64_t byte) { return (4 * block + first + byte) * 0x0101010101010101; };
        const __m256i places = _mm256_setr_epi64x(eight(0), eight(1), eight(4), eight(5));
        const __m256i wanted = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201U));
        const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(from, places), wanted), wanted);
        return _mm256_or_si256(y, _mm256_and_si256(is_set, _mm256_set1_epi8(16)));
    };
    return {half(x.a, 0), half(x.b, 2)};
}
inline __m256i add_products(__m256i sum, __m256i of_unsigned, __m256i of_signed) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, of_unsigned, of_signed);
#else
    const __m256i pairs = _mm256_maddubs_epi16(of_unsigned, of_signed);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
// The products of both pairs. Without VNNI, four of them must fit into 16 bits: the weights have at most 6 bits.
inline Ints dot(Ints sum, Bytes weights, Bytes activations, Bytes more_weights, Bytes more_activations) {
    const auto half = [](__m256i s, __m256i w, __m256i x, __m256i more_w, __m256i more_x) {
#ifdef __AVXVNNI__
        return add_products(add_products(s, w, x), more_w, more_x);
#else
        const __m256i fours = _mm256_add_epi16(_mm256_maddubs_epi16(w, x), _mm256_maddubs_epi16(more_w, more_x));
        return _mm256_add_epi32(s, _mm256_madd_epi16(fours, _mm256_set1_epi16(1)));
#endif
    };
    return {half(sum.a, weights.a, activations.a, more_weights.a, more_activations.a),
            half(sum.b, weights.b, activations.b, more_weights.b, more_activations.b)};
}
inline Ints dot_signed(Ints sum, Bytes weights, Bytes activations) {
    const auto half = [](__m256i s, __m256i w, __m256i x) {
        return add_products(s, _mm256_sign_epi8(w, w), _mm256_sign_epi8(x, w));
    };
    return {half(sum.a, weights.a, activations.a), half(sum.b, weights.b, activations.b)};
}
// Adds products of bytes, those of each sixteen bits times their scale; the weights have at most 6 bits.
inline Ints scaled_dot(Ints sum, Bytes of_unsigned, Bytes of_signed, Scales scales) {
    const auto half = [](__m256i s, __m256i u, __m256i x, __m256i scale) {
        const __m256i pairs = _mm256_maddubs_epi16(u, x);
#ifdef __AVXVNNI__
        return _mm256_dpwssd_avx_epi32(s, pairs, scale);
#else
        return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, scale));
#endif
    };
    return {half(sum.a, of_unsigned.a, of_signed.a, scales.a), half(sum.b, of_unsigned.b, of_signed.b, scales.b)};
}
// Scales a and b of eight of 16 bits, for a half of the bytes each.
template <int a, int b>
Scales spread_halves(__m128i scales) {
    const __m256i both = _mm256_broadcastsi128_si256(scales);
    const auto places = [](int i) { return _mm256_set1_epi16(static_cast<short>(2 * i | (2 * i + 1) << 8)); };
    return {_mm256_shuffle_epi8(both, places(a)), _mm256_shuffle_epi8(both, places(b))};
}
// Scales a to a + 3 of sixteen of 8 bits, for a quarter of the bytes each.
template <int a>
Scales spread_quarters(__m128i scales) {
    const auto half = [scales](int i) {
        const __m128i places =
            _mm_unpacklo_epi64(_mm_set1_epi8(static_cast<char>(i)), _mm_set1_epi8(static_cast<char>(i + 1)));
        return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, places));
    };
    return {half(a), half(a + 2)};
}
// Products with eight or sixteen sums, in the first places.
inline Ints sums_dot(Shorts8 a, const int16_t * sums) {
    const __m128i products = _mm_madd_epi16(a, _mm_load_si128(reinterpret_cast<const __m128i *>(sums)));
    return {_mm256_zextsi128_si256(products), _mm256_setzero_si256()};
}
inline Ints byte_sums_dot(__m128i sixteen_bytes, const int16_t * sums) {
    const __m256i scales = _mm256_cvtepi8_epi16(sixteen_bytes);
    return {_mm256_madd_epi16(scales, _mm256_load_si256(reinterpret_cast<const __m256i *>(sums))),
            _mm256_setzero_si256()};
}
// a - 32 b, which has numbers in the first half alone
inline Ints less_32_times(Ints a, Ints b) {
    return {_mm256_sub_epi32(a.a, _mm256_slli_epi32(b.a, 5)), a.b};
}
inline Ints no_ints() {
    return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
inline Floats no_floats() {
    return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
inline Floats to_floats(Ints x) {
    return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
}
inline Floats all(float x) {
    return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline Floats times(Floats x, Floats y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline Floats multiply_add(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats multiply_add(__m128 x, __m128 y, Floats z) {
    return {_mm256_fmadd_ps(_mm256_zextps128_ps256(x), _mm256_zextps128_ps256(y), z.a), z.b};
}
inline Floats sum_of(Floats x, Floats y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline float total(Floats x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
// One number for each quarter.
inline Floats quarters(__m128 x) {
    const __m256 four = _mm256_castps128_ps256(x);
    return {_mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
            _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
}
// One number for each half.
inline Floats halves(float a, float b) {
    return {_mm256_set1_ps(a), _mm256_set1_ps(b)};
}
// 2^(e - 127) for each quarter; 16 bytes can be read from each e.
inline Floats powers_of_two(const uint8_t * a, const uint8_t * b, const uint8_t * c, const uint8_t * d) {
    const auto half = [](__m256i first) {
        const __m256i e = _mm256_shuffle_epi8(first, _mm256_set1_epi32(0x00808080));
        // An exponent of 0 is a number all the same.
        return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_srli_epi32(e, 1), _mm256_set1_epi32(0x00400000)));
    };
    const Bytes blocks = join(a, b, c, d);
    return {half(blocks.a), half(blocks.b)};
}
// Of the bytes at p, p + 17, p + 34 and p + 51.
inline Floats powers_of_two(const uint8_t * p) {
    return powers_of_two(p, p + 17, p + 34, p + 51);
}
