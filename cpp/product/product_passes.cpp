// The products themselves. CMake compiles this file once per instruction set, with OVERSPILL_PRODUCTS set to its
// namespace. No inline function of the standard library is called here at run time: the linker keeps one copy of such
// a function, and that could be one that the CPU cannot run.
#include "product/products.h"

#define GGML_COMMON_DECL_C
#include <ggml-common.h>

#ifdef OVERSPILL_NEON
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cstring>
#include <type_traits>

namespace overspill::OVERSPILL_PRODUCTS {

namespace {

#if defined(OVERSPILL_NEON)
#include "product/vectors_neon.h"
#else
#if defined(OVERSPILL_AVX512) || defined(OVERSPILL_AVX512VBMI)
#include "product/vectors_avx512.h"
#else
#include "product/vectors_avx2.h"
#endif
#include "product/vectors_spread.h"
#endif

constexpr int64_t group_blocks = 4;  // of 32 weights, in 64 bytes of nibbles
constexpr int64_t group_weights = 32 * group_blocks;

int64_t groups_in(int64_t n) {
    return (n + group_weights - 1) / group_weights;
}

template <size_t n_bytes>
void prefetch(const void * p, size_t ahead_bytes) {
    for (size_t i = 0; i < n_bytes; i += 64) {
        __builtin_prefetch(static_cast<const char *>(p) + ahead_bytes + i);
    }
}

// Calls work with the constants 0 to n - 1: sums that are indexed by constants are kept in registers.
template <size_t n, size_t i = 0, typename Work>
[[gnu::always_inline]] inline void for_each(const Work & work) {
    if constexpr (i < n) {
        work(std::integral_constant<size_t, i>{});
        for_each<n, i + 1>(work);
    }
}

// What a row of weights is multiplied with.
template <size_t n_columns>
struct Columns {
    const uint8_t * activations[n_columns];
    size_t prefetch_bytes;

    template <typename Group>
    const Group & group(size_t column, int64_t i) const {
        return reinterpret_cast<const Group *>(activations[column])[i];
    }
};
template <size_t n_columns>
struct Sums {
    Floats of[n_columns];
};
template <size_t n_columns>
[[gnu::always_inline]] inline Sums<n_columns> no_sums() {
    Sums<n_columns> sums;
    for_each<n_columns>([&](auto c) { sums.of[c.value] = no_floats(); });
    return sums;
}

// --- Blocks of 32 weights of four or five bits ---------------------------------------------------

// The activations of four blocks: byte i of a block has weight i below and weight i + 16 above.
struct alignas(64) NibbleGroup {
    int8_t low[64];
    int8_t high[64];
    int32_t start[16];               // what takes the offset of the weights away, lane by lane
    float scale[4 * quarter_lanes];  // of each block, in all of its places
    union {
        float sum[4];            // of types with a minimum: scale times each block's sum
        int32_t block_start[4];  // of the others: the sum of the starts of each block's lanes
    };
};

template <int offset>
void order_block(const int8_t * quantized, float scale, NibbleGroup & group, int64_t block) {
    const auto place = static_cast<size_t>(block) * 16;
    std::memcpy(group.low + place, quantized, 16);
    std::memcpy(group.high + place, quantized + 16, 16);
    for (size_t lane = place / 4; lane < place / 4 + 4; ++lane) {
        int32_t sum = 0;
        for (size_t j = 4 * lane; j < 4 * lane + 4; ++j) {
            sum += group.low[j] + group.high[j];
        }
        group.start[lane] = -offset * sum;
        if constexpr (offset != 0) {
            group.block_start[block] -= offset * sum;
        }
        group.scale[lane * quarter_lanes / 4] = scale;
    }
}

struct Nibbles {
    Bytes low, high;
    Quarters scale;
};
struct NibblesAndMinima : Nibbles {
    Minima minima;
};

// Four blocks of 32 weights.
template <typename Block, bool follow_each_other>
struct Four {
    const Block * blocks[4];
};
template <typename Block>
Four<Block, true> four_from(const Block * first) {
    return {{first, first + 1, first + 2, first + 3}};
}
// With fewer left, the last stands for those that are missing: what it is multiplied with is zero.
template <typename Block>
Four<Block, false> fewer_from(const Block * first, int64_t n) {
    return {{first, first + (n > 1 ? 1 : 0), first + (n > 2 ? 2 : n - 1), first + n - 1}};
}

template <typename Blocks>
[[gnu::always_inline]] inline Bytes packed_of(const Blocks & four) {
    return join(four.blocks[0]->qs, four.blocks[1]->qs, four.blocks[2]->qs, four.blocks[3]->qs);
}

template <typename Blocks>
[[gnu::always_inline]] inline Heads heads_of(const Blocks & four) {
    return heads_of(four.blocks[0], four.blocks[1], four.blocks[2], four.blocks[3]);
}

// The weights of blocks that begin with their scale, and perhaps their minimum.
template <typename Type>
[[gnu::always_inline]] inline auto with_scales(Bytes low, Bytes high, const Heads & heads) {
    const LowAndHigh numbers = halves_of(heads.of[0]);
    if constexpr (Type::has_minimum) {
        return NibblesAndMinima{{low, high, quarters(numbers.low)}, numbers.high};
    } else {
        return Nibbles{low, high, quarters(numbers.low)};
    }
}

// A type has: its block; decode() of four; and what it has added to its weights. With a minimum, llama.cpp
// quantizes activations to blocks that have their sum.
template <typename BlockOfType, ggml_type number, int added, bool with_minimum = false>
struct NibbleType {
    using Block = BlockOfType;
    using Activations = std::conditional_t<with_minimum, block_q8_1, block_q8_0>;
    static constexpr ggml_type type = number;
    static constexpr ggml_type activations = with_minimum ? GGML_TYPE_Q8_1 : GGML_TYPE_Q8_0;
    static constexpr int offset = added;
    static constexpr bool has_minimum = with_minimum;
    static constexpr bool is_signed = false;
    static constexpr bool has_fifth_bits = false;
    static constexpr float factor = 1;  // of what decode() gives
};

// For many columns also: the weights of the low and of the high nibbles, and the scale in the first bytes of blocks.
struct Mxfp4 : NibbleType<block_mxfp4, GGML_TYPE_MXFP4, table_offset(-12)> {
    // The table has twice the values.
    static constexpr float factor = 0.5F;
    alignas(16) static constexpr int8_t table[16] = {
        offset,     offset + 1, offset + 2, offset + 3, offset + 4, offset + 6, offset + 8, offset + 12,
        offset - 0, offset - 1, offset - 2, offset - 3, offset - 4, offset - 6, offset - 8, offset - 12};

    Table values = table_of(table);
    Bytes low(Bytes packed) const { return look_up_low(values, packed); }
    Bytes high(Bytes packed) const { return look_up_high(values, packed); }
    template <typename Head>
    static Floats scale_in(const Head & head) {
        return powers_in_lowest_bytes(head.of[0]);
    }
    template <bool follow_each_other>
    [[gnu::always_inline]] Nibbles decode(const Four<Block, follow_each_other> & four) const {
        const Bytes packed = packed_of(four);
        const auto e = [&](size_t i) { return &four.blocks[i]->e; };
        if constexpr (follow_each_other) {
            return {low(packed), high(packed), powers_of_two(e(0))};
        } else {
            return {low(packed), high(packed), powers_of_two(e(0), e(1), e(2), e(3))};
        }
    }
};

struct Iq4Nl : NibbleType<block_iq4_nl, GGML_TYPE_IQ4_NL, signed_offset> {
    static constexpr bool is_signed = true;
    alignas(16) static constexpr int8_t table[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                     1,    13,   25,  38,  53,  69,  89,  113};

    Table values = table_of(table);
    Bytes low(Bytes packed) const { return look_up_low(values, packed); }
    Bytes high(Bytes packed) const { return look_up_high(values, packed); }
    template <typename Head>
    static Floats scale_in(const Head & head) {
        return halves_of_lanes(head.of[0]);
    }
    template <typename Blocks>
    [[gnu::always_inline]] auto decode(const Blocks & four) const {
        const Bytes packed = packed_of(four);
        return with_scales<Iq4Nl>(low(packed), high(packed), heads_of(four));
    }
};

template <typename Type>
struct FourBits : Type {
    static Bytes low(Bytes packed) { return low_nibbles(packed); }
    static Bytes high(Bytes packed) { return high_nibbles(packed); }
    template <typename Head>
    static Floats scale_in(const Head & head) {
        return halves_of_lanes(head.of[0]);
    }
    template <typename Blocks>
    [[gnu::always_inline]] auto decode(const Blocks & four) const {
        const Bytes packed = packed_of(four);
        return with_scales<Type>(low(packed), high(packed), heads_of(four));
    }
};
using Q4_0 = FourBits<NibbleType<block_q4_0, GGML_TYPE_Q4_0, 8>>;
using Q4_1 = FourBits<NibbleType<block_q4_1, GGML_TYPE_Q4_1, 0, true>>;

template <typename Type>
struct FiveBits : FourBits<Type> {
    static constexpr bool has_fifth_bits = true;
    template <typename Head>
    static auto fifth_bits_in(const Head & head) {
        return Type::has_minimum ? head.of[1] : join_shorts(high_short(head.of[0]), head.of[1]);
    }
    template <typename Blocks>
    [[gnu::always_inline]] auto decode(const Blocks & four) const {
        const Bytes packed = packed_of(four);
        const Heads heads = heads_of(four);
        // The bits of sixteen weights each: the scale alone, or scale and minimum, are before them.
        if constexpr (Type::has_minimum) {
            return with_scales<Type>(with_fifth_bits<0>(low_nibbles(packed), heads.of[1]),
                                     with_fifth_bits<2>(high_nibbles(packed), heads.of[1]), heads);
        } else {
            return with_scales<Type>(with_fifth_bits<2>(low_nibbles(packed), heads.of[0]),
                                     with_fifth_bits<0>(high_nibbles(packed), heads.of[1]), heads);
        }
    }
};
using Q5_0 = FiveBits<NibbleType<block_q5_0, GGML_TYPE_Q5_0, 16>>;
using Q5_1 = FiveBits<NibbleType<block_q5_1, GGML_TYPE_Q5_1, 0, true>>;

size_t nibble_bytes(int64_t n) {
    return static_cast<size_t>(groups_in(n)) * sizeof(NibbleGroup);
}

template <typename Type>
void order_nibbles(const void * quantized, int64_t n, void * ordered) {
    const auto * blocks = static_cast<const typename Type::Activations *>(quantized);
    auto * groups = static_cast<NibbleGroup *>(ordered);
    std::memset(static_cast<void *>(groups), 0, nibble_bytes(n));
    for (int64_t i = 0; i < n / 32; ++i) {
        NibbleGroup & group = groups[i / group_blocks];
        order_block<Type::offset>(blocks[i].qs, Type::factor * float_of(blocks[i].d), group, i % group_blocks);
        if constexpr (Type::has_minimum) {
            group.sum[i % group_blocks] = float_of(blocks[i].s);
        }
    }
}

template <typename Type>
[[gnu::always_inline]] inline Floats add_nibbles(const Nibbles & weights, const NibbleGroup & group, Floats sum) {
    Ints products = load_start<Type::offset>(group.start);
    if constexpr (Type::is_signed) {
        products = dot_signed(dot_signed(products, weights.low, load(group.low)), weights.high, load(group.high));
    } else {
        products = dot(products, weights.low, load(group.low), weights.high, load(group.high));
    }
    return multiply_add(to_floats(products), times(weights.scale, load_quarters(group.scale)), sum);
}

// The largest exponent is a number of llama.cpp's, but not of powers_of_two().
void mend(float & product_of_row, const void * row_of_mxfp4, int64_t n, const void * activations) {
    if (product_of_row - product_of_row == 0) {  // neither infinite nor not a number
        return;
    }
    const auto * row = static_cast<const block_mxfp4 *>(row_of_mxfp4);
    const auto * groups = static_cast<const NibbleGroup *>(activations);
    float sum = 0;
    for (int64_t i = 0; i < n / 32; ++i) {
        const NibbleGroup & group = groups[i / group_blocks];
        const auto place = static_cast<size_t>(i % group_blocks) * 16;
        int32_t product = 0;
        for (size_t j = 0; j < 16; ++j) {
            product += (Mxfp4::table[row[i].qs[j] & 15] - Mxfp4::offset) * group.low[place + j];
            product += (Mxfp4::table[row[i].qs[j] >> 4] - Mxfp4::offset) * group.high[place + j];
        }
        const uint32_t e = row[i].e;
        const uint32_t bits = e < 2 ? 0x00200000U << e : (e - 1) << 23;
        float half_of_power;
        std::memcpy(&half_of_power, &bits, sizeof(bits));
        sum +=
            static_cast<float>(product) * (half_of_power * (group.scale[place / (16 / quarter_lanes)] / Mxfp4::factor));
    }
    product_of_row = sum;
}

template <typename Type, size_t n_columns>
void multiply_row(const typename Type::Block * row, int64_t n, const Columns<n_columns> & columns, float * out) {
    using Block = typename Type::Block;
    const Type type;
    Sums<n_columns> sums = no_sums<n_columns>();
    const auto step = [&](const auto & four, int64_t i) __attribute__((always_inline)) {
        const auto weights = type.decode(four);
        for_each<n_columns>([&](auto c) __attribute__((always_inline)) {
            const auto & group = columns.template group<NibbleGroup>(c.value, i);
            sums.of[c.value] = add_nibbles<Type>(weights, group, sums.of[c.value]);
            if constexpr (Type::has_minimum) {
                sums.of[c.value] = multiply_add(weights.minima, load_sums(group.sum), sums.of[c.value]);
            }
        });
    };
    constexpr int64_t unrolled = 4;
    const int64_t n_whole = n / group_weights;
    int64_t i = 0;
    for (; i + unrolled <= n_whole; i += unrolled) {
        prefetch<sizeof(Block) * group_blocks * unrolled>(row + i * group_blocks, columns.prefetch_bytes);
        for_each<unrolled>([&](auto j) __attribute__((always_inline)) {
            const auto k = i + static_cast<int64_t>(j.value);
            step(four_from(row + k * group_blocks), k);
        });
    }
    prefetch<sizeof(Block) * group_blocks>(row + i * group_blocks, columns.prefetch_bytes);
    for (; i < n_whole; ++i) {
        step(four_from(row + i * group_blocks), i);
    }
    if (n % group_weights != 0) {
        step(fewer_from(row + i * group_blocks, n % group_weights / 32), i);
    }
    for_each<n_columns>([&](auto c) {
        out[c.value] = total(sums.of[c.value]);
        if constexpr (Type::type == GGML_TYPE_MXFP4) {
            mend(out[c.value], row, n, columns.activations[c.value]);
        }
    });
}

// --- Blocks of 256 weights of four bits from a table ----------------------------------------------

struct Iq4Xs {
    static constexpr int offset = signed_offset;
    static constexpr bool is_signed = true;
    Table values = table_of(Iq4Nl::table);

    // The first or the second half of a block.
    [[gnu::always_inline]] Nibbles decode(const block_iq4_xs & block, int half) const {
        const Bytes packed = load(block.qs + 64 * half);
        const int low = block.scales_l[2 * half] | block.scales_l[2 * half + 1] << 8;
        const int high = block.scales_h >> 8 * half;
        const float d = float_of(block.d);
        return {look_up_low(values, packed), look_up_high(values, packed), quarters(four_six_bits(d, low, high))};
    }
};

void order_iq4_xs(const void * quantized, int64_t n, void * ordered) {
    const auto * blocks = static_cast<const block_q8_K *>(quantized);
    auto * groups = static_cast<NibbleGroup *>(ordered);
    std::memset(static_cast<void *>(groups), 0, nibble_bytes(n));
    for (int64_t i = 0; i < n / 32; ++i) {
        const block_q8_K & block = blocks[i / 8];
        order_block<Iq4Xs::offset>(block.qs + 32 * (i % 8), block.d, groups[i / group_blocks], i % group_blocks);
    }
}

template <size_t n_columns>
void multiply_row(const block_iq4_xs * row, int64_t n, const Columns<n_columns> & columns, float * out) {
    const Iq4Xs type;
    Sums<n_columns> sums = no_sums<n_columns>();
    for (int64_t i = 0; i < n / QK_K; ++i) {
        prefetch<sizeof(block_iq4_xs)>(row + i, columns.prefetch_bytes);
        for_each<2>([&](auto half) __attribute__((always_inline)) {
            const Nibbles weights = type.decode(row[i], half.value);
            for_each<n_columns>([&](auto c) __attribute__((always_inline)) {
                const auto & group =
                    columns.template group<NibbleGroup>(c.value, 2 * i + static_cast<int64_t>(half.value));
                sums.of[c.value] = add_nibbles<Iq4Xs>(weights, group, sums.of[c.value]);
            });
        });
    }
    for_each<n_columns>([&](auto c) { out[c.value] = total(sums.of[c.value]); });
}

// --- Blocks of 32 bytes ---------------------------------------------------------------------------

struct alignas(64) ByteGroup {
    int8_t bytes[64];  // of two blocks
    int32_t start[16];
    float scale[2 * half_lanes];
    int32_t block_start[2];
};

size_t byte_group_bytes(int64_t n) {
    return static_cast<size_t>((n + 63) / 64) * sizeof(ByteGroup);
}

void order_q8_0(const void * quantized, int64_t n, void * ordered) {
    const auto * blocks = static_cast<const block_q8_0 *>(quantized);
    auto * groups = static_cast<ByteGroup *>(ordered);
    std::memset(static_cast<void *>(groups), 0, byte_group_bytes(n));
    for (int64_t i = 0; i < n / 32; ++i) {
        ByteGroup & group = groups[i / 2];
        const auto place = static_cast<size_t>(i % 2) * 32;
        std::memcpy(group.bytes + place, blocks[i].qs, 32);
        for (size_t lane = place / 4; lane < place / 4 + 8; ++lane) {
            const int8_t * four = group.bytes + 4 * lane;
            group.start[lane] = -signed_offset * (four[0] + four[1] + four[2] + four[3]);
            group.block_start[i % 2] += group.start[lane];
            group.scale[lane * half_lanes / 8] = float_of(blocks[i].d);
        }
    }
}

template <size_t n_columns>
void multiply_row(const block_q8_0 * row, int64_t n, const Columns<n_columns> & columns, float * out) {
    constexpr int64_t unrolled = 4;
    Sums<n_columns> even = no_sums<n_columns>(), odd = no_sums<n_columns>();
    const auto step = [&](const block_q8_0 * blocks, int64_t i, Sums<n_columns> & sums) __attribute__((always_inline)) {
        const Bytes weights =
            join(reinterpret_cast<const uint8_t *>(blocks[0].qs), reinterpret_cast<const uint8_t *>(blocks[1].qs));
        const Halves scale = halves(scale_of(blocks[0].d), scale_of(blocks[1].d));
        for_each<n_columns>([&](auto c) __attribute__((always_inline)) {
            const auto & group = columns.template group<ByteGroup>(c.value, i);
            const HalfInts products = dot_halves(load_start<signed_offset>(group.start), weights, load(group.bytes));
            sums.of[c.value] =
                multiply_add(to_floats(products), times(scale, load_halves(group.scale)), sums.of[c.value]);
        });
    };
    const int64_t n_whole = n / 64;
    int64_t i = 0;
    for (; i + unrolled <= n_whole; i += unrolled) {
        prefetch<2 * unrolled * sizeof(block_q8_0)>(row + 2 * i, columns.prefetch_bytes);
        for_each<unrolled>([&](auto j) __attribute__((always_inline)) {
            const auto k = i + static_cast<int64_t>(j.value);
            step(row + 2 * k, k, j.value % 2 == 0 ? even : odd);
        });
    }
    for (; i < n_whole; ++i) {
        step(row + 2 * i, i, even);
    }
    if (n % 64 != 0) {
        block_q8_0 rest[2];
        std::memset(static_cast<void *>(rest), 0, sizeof(rest));
        rest[0] = row[2 * i];
        step(rest, i, even);
    }
    for_each<n_columns>([&](auto c) { out[c.value] = total(sum_of(even.of[c.value], odd.of[c.value])); });
}

// --- Blocks of 256 weights with whole scales -------------------------------------------------------

struct alignas(64) SuperBlock {
    int8_t bytes[QK_K];  // in the order of the weights
    int16_t sums[16];    // of 32 or of 16 activations
    float d;
};

size_t super_block_bytes(int64_t n) {
    return static_cast<size_t>(n / QK_K) * sizeof(SuperBlock);
}

// 64 bytes of nibbles have parts 0 and 2 of 32 weights below, and 1 and 3 above. (Turned round, it is the same.)
constexpr size_t place_of_part[8] = {0, 2, 1, 3, 4, 6, 5, 7};

void order_by_nibbles(const void * quantized, int64_t n, void * ordered) {
    const auto * blocks = static_cast<const block_q8_K *>(quantized);
    auto * out = static_cast<SuperBlock *>(ordered);
    std::memset(static_cast<void *>(out), 0, super_block_bytes(n));
    for (int64_t i = 0; i < n / QK_K; ++i) {
        for (size_t j = 0; j < 8; ++j) {
            std::memcpy(out[i].bytes + 32 * j, blocks[i].qs + 32 * place_of_part[j], 32);
            out[i].sums[j] = static_cast<int16_t>(blocks[i].bsums[2 * j] + blocks[i].bsums[2 * j + 1]);
        }
        out[i].d = blocks[i].d;
    }
}

void order_by_weights(const void * quantized, int64_t n, void * ordered) {
    const auto * blocks = static_cast<const block_q8_K *>(quantized);
    auto * out = static_cast<SuperBlock *>(ordered);
    std::memset(static_cast<void *>(out), 0, super_block_bytes(n));
    for (int64_t i = 0; i < n / QK_K; ++i) {
        std::memcpy(out[i].bytes, blocks[i].qs, QK_K);
        std::memcpy(out[i].sums, blocks[i].bsums, sizeof(out[i].sums));
        out[i].d = blocks[i].d;
    }
}

template <typename Type>
struct Whole {
    Bytes weights[4];
    typename Type::Scales scales[4];
};

// The scales and minima of eight parts, of six bits each, as llama.cpp packs them in twelve bytes.
struct SixBits {
    uint64_t scales, minima;
};

SixBits unpack_six_bits(const uint8_t * twelve) {
    uint32_t a, b, c;
    std::memcpy(&a, twelve, 4);
    std::memcpy(&b, twelve + 4, 4);
    std::memcpy(&c, twelve + 8, 4);
    const auto join_words = [](uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; };
    return {join_words(a & 0x3f3f3f3fU, (c & 0x0f0f0f0fU) | (a >> 6 & 0x03030303U) << 4),
            join_words(b & 0x3f3f3f3fU, (c >> 4 & 0x0f0f0f0fU) | (b >> 6 & 0x03030303U) << 4)};
}

// A type has: its weights and scales, of halves or of quarters; decode(); and add(), which takes minima or offsets into
// account.
template <typename Block, bool five_bits>
struct FourOrFiveBits {
    using Weights = Block;
    static constexpr bool has_fifth_bits = five_bits;
    using Scales = HalfScales;
    struct Rest {
        Shorts8 minima;
        float d, d_minimum;
    };

    [[gnu::always_inline]] static void decode(const Block & block, Whole<FourOrFiveBits> & whole, Rest & rest) {
        const SixBits six = unpack_six_bits(block.scales);
        const Shorts8 scales = shorts_of(six.scales);
        const Bytes first = load(block.qs), second = load(block.qs + 64);
        whole.weights[0] = low_nibbles(first);
        whole.weights[1] = high_nibbles(first);
        whole.weights[2] = low_nibbles(second);
        whole.weights[3] = high_nibbles(second);
        if constexpr (five_bits) {
            const Bytes fifth = join(block.qh, block.qh);
            whole.weights[0] = with_bit<0, 2>(whole.weights[0], fifth);
            whole.weights[1] = with_bit<1, 2>(whole.weights[1], fifth);
            whole.weights[2] = with_bit<4, 2>(whole.weights[2], fifth);
            whole.weights[3] = with_bit<5, 2>(whole.weights[3], fifth);
        }
        whole.scales[0] = spread_halves<0, 2>(scales);
        whole.scales[1] = spread_halves<1, 3>(scales);
        whole.scales[2] = spread_halves<4, 6>(scales);
        whole.scales[3] = spread_halves<5, 7>(scales);
        rest = {shorts_of(six.minima), float_of(block.d), float_of(block.dmin)};
    }
    [[gnu::always_inline]] static Floats add(WholeInts products, const Rest & rest, const SuperBlock & x, Floats sum) {
        sum = multiply_add(to_floats(products), all(rest.d * x.d), sum);
        return multiply_add(to_floats(sums_dot(rest.minima, x.sums)), all(-rest.d_minimum * x.d), sum);
    }
};

struct SixBitWeights {
    using Weights = block_q6_K;
    using Scales = QuarterScales;
    struct Rest {
        ByteScales scales;
        float d;
    };

    [[gnu::always_inline]] static void decode(const block_q6_K & block, Whole<SixBitWeights> & whole, Rest & rest) {
        rest = {byte_scales(block.scales), float_of(block.d)};
        const Bytes first = load(block.ql), second = load(block.ql + 64);
        const Bytes first_high = join(block.qh, block.qh), second_high = join(block.qh + 32, block.qh + 32);
        whole.weights[0] = with_two_bits<0>(low_nibbles(first), first_high);
        whole.weights[1] = with_two_bits<4>(high_nibbles(first), first_high);
        whole.weights[2] = with_two_bits<0>(low_nibbles(second), second_high);
        whole.weights[3] = with_two_bits<4>(high_nibbles(second), second_high);
        whole.scales[0] = spread_quarters<0>(rest.scales);
        whole.scales[1] = spread_quarters<4>(rest.scales);
        whole.scales[2] = spread_quarters<8>(rest.scales);
        whole.scales[3] = spread_quarters<12>(rest.scales);
    }
    [[gnu::always_inline]] static Floats add(WholeInts products, const Rest & rest, const SuperBlock & x, Floats sum) {
        const WholeInts less = less_32_times(products, byte_sums_dot(rest.scales, x.sums));
        return multiply_add(to_floats(less), all(rest.d * x.d), sum);
    }
};

template <typename Type, size_t n_columns>
void multiply_whole_row(const typename Type::Weights * row, int64_t n, const Columns<n_columns> & columns,
                        float * out) {
    Sums<n_columns> sums = no_sums<n_columns>();
    for (int64_t i = 0; i < n / QK_K; ++i) {
        prefetch<sizeof(row[0])>(row + i, columns.prefetch_bytes);
        Whole<Type> whole;
        typename Type::Rest rest;
        Type::decode(row[i], whole, rest);
        for_each<n_columns>([&](auto c) __attribute__((always_inline)) {
            const auto & x = columns.template group<SuperBlock>(c.value, i);
            WholeInts products = no_ints();
            for_each<4>([&](auto k) __attribute__((always_inline)) {
                products = scaled_dot_part<k.value>(products, whole.weights[k.value], load(x.bytes + 64 * k.value),
                                                    whole.scales[k.value]);
            });
            sums.of[c.value] = Type::add(products, rest, x, sums.of[c.value]);
        });
    }
    for_each<n_columns>([&](auto c) { out[c.value] = total(sums.of[c.value]); });
}

// How many columns are multiplied with sixteen rows at a time, where the instruction set has that.
template <typename Type>
struct NibblePanels;
template <typename Block>
struct BlockPanels;
template <typename Type>
struct WholePanels;
#ifdef OVERSPILL_HAS_PANELS
#include "product/panels.h"
#endif

// --- The table ----------------------------------------------------------------------------------------

// Type::multiply(row, n, columns, out) does a row of weights and some columns.
template <typename Type, size_t n_columns>
void multiply_columns(const ProductShape & shape, const void * row, int64_t r, int64_t first) {
    Columns<n_columns> columns;
    columns.prefetch_bytes = shape.prefetch_bytes;
    float out[n_columns];
    for_each<n_columns>([&](auto c) {
        columns.activations[c.value] =
            static_cast<const uint8_t *>(shape.activations[first + static_cast<int64_t>(c.value)]);
    });
    Type::multiply(row, shape.n, columns, out);
    for_each<n_columns>([&](auto c) { shape.out[first + static_cast<int64_t>(c.value)][r] = out[c.value]; });
}

template <typename Type>
void multiply(const ProductShape & shape) {
    int64_t r = 0;
#ifdef OVERSPILL_HAS_PANELS
    if (shape.n_columns >= least_panel_columns) {
        r = rows_by_panels<typename Type::Panels>(shape);
    }
#endif
    for (; r < shape.n_rows; ++r) {
        const uint8_t * row = static_cast<const uint8_t *>(shape.weights) + static_cast<size_t>(r) * shape.row_bytes;
        int64_t c = 0;
        for (; c + 4 <= shape.n_columns; c += 4) {
            multiply_columns<Type, 4>(shape, row, r, c);
        }
        if (c + 2 <= shape.n_columns) {
            multiply_columns<Type, 2>(shape, row, r, c);
            c += 2;
        }
        if (c < shape.n_columns) {
            multiply_columns<Type, 1>(shape, row, r, c);
        }
    }
}

template <typename Type>
struct NibbleRow {
    using Panels = NibblePanels<Type>;
    template <size_t n_columns>
    static void multiply(const void * row, int64_t n, const Columns<n_columns> & columns, float * out) {
        multiply_row<Type>(static_cast<const typename Type::Block *>(row), n, columns, out);
    }
};

template <typename Block>
struct BlockRow {
    using Panels = BlockPanels<Block>;
    template <size_t n_columns>
    static void multiply(const void * row, int64_t n, const Columns<n_columns> & columns, float * out) {
        multiply_row(static_cast<const Block *>(row), n, columns, out);
    }
};

template <typename Type>
struct WholeRow {
    using Panels = WholePanels<Type>;
    template <size_t n_columns>
    static void multiply(const void * row, int64_t n, const Columns<n_columns> & columns, float * out) {
        multiply_whole_row<Type>(static_cast<const typename Type::Weights *>(row), n, columns, out);
    }
};

// Of products with more columns than these llama.cpp's own are faster.
constexpr int64_t any_number = INT64_MAX;
#ifdef OVERSPILL_HAS_PANELS  // measured on Zen 5 alone
constexpr int64_t most_for_super_blocks = 64;
constexpr int64_t most_for_bytes = any_number;
#else  // on Zen 4 with AVX-512, row by row; taken over for AVX2 and ARM
constexpr int64_t most_for_super_blocks = 8;
constexpr int64_t most_for_bytes = 4;
#endif

template <typename Type>
constexpr Products nibbles() {
    return {Type::type,          Type::activations,        32, any_number, nibble_bytes,
            order_nibbles<Type>, multiply<NibbleRow<Type>>};
}

using Q4_K = FourOrFiveBits<block_q4_K, false>;
using Q5_K = FourOrFiveBits<block_q5_K, true>;

constexpr Products products[] = {
    nibbles<Mxfp4>(),
    nibbles<Iq4Nl>(),
    nibbles<Q4_0>(),
    nibbles<Q4_1>(),
    nibbles<Q5_0>(),
    nibbles<Q5_1>(),
    {GGML_TYPE_IQ4_XS, GGML_TYPE_Q8_K, QK_K, most_for_super_blocks, nibble_bytes, order_iq4_xs,
     multiply<BlockRow<block_iq4_xs>>},
    {GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 32, most_for_bytes, byte_group_bytes, order_q8_0, multiply<BlockRow<block_q8_0>>},
    {GGML_TYPE_Q4_K, GGML_TYPE_Q8_K, QK_K, most_for_super_blocks, super_block_bytes, order_by_nibbles,
     multiply<WholeRow<Q4_K>>},
    {GGML_TYPE_Q5_K, GGML_TYPE_Q8_K, QK_K, most_for_super_blocks, super_block_bytes, order_by_nibbles,
     multiply<WholeRow<Q5_K>>},
    {GGML_TYPE_Q6_K, GGML_TYPE_Q8_K, QK_K, most_for_super_blocks, super_block_bytes, order_by_weights,
     multiply<WholeRow<SixBitWeights>>},
};

}  // namespace

void activate(const ActivationRow & row);  // in activation_passes.cpp

extern const ProductSet set;
const ProductSet set = {OVERSPILL_PRODUCTS_NAME, products, sizeof(products) / sizeof(products[0]), activate};

}  // namespace overspill::OVERSPILL_PRODUCTS
