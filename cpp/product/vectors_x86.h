// What all instruction sets here have of a vector's quarter.

inline __m128i words_of(const uint8_t * a, const uint8_t * b, const uint8_t * c, const uint8_t * d) {
    const auto word = [](const uint8_t * p) {
        int32_t bits;
        std::memcpy(&bits, p, sizeof(bits));
        return bits;
    };
    return _mm_setr_epi32(word(a), word(b), word(c), word(d));
}
using Shorts8 = __m128i;
using ByteScales = __m128i;  // 16
inline ByteScales byte_scales(const int8_t * p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
}
inline Shorts8 shorts_of(uint64_t eight_bytes) {
    return _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(eight_bytes)));
}
inline __m128 four_halves(ggml_half a, ggml_half b, ggml_half c, ggml_half d) {
    const auto bits = [](ggml_half half) { return static_cast<short>(half); };
    return _mm_cvtph_ps(_mm_setr_epi16(bits(a), bits(b), bits(c), bits(d), 0, 0, 0, 0));
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
