// What all instruction sets here have of a vector's quarter.

using Shorts8 = __m128i;
using ByteScales = __m128i;  // 16
inline ByteScales byte_scales(const int8_t * p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
}
inline Shorts8 shorts_of(uint64_t eight_bytes) {
    return _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(eight_bytes)));
}
// The first eight bytes of each of four blocks.
struct Heads {
    __m128i of[2];
};
inline Heads heads_of(const void * a, const void * b, const void * c, const void * d) {
    const auto two = [](const void * p, const void * q) {
        const __m128i first = _mm_loadl_epi64(static_cast<const __m128i *>(p));
        return _mm_loadh_pi(_mm_castsi128_ps(first), static_cast<const __m64 *>(q));
    };
    const __m128 ab = two(a, b), cd = two(c, d);
    return {{_mm_castps_si128(_mm_shuffle_ps(ab, cd, _MM_SHUFFLE(2, 0, 2, 0))),
             _mm_castps_si128(_mm_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 1, 3, 1)))}};
}
// The numbers in the low and in the high shorts of four words.
struct LowAndHigh {
    __m128 low, high;
};
inline LowAndHigh halves_of(__m128i words) {
    const __m128i low_first = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m256 numbers = _mm256_cvtph_ps(_mm_shuffle_epi8(words, low_first));
    return {_mm256_castps256_ps128(numbers), _mm256_extractf128_ps(numbers, 1)};
}
inline float float_of(ggml_half half) {
    return _cvtsh_ss(half);
}
// d times each of four numbers of six bits less 32: four bits of each are in `low`, and two in `high`.
[[gnu::always_inline]] inline __m128 four_six_bits(float d, int low, int high) {
    const auto one = [&](int i) {
        return d * static_cast<float>(((low >> 4 * i & 15) | (high >> 2 * i & 3) << 4) - 32);
    };
    return _mm_setr_ps(one(0), one(1), one(2), one(3));
}
