// 64 bytes as four registers of NEON, with products of bytes. A number of a half or a quarter is not spread over its
// lanes: instructions multiply by a lane.

struct Bytes {
    uint8x16_t a, b, c, d;
};
struct Ints {  // 16 of 32 bits, each the sum of four products of bytes
    int32x4_t a, b, c, d;
};
struct Floats {  // 16
    float32x4_t a, b, c, d;
};
using Table = uint8x16_t;
using Quarters = float32x4_t;  // one number for each quarter
using Minima = float32x4_t;    // of four blocks
using Halves = float32x2_t;    // one number for each half
struct HalfInts {              // sums for each half
    int32x4_t a, b;
};
struct HalfFloats {
    float32x4_t a, b;
};
struct WholeInts {  // sums for all, in two parts that do not wait for each other
    int32x4_t a, b;
};
using Shorts8 = int16x8_t;
using ByteScales = int8x16_t;  // 16
constexpr size_t quarter_lanes = 1;
constexpr size_t half_lanes = 1;

// Both sides of a product are signed here; unsigned weights have at most 7 bits.
constexpr int signed_offset = 0;
constexpr int table_offset(int) {
    return 0;
}

inline Bytes load(const void * p) {
    const auto * bytes = static_cast<const uint8_t *>(p);
    return {vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)};
}
// Without an offset there is nothing to load.
template <int offset>
Ints load_start(const int32_t * start) {
    if constexpr (offset == 0) {
        const int32x4_t zero = vdupq_n_s32(0);
        return {zero, zero, zero, zero};
    } else {
        return {vld1q_s32(start), vld1q_s32(start + 4), vld1q_s32(start + 8), vld1q_s32(start + 12)};
    }
}
inline Quarters load_quarters(const float * p) {
    return vld1q_f32(p);
}
constexpr auto load_sums = load_quarters;
inline Halves load_halves(const float * p) {
    return vld1_f32(p);
}
inline Bytes join(const uint8_t * a, const uint8_t * b) {
    return {vld1q_u8(a), vld1q_u8(a + 16), vld1q_u8(b), vld1q_u8(b + 16)};
}
inline Bytes join(const uint8_t * a, const uint8_t * b, const uint8_t * c, const uint8_t * d) {
    return {vld1q_u8(a), vld1q_u8(b), vld1q_u8(c), vld1q_u8(d)};
}
inline Table table_of(const int8_t * sixteen) {
    return vreinterpretq_u8_s8(vld1q_s8(sixteen));
}
inline Bytes low_nibbles(Bytes x) {
    const uint8x16_t mask = vdupq_n_u8(15);
    return {vandq_u8(x.a, mask), vandq_u8(x.b, mask), vandq_u8(x.c, mask), vandq_u8(x.d, mask)};
}
inline Bytes high_nibbles(Bytes x) {
    return {vshrq_n_u8(x.a, 4), vshrq_n_u8(x.b, 4), vshrq_n_u8(x.c, 4), vshrq_n_u8(x.d, 4)};
}
inline Bytes look_up(Table table, Bytes places) {
    return {vqtbl1q_u8(table, places.a), vqtbl1q_u8(table, places.b), vqtbl1q_u8(table, places.c),
            vqtbl1q_u8(table, places.d)};
}
inline Bytes look_up_low(Table table, Bytes x) {
    return look_up(table, low_nibbles(x));
}
inline Bytes look_up_high(Table table, Bytes x) {
    return look_up(table, high_nibbles(x));
}
// The bits of `mask` in x become those that are n_left further right in `bits`.
template <int mask, int n_left>
uint8x16_t with_moved(uint8x16_t x, uint8x16_t bits) {
    if constexpr (n_left > 0) {
        bits = vshlq_n_u8(bits, n_left);
    } else if constexpr (n_left < 0) {
        bits = vshrq_n_u8(bits, -n_left);
    }
    return vbslq_u8(vdupq_n_u8(mask), bits, x);
}
// Bit b of the first 32 bytes, and bit b + step of the last, as 16; added to x, which has it not.
template <int b, int step>
Bytes with_bit(Bytes x, Bytes bits) {
    return {with_moved<16, 4 - b>(x.a, bits.a), with_moved<16, 4 - b>(x.b, bits.b),
            with_moved<16, 4 - b - step>(x.c, bits.c), with_moved<16, 4 - b - step>(x.d, bits.d)};
}
// Bits b and b + 1 of the first 32 bytes, and b + 2 and b + 3 of the last, as multiples of 16.
template <int b>
Bytes with_two_bits(Bytes x, Bytes bits) {
    return {with_moved<0x30, 4 - b>(x.a, bits.a), with_moved<0x30, 4 - b>(x.b, bits.b),
            with_moved<0x30, 2 - b>(x.c, bits.c), with_moved<0x30, 2 - b>(x.d, bits.d)};
}
// The first eight bytes of each of four blocks.
struct Heads {
    uint32x4_t of[2];
};
inline Heads heads_of(const void * a, const void * b, const void * c, const void * d) {
    const auto two = [](const void * p, const void * q) {
        return vreinterpretq_u32_u8(
            vcombine_u8(vld1_u8(static_cast<const uint8_t *>(p)), vld1_u8(static_cast<const uint8_t *>(q))));
    };
    const uint32x4_t ab = two(a, b), cd = two(c, d);
    return {{vuzp1q_u32(ab, cd), vuzp2q_u32(ab, cd)}};
}
// Added as 16: of each block the bits of its bytes `first` and `first` + 1, for sixteen weights.
template <int first>
Bytes with_fifth_bits(Bytes x, uint32x4_t words) {
    const uint8x16_t from = vreinterpretq_u8_u32(words);
    const auto quarter = [&](uint8x16_t y, int block) {
        const auto eight = [&](int byte) { return vdup_n_u8(static_cast<uint8_t>(4 * block + first + byte)); };
        const uint8x16_t bytes = vqtbl1q_u8(from, vcombine_u8(eight(0), eight(1)));
        const uint8x16_t wanted = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201U));
        return with_moved<16, 0>(y, vtstq_u8(bytes, wanted));
    };
    return {quarter(x.a, 0), quarter(x.b, 1), quarter(x.c, 2), quarter(x.d, 3)};
}
inline int32x4_t add_products(int32x4_t sum, uint8x16_t weights, uint8x16_t activations) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(weights), vreinterpretq_s8_u8(activations));
}
inline Ints dot_signed(Ints sum, Bytes weights, Bytes activations) {
    return {add_products(sum.a, weights.a, activations.a), add_products(sum.b, weights.b, activations.b),
            add_products(sum.c, weights.c, activations.c), add_products(sum.d, weights.d, activations.d)};
}
inline Ints dot(Ints sum, Bytes weights, Bytes activations, Bytes more_weights, Bytes more_activations) {
    return dot_signed(dot_signed(sum, weights, activations), more_weights, more_activations);
}
inline int32x4_t products_of(uint8x16_t weights, uint8x16_t activations) {
    return add_products(vdupq_n_s32(0), weights, activations);
}
inline HalfInts products_of_halves(Bytes weights, Bytes activations) {
    return {add_products(products_of(weights.a, activations.a), weights.b, activations.b),
            add_products(products_of(weights.c, activations.c), weights.d, activations.d)};
}
// Of signed weights, which have no offset: what to start from is zero.
inline HalfInts dot_halves(Ints, Bytes weights, Bytes activations) {
    return products_of_halves(weights, activations);
}
inline Shorts8 shorts_of(uint64_t eight_bytes) {
    return vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(eight_bytes)));
}
inline ByteScales byte_scales(const int8_t * p) {
    return vld1q_s8(p);
}
// Four scales, two of them in use: the first and the third for even parts of the weights, or the others for odd ones.
struct HalfScales {
    int32x4_t of;
};
template <int a, int b>
HalfScales spread_halves(Shorts8 scales) {
    static_assert(a % 4 < 2 && b == a + 2);
    return {a < 4 ? vmovl_s16(vget_low_s16(scales)) : vmovl_high_s16(scales)};
}
struct QuarterScales {
    int32x4_t of;
};
template <int a>
QuarterScales spread_quarters(ByteScales scales) {
    static_assert(a % 4 == 0);
    const int16x8_t eight = a < 8 ? vmovl_s8(vget_low_s8(scales)) : vmovl_high_s8(scales);
    return {a % 8 == 0 ? vmovl_s16(vget_low_s16(eight)) : vmovl_high_s16(eight)};
}
// Adds products of bytes, those of each half or quarter times its scale.
template <size_t part>
WholeInts scaled_dot_part(WholeInts sum, Bytes weights, Bytes activations, HalfScales scales) {
    const HalfInts products = products_of_halves(weights, activations);
    return {vmlaq_laneq_s32(sum.a, products.a, scales.of, part % 2),
            vmlaq_laneq_s32(sum.b, products.b, scales.of, part % 2 + 2)};
}
template <size_t part>
WholeInts scaled_dot_part(WholeInts sum, Bytes weights, Bytes activations, QuarterScales scales) {
    sum.a = vmlaq_laneq_s32(sum.a, products_of(weights.a, activations.a), scales.of, 0);
    sum.b = vmlaq_laneq_s32(sum.b, products_of(weights.b, activations.b), scales.of, 1);
    sum.a = vmlaq_laneq_s32(sum.a, products_of(weights.c, activations.c), scales.of, 2);
    sum.b = vmlaq_laneq_s32(sum.b, products_of(weights.d, activations.d), scales.of, 3);
    return sum;
}
// Products with eight or sixteen sums.
inline int32x4_t sums_dot(Shorts8 a, const int16_t * sums) {
    const int16x8_t b = vld1q_s16(sums);
    return vmlal_high_s16(vmull_s16(vget_low_s16(a), vget_low_s16(b)), a, b);
}
inline int32x4_t byte_sums_dot(ByteScales scales, const int16_t * sums) {
    return vaddq_s32(sums_dot(vmovl_s8(vget_low_s8(scales)), sums), sums_dot(vmovl_high_s8(scales), sums + 8));
}
// a - 32 b
inline WholeInts less_32_times(WholeInts a, int32x4_t b) {
    return {vsubq_s32(a.a, vshlq_n_s32(b, 5)), a.b};
}
inline WholeInts no_ints() {
    return {vdupq_n_s32(0), vdupq_n_s32(0)};
}
inline Floats no_floats() {
    const float32x4_t zero = vdupq_n_f32(0);
    return {zero, zero, zero, zero};
}
inline float32x4_t to_floats(int32x4_t x) {
    return vcvtq_f32_s32(x);
}
inline float32x4_t to_floats(WholeInts x) {
    return to_floats(vaddq_s32(x.a, x.b));
}
inline HalfFloats to_floats(HalfInts x) {
    return {to_floats(x.a), to_floats(x.b)};
}
inline Floats to_floats(Ints x) {
    return {to_floats(x.a), to_floats(x.b), to_floats(x.c), to_floats(x.d)};
}
inline float all(float x) {
    return x;
}
inline Quarters times(Quarters x, Quarters y) {
    return vmulq_f32(x, y);
}
inline Halves times(Halves x, Halves y) {
    return vmul_f32(x, y);
}
// Sums of four numbers or eight are those of the first lanes of `z`.
inline Floats multiply_add(float32x4_t x, float y, Floats z) {
    return {vfmaq_n_f32(z.a, x, y), z.b, z.c, z.d};
}
inline Floats multiply_add(Quarters x, Quarters y, Floats z) {
    return {vfmaq_f32(z.a, x, y), z.b, z.c, z.d};
}
inline Floats multiply_add(HalfFloats x, Halves y, Floats z) {
    return {vfmaq_lane_f32(z.a, x.a, y, 0), vfmaq_lane_f32(z.b, x.b, y, 1), z.c, z.d};
}
inline Floats multiply_add(Floats x, Quarters y, Floats z) {
    return {vfmaq_laneq_f32(z.a, x.a, y, 0), vfmaq_laneq_f32(z.b, x.b, y, 1), vfmaq_laneq_f32(z.c, x.c, y, 2),
            vfmaq_laneq_f32(z.d, x.d, y, 3)};
}
inline Floats sum_of(Floats x, Floats y) {
    return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
}
inline float total(Floats x) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d)));
}
inline float float_of(ggml_half half) {
    __fp16 number;
    std::memcpy(&number, &half, sizeof(number));
    return number;
}
inline float32x4_t floats_of(uint64_t four_halves) {
    return vcvt_f32_f16(vreinterpret_f16_u64(vcreate_u64(four_halves)));
}
// The numbers in the low and in the high shorts of four words.
struct LowAndHigh {
    float32x4_t low, high;
};
inline LowAndHigh halves_of(uint32x4_t words) {
    const auto floats = [](uint16x4_t halves) { return vcvt_f32_f16(vreinterpret_f16_u16(halves)); };
    return {floats(vmovn_u32(words)), floats(vshrn_n_u32(words, 16))};
}
inline Quarters quarters(float32x4_t x) {
    return x;
}
// halves() converts two at once.
inline ggml_half scale_of(ggml_half half) {
    return half;
}
inline Halves halves(ggml_half a, ggml_half b) {
    return vget_low_f32(floats_of(a | static_cast<uint64_t>(b) << 16));
}
// d times each of four numbers of six bits less 32: four bits of each are in `low`, and two in `high`.
inline float32x4_t four_six_bits(float d, int low, int high) {
    auto fours = static_cast<uint64_t>(low & 0xffff), twos = static_cast<uint64_t>(high & 0xff);
    fours = (fours | fours << 24) & 0x000000ff000000ffU;
    fours = (fours | fours << 12) & 0x000f000f000f000fU;
    twos = (twos | twos << 28) & 0x0000000f0000000fU;
    twos = (twos | twos << 14) & 0x0003000300030003U;
    const int16x4_t numbers = vsub_s16(vcreate_s16(fours | twos << 4), vdup_n_s16(32));
    return vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(numbers)), d);
}
// 2^(e - 127) for each quarter.
inline Quarters powers_of_two(const uint8_t * a, const uint8_t * b, const uint8_t * c, const uint8_t * d) {
    const uint32_t four =
        *a | static_cast<uint32_t>(*b) << 8 | static_cast<uint32_t>(*c) << 16 | static_cast<uint32_t>(*d) << 24;
    // To the highest bytes; places that are not in the table give zero.
    const uint8x16_t places = vreinterpretq_u8_u32(uint32x4_t{0x00ffffff, 0x01ffffff, 0x02ffffff, 0x03ffffff});
    const uint32x4_t e = vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(four)), places));
    // An exponent of 0 is a number all the same.
    return vreinterpretq_f32_u32(vmaxq_u32(vshrq_n_u32(e, 1), vdupq_n_u32(0x00400000)));
}
// Of the bytes at p, p + 17, p + 34 and p + 51.
inline Quarters powers_of_two(const uint8_t * p) {
    return powers_of_two(p, p + 17, p + 34, p + 51);
}
