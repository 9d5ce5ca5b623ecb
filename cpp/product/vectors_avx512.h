// 64 bytes as one register of AVX-512.

#include "product/vectors_x86.h"

using Bytes = __m512i;   // 64 of 8 bits
using Ints = __m512i;    // 16 of 32 bits, each the sum of four products of bytes
using Floats = __m512;   // 16
using Scales = __m512i;  // 32 of 16 bits

// The byte instructions here take one side unsigned: signed weights get so much added.
constexpr int signed_offset = 128;

inline Bytes load(const void * p) {
    return _mm512_loadu_si512(p);
}
inline Ints load_ints(const void * p) {
    return _mm512_load_si512(p);
}
inline Floats load_floats(const float * p) {
    return _mm512_load_ps(p);
}
inline Bytes join(const uint8_t * a, const uint8_t * b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(a))),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b)), 1);
}
inline Bytes join(const uint8_t * a, const uint8_t * b, const uint8_t * c, const uint8_t * d) {
    const auto quarter = [](const uint8_t * p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(a)), quarter(b), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(c)), quarter(d), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline Bytes table_of(const int8_t * sixteen) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(sixteen)));
}
inline Bytes low_nibbles(Bytes x) {
    return _mm512_and_si512(x, _mm512_set1_epi8(15));
}
inline Bytes high_nibbles(Bytes x) {
    return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
}
#ifdef __AVX512VBMI__
// Of an index this takes six bits, and the table is there four times.
inline Bytes look_up_low(Bytes table, Bytes x) {
    return _mm512_permutexvar_epi8(x, table);
}
inline Bytes look_up_high(Bytes table, Bytes x) {
    return _mm512_permutexvar_epi8(_mm512_srli_epi16(x, 4), table);
}
#else
inline Bytes look_up_low(Bytes table, Bytes x) {
    return _mm512_shuffle_epi8(table, low_nibbles(x));
}
inline Bytes look_up_high(Bytes table, Bytes x) {
    return _mm512_shuffle_epi8(table, high_nibbles(x));
}
#endif
// Bit b of the first 32 bytes, and bit b + step of the last, as 16; added to x, which has it not.
template <int b, int step>
Bytes with_bit(Bytes x, Bytes bits) {
    const __m512i wanted = _mm512_inserti64x4(_mm512_set1_epi8(static_cast<char>(1 << b)),
                                              _mm256_set1_epi8(static_cast<char>(1 << (b + step))), 1);
    return _mm512_mask_add_epi8(x, _mm512_test_epi8_mask(bits, wanted), x, _mm512_set1_epi8(16));
}
// Bits b and b + 1 of the first 32 bytes, and b + 2 and b + 3 of the last, as multiples of 16.
template <int b>
Bytes with_two_bits(Bytes x, Bytes bits) {
    static_assert(b == 0 || b == 4);
    const __m512i left = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(2), 1);
    const __m512i right = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
    const __m512i moved = b == 0 ? _mm512_sllv_epi16(bits, left) : _mm512_srlv_epi16(bits, right);
    constexpr int a_or_b_and_c = 0xf8;
    return _mm512_ternarylogic_epi32(x, moved, _mm512_set1_epi8(0x30), a_or_b_and_c);
}
// Added as 16: of each block the bits of its bytes `first` and `first` + 1, for sixteen weights.
template <int first>
Bytes with_fifth_bits(Bytes x, __m128i words) {
    constexpr auto eight = [](int64_t byte) { return byte * 0x0101010101010101; };
    const __m512i places = _mm512_setr_epi64(eight(first), eight(first + 1), eight(first + 4), eight(first + 5),
                                             eight(first + 8), eight(first + 9), eight(first + 12), eight(first + 13));
    const __m512i wanted = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201U));
    const __mmask64 is_set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(words), places), wanted);
    return _mm512_mask_add_epi8(x, is_set, x, _mm512_set1_epi8(16));
}
inline Ints dot(Ints sum, Bytes of_unsigned, Bytes of_signed) {
    return _mm512_dpbusd_epi32(sum, of_unsigned, of_signed);
}
inline Ints dot(Ints sum, Bytes weights, Bytes activations, Bytes more_weights, Bytes more_activations) {
    return dot(dot(sum, weights, activations), more_weights, more_activations);
}
inline Bytes unsigned_of(Bytes weights) {
    return _mm512_xor_si512(weights, _mm512_set1_epi8(-128));
}
inline Ints dot_signed(Ints sum, Bytes weights, Bytes activations) {
    return _mm512_dpbusd_epi32(sum, unsigned_of(weights), activations);
}
// Adds products of bytes, those of each sixteen bits times their scale; the weights have at most 6 bits.
inline Ints scaled_dot(Ints sum, Bytes of_unsigned, Bytes of_signed, Scales scales) {
    return _mm512_dpwssd_epi32(sum, _mm512_maddubs_epi16(of_unsigned, of_signed), scales);
}
// Scales a and b of eight of 16 bits, for a half of the bytes each.
template <int a, int b>
Scales spread_halves(__m128i scales) {
    const __m512i places = _mm512_inserti64x4(_mm512_set1_epi16(a), _mm256_set1_epi16(b), 1);
    return _mm512_permutexvar_epi16(places, _mm512_castsi128_si512(scales));
}
// Scales a to a + 3 of sixteen of 8 bits, for a quarter of the bytes each.
template <int a>
Scales spread_quarters(__m128i scales) {
    const __m512i places = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_set1_epi16(a), _mm_set1_epi16(a + 1), 1)),
        _mm256_inserti128_si256(_mm256_set1_epi16(a + 2), _mm_set1_epi16(a + 3), 1), 1);
    return _mm512_permutexvar_epi16(places, _mm512_castsi256_si512(_mm256_cvtepi8_epi16(scales)));
}
// Products with eight or sixteen sums, in the first places.
inline Ints sums_dot(Shorts8 a, const int16_t * sums) {
    return _mm512_zextsi128_si512(_mm_madd_epi16(a, _mm_load_si128(reinterpret_cast<const __m128i *>(sums))));
}
inline Ints byte_sums_dot(__m128i sixteen_bytes, const int16_t * sums) {
    const __m256i scales = _mm256_cvtepi8_epi16(sixteen_bytes);
    return _mm512_zextsi256_si512(
        _mm256_madd_epi16(scales, _mm256_load_si256(reinterpret_cast<const __m256i *>(sums))));
}
// a - 32 b
inline Ints less_32_times(Ints a, Ints b) {
    return _mm512_sub_epi32(a, _mm512_slli_epi32(b, 5));
}
inline Ints no_ints() {
    return _mm512_setzero_si512();
}
inline Floats no_floats() {
    return _mm512_setzero_ps();
}
inline Floats to_floats(Ints x) {
    return _mm512_cvtepi32_ps(x);
}
inline Floats all(float x) {
    return _mm512_set1_ps(x);
}
inline Floats times(Floats a, Floats b) {
    return _mm512_mul_ps(a, b);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline Floats multiply_add(__m128 a, __m128 b, Floats c) {
    return _mm512_fmadd_ps(_mm512_zextps128_ps512(a), _mm512_zextps128_ps512(b), c);
}
inline Floats sum_of(Floats a, Floats b) {
    return _mm512_add_ps(a, b);
}
inline float total(Floats x) {
    return _mm512_reduce_add_ps(x);
}
// One number for each quarter.
inline Floats quarters(__m128 x) {
    const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(places, _mm512_castps128_ps512(x));
}
// One number for each half.
inline Floats halves(float a, float b) {
    return _mm512_insertf32x8(_mm512_set1_ps(a), _mm256_set1_ps(b), 1);
}
// Of exponents in the highest bytes; one of 0 is a number all the same.
inline Floats powers_of_exponents(__m512i e) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_srli_epi32(e, 1), _mm512_set1_epi32(0x00400000)));
}
// 2^(e - 127) for each quarter; 16 bytes can be read from each e.
inline Floats powers_of_two(const uint8_t * a, const uint8_t * b, const uint8_t * c, const uint8_t * d) {
    const __m512i first = _mm512_broadcast_i32x4(_mm_set1_epi32(0x00808080));
    return powers_of_exponents(_mm512_shuffle_epi8(join(a, b, c, d), first));
}
// Of the bytes at p, p + 17, p + 34 and p + 51.
#ifdef __AVX512VBMI__
inline Floats powers_of_two(const uint8_t * p) {
    alignas(64) static constexpr uint8_t places[64] = {
        0, 0, 0, 0,  0, 0, 0, 0,  0, 0, 0, 0,  0, 0, 0, 0,  0, 0, 0, 17, 0, 0, 0, 17, 0, 0, 0, 17, 0, 0, 0, 17,
        0, 0, 0, 34, 0, 0, 0, 34, 0, 0, 0, 34, 0, 0, 0, 34, 0, 0, 0, 51, 0, 0, 0, 51, 0, 0, 0, 51, 0, 0, 0, 51};
    const __m512i e = _mm512_maskz_permutexvar_epi8(0x8888888888888888U, _mm512_load_si512(places), load(p));
    return powers_of_exponents(e);
}
#else
inline Floats powers_of_two(const uint8_t * p) {
    return powers_of_two(p, p + 17, p + 34, p + 51);
}
#endif

// --- A row in each lane --------------------------------------------------------------------------

#define OVERSPILL_HAS_PANELS
constexpr int64_t panel_rows = 16;

struct Words4 {
    __m512i of[4];
};
// 16 bytes of each row.
inline void load_rows(const void * of_first, size_t row_bytes, Words4 & words) {
    const auto * p = static_cast<const uint8_t *>(of_first);
    const auto every_fourth = [&](size_t r) {
        return join(p + r * row_bytes, p + (r + 4) * row_bytes, p + (r + 8) * row_bytes, p + (r + 12) * row_bytes);
    };
    const __m512i a = every_fourth(0), b = every_fourth(1), c = every_fourth(2), d = every_fourth(3);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    words.of[0] = _mm512_unpacklo_epi64(ab, cd);
    words.of[1] = _mm512_unpackhi_epi64(ab, cd);
    const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
    words.of[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    words.of[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}
inline Ints all_ints(int32_t x) {
    return _mm512_set1_epi32(x);
}
// The same four bytes for each row.
inline Bytes all_words(const int8_t * four) {
    int32_t word;
    std::memcpy(&word, four, sizeof(word));
    return _mm512_set1_epi32(word);
}
inline void store(float * p, Floats x) {
    _mm512_storeu_ps(p, x);
}
inline Floats halves_of_lanes(Ints x) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
}
inline Floats high_halves_of_lanes(Ints x) {
    return halves_of_lanes(_mm512_srli_epi32(x, 16));
}
// Of exponents.
inline Floats powers_in_lowest_bytes(Ints x) {
    return powers_of_exponents(_mm512_slli_epi32(x, 24));
}
inline Ints high_short(Ints x) {
    return _mm512_srli_epi32(x, 16);
}
inline Ints join_shorts(Ints low, Ints high) {
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
template <int shift, int n>
Ints bits_of_lanes(Ints x) {
    return _mm512_and_si512(_mm512_srli_epi32(x, shift), _mm512_set1_epi32((1 << n) - 1));
}
template <int shift, int n>
Bytes bits_of_bytes(Bytes x) {
    return _mm512_and_si512(_mm512_srli_epi32(x, shift), _mm512_set1_epi8((1 << n) - 1));
}
template <int i>
Ints signed_byte_of_lanes(Ints x) {
    return _mm512_srai_epi32(_mm512_slli_epi32(x, 24 - 8 * i), 24);
}
// Two bits above four.
inline Ints join_bits(Ints four, Ints two) {
    return _mm512_or_si512(four, _mm512_slli_epi32(two, 4));
}
inline Ints minus(Ints x, int32_t y) {
    return _mm512_sub_epi32(x, _mm512_set1_epi32(y));
}
// Added as 16: four bits of each lane, from bit `first` on, for its four bytes.
template <int first>
Bytes with_fifth_bits_of_lanes(Bytes x, Ints bits) {
    constexpr int byte = first / 8;
    const __m512i places = _mm512_broadcast_i32x4(
        _mm_setr_epi32(byte * 0x01010101, (byte + 4) * 0x01010101, (byte + 8) * 0x01010101, (byte + 12) * 0x01010101));
    const __m512i wanted = _mm512_set1_epi32(first % 8 == 0 ? 0x08040201 : static_cast<int32_t>(0x80402010U));
    const __mmask64 is_set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(bits, places), wanted);
    return _mm512_mask_add_epi8(x, is_set, x, _mm512_set1_epi8(16));
}
