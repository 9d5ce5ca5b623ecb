// Products with many columns, a part of product_passes.cpp: of sixteen rows at a time, a row in each lane.
//
// Row by row, every column adds up lanes that belong to one row, and scales each block's. Here the weights of sixteen
// rows are put side by side once for all columns, and a block is scaled once for sixteen results.

// With fewer columns, row by row is faster.
constexpr int64_t least_panel_columns = 5;
// Their sums stay in the nearest cache.
constexpr int64_t most_panel_columns = 16;

// 16 weights of each row, or 32: vector j has four of each. They are unsigned.
template <size_t n_vectors>
struct Panel {
    Bytes weights[n_vectors];
    Floats scale;
    Floats minimum;  // of types that have one
};

// What they are multiplied with.
struct PanelActivations {
    const int8_t * first;  // 16
    const int8_t * second;
    int32_t start;
    float scale;
    float sum;  // scale times the sum
};

template <bool has_minimum, size_t n_vectors, typename ActivationsOf>
[[gnu::always_inline]] inline void add_panel(const Panel<n_vectors> & panel, int64_t n_columns, Floats * sums,
                                             const ActivationsOf & activations_of) {
    // Copies stay in registers: as far as the compiler knows, the sums could be where the panel is.
    const Panel<n_vectors> p = panel;
    for (int64_t c = 0; c < n_columns; ++c) {
        const PanelActivations x = activations_of(c);
        Ints products = all_ints(x.start);
        for_each<n_vectors>([&](auto j) __attribute__((always_inline)) {
            const int8_t * sixteen = j.value < 4 ? x.first : x.second;
            products = dot(products, p.weights[j.value], all_words(sixteen + 4 * (j.value % 4)));
        });
        Floats sum = multiply_add(to_floats(products), times(p.scale, all(x.scale)), sums[c]);
        if constexpr (has_minimum) {
            sum = multiply_add(p.minimum, all(x.sum), sum);
        }
        sums[c] = sum;
    }
}

// Sixteen rows with some columns.
struct PanelShape {
    size_t row_bytes;
    const void * const * activations;
    int64_t n_columns;
    Floats * sums;

    template <typename Group>
    const Group & group(int64_t column, int64_t i) const {
        return static_cast<const Group *>(activations[column])[i];
    }
};

// Panels of a type have: its blocks, of n weights; and add(), which adds the products of sixteen rows' blocks to the
// sums of all columns.
template <typename Type>
struct NibblePanels {
    using Block = typename Type::Block;
    static constexpr int64_t n = 32;

    const Type type;

    [[gnu::always_inline]] void add(const Block * block, int64_t i, const PanelShape & shape) const {
        Panel<8> panel;
        Words4 head, packed;
        load_rows(block, shape.row_bytes, head);
        load_rows(block->qs, shape.row_bytes, packed);
        for_each<4>([&](auto j) __attribute__((always_inline)) {
            panel.weights[j.value] = type.low(packed.of[j.value]);
            panel.weights[4 + j.value] = type.high(packed.of[j.value]);
            if constexpr (Type::has_fifth_bits) {
                const Bytes fifth = Type::fifth_bits_in(head);
                panel.weights[j.value] = with_fifth_bits_of_lanes<4 * j.value>(panel.weights[j.value], fifth);
                panel.weights[4 + j.value] =
                    with_fifth_bits_of_lanes<16 + 4 * j.value>(panel.weights[4 + j.value], fifth);
            }
            if constexpr (Type::is_signed) {
                panel.weights[j.value] = unsigned_of(panel.weights[j.value]);
                panel.weights[4 + j.value] = unsigned_of(panel.weights[4 + j.value]);
            }
        });
        panel.scale = Type::scale_in(head);
        panel.minimum = high_halves_of_lanes(head.of[0]);
        const auto b = static_cast<size_t>(i % group_blocks);
        add_panel<Type::has_minimum>(panel, shape.n_columns, shape.sums, [&](int64_t c) __attribute__((always_inline)) {
            const auto & group = shape.group<NibbleGroup>(c, i / group_blocks);
            PanelActivations x = {group.low + 16 * b, group.high + 16 * b, 0, group.scale[quarter_lanes * b], 0};
            if constexpr (Type::has_minimum) {
                x.sum = group.sum[b];
            } else {
                x.start = group.block_start[b];
            }
            return x;
        });
    }
};

template <>
struct BlockPanels<block_iq4_xs> {
    using Block = block_iq4_xs;
    static constexpr int64_t n = QK_K;

    const Iq4Xs type;

    void add(const Block * block, int64_t i, const PanelShape & shape) const {
        Words4 head;
        load_rows(block, shape.row_bytes, head);
        const Floats d = halves_of_lanes(head.of[0]);
        for_each<8>([&](auto part) __attribute__((always_inline)) {
            constexpr size_t k = part.value;
            Panel<8> panel;
            Words4 packed;
            load_rows(block->qs + 16 * k, shape.row_bytes, packed);
            for_each<4>([&](auto j) __attribute__((always_inline)) {
                panel.weights[j.value] = unsigned_of(look_up_low(type.values, packed.of[j.value]));
                panel.weights[4 + j.value] = unsigned_of(look_up_high(type.values, packed.of[j.value]));
            });
            const Ints six = join_bits(bits_of_lanes<4 * k, 4>(head.of[1]), bits_of_lanes<16 + 2 * k, 2>(head.of[0]));
            panel.scale = times(d, to_floats(minus(six, 32)));
            add_panel<false>(panel, shape.n_columns, shape.sums, [&](int64_t c) __attribute__((always_inline)) {
                const auto & group = shape.group<NibbleGroup>(c, 2 * i + static_cast<int64_t>(k / 4));
                constexpr size_t b = k % 4;
                return PanelActivations{group.low + 16 * b, group.high + 16 * b, group.block_start[b],
                                        group.scale[quarter_lanes * b], 0};
            });
        });
    }
};

// Of eight parts, 64 bytes of nibbles have the first four, and each 32 of them two.
template <typename Type>
struct WholePanels {
    using Block = typename Type::Weights;
    static constexpr int64_t n = QK_K;

    void add(const Block * block, int64_t i, const PanelShape & shape) const {
        Words4 head;  // d and the minimum's, and the twelve bytes of unpack_six_bits()
        load_rows(block, shape.row_bytes, head);
        const Floats d = halves_of_lanes(head.of[0]), d_minimum = high_halves_of_lanes(head.of[0]);
        const auto low_six = [](Ints x) { return bits_of_bytes<0, 6>(x); };
        const auto high_six = [](Ints four, Ints two) { return join_bits(four, bits_of_bytes<6, 2>(two)); };
        const Ints a = head.of[1], b = head.of[2], c = head.of[3];
        const Ints scales[2] = {low_six(a), high_six(bits_of_bytes<0, 4>(c), a)};
        const Ints minima[2] = {low_six(b), high_six(bits_of_bytes<4, 4>(c), b)};
        Words4 fifth[2];
        if constexpr (Type::has_fifth_bits) {
            load_rows(block->qh, shape.row_bytes, fifth[0]);
            load_rows(block->qh + 16, shape.row_bytes, fifth[1]);
        }
        for_each<4>([&](auto pair) __attribute__((always_inline)) {
            Words4 packed[2];
            load_rows(block->qs + 32 * pair.value, shape.row_bytes, packed[0]);
            load_rows(block->qs + 32 * pair.value + 16, shape.row_bytes, packed[1]);
            for_each<2>([&](auto is_high) __attribute__((always_inline)) {
                constexpr size_t part = 2 * pair.value + is_high.value;
                Panel<8> panel;
                for_each<8>([&](auto j) __attribute__((always_inline)) {
                    const Bytes nibbles = packed[j.value / 4].of[j.value % 4];
                    Bytes & weights = panel.weights[j.value];
                    weights = is_high.value == 0 ? low_nibbles(nibbles) : high_nibbles(nibbles);
                    if constexpr (Type::has_fifth_bits) {
                        weights = with_bit<part, 0>(weights, fifth[j.value / 4].of[j.value % 4]);
                    }
                });
                panel.scale = times(d, to_floats(bits_of_lanes<8 * (part % 4), 8>(scales[part / 4])));
                panel.minimum = times(d_minimum, to_floats(bits_of_lanes<8 * (part % 4), 8>(minima[part / 4])));
                add_panel<true>(panel, shape.n_columns, shape.sums, [&](int64_t column) __attribute__((always_inline)) {
                    const auto & x = shape.group<SuperBlock>(column, i);
                    const int8_t * bytes = x.bytes + 32 * place_of_part[part];
                    return PanelActivations{bytes, bytes + 16, 0, x.d, -x.d * static_cast<float>(x.sums[part])};
                });
            });
        });
    }
};

template <>
struct WholePanels<SixBitWeights> {
    using Block = block_q6_K;
    static constexpr int64_t n = QK_K;

    void add(const Block * block, int64_t i, const PanelShape & shape) const {
        Words4 d_of_rows, scales;
        load_rows(block->scales + 2, shape.row_bytes, d_of_rows);  // the block's last 16 bytes
        load_rows(block->scales, shape.row_bytes, scales);
        const Floats d = high_halves_of_lanes(d_of_rows.of[3]);
        for_each<4>([&](auto sixteen) __attribute__((always_inline)) {  // of 32 bytes with two bits of each weight
            constexpr size_t half = sixteen.value / 2, second = sixteen.value % 2;
            Words4 low[2], high;
            load_rows(block->ql + 64 * half + 16 * second, shape.row_bytes, low[0]);
            load_rows(block->ql + 64 * half + 32 + 16 * second, shape.row_bytes, low[1]);
            load_rows(block->qh + 32 * half + 16 * second, shape.row_bytes, high);
            for_each<4>([&](auto quarter) __attribute__((always_inline)) {
                constexpr size_t part = 8 * half + 2 * quarter.value + second;
                Panel<4> panel;
                for_each<4>([&](auto j) __attribute__((always_inline)) {
                    const Bytes nibbles = low[quarter.value % 2].of[j.value];
                    panel.weights[j.value] = join_bits(quarter.value < 2 ? low_nibbles(nibbles) : high_nibbles(nibbles),
                                                       bits_of_bytes<2 * quarter.value, 2>(high.of[j.value]));
                });
                panel.scale = times(d, to_floats(signed_byte_of_lanes<part % 4>(scales.of[part / 4])));
                add_panel<false>(panel, shape.n_columns, shape.sums, [&](int64_t c) __attribute__((always_inline)) {
                    const auto & x = shape.group<SuperBlock>(c, i);
                    return PanelActivations{x.bytes + 16 * part, nullptr, -32 * x.sums[part], x.d, 0};
                });
            });
        });
    }
};

template <>
struct BlockPanels<block_q8_0> {
    using Block = block_q8_0;
    static constexpr int64_t n = 32;

    [[gnu::always_inline]] void add(const Block * block, int64_t i, const PanelShape & shape) const {
        Words4 head, weights[2];
        load_rows(block, shape.row_bytes, head);
        load_rows(block->qs, shape.row_bytes, weights[0]);
        load_rows(block->qs + 16, shape.row_bytes, weights[1]);
        Panel<8> panel;
        for_each<8>([&](auto j) { panel.weights[j.value] = unsigned_of(weights[j.value / 4].of[j.value % 4]); });
        panel.scale = halves_of_lanes(head.of[0]);
        const auto b = static_cast<size_t>(i % 2);
        add_panel<false>(panel, shape.n_columns, shape.sums, [&](int64_t c) __attribute__((always_inline)) {
            const auto & group = shape.group<ByteGroup>(c, i / 2);
            return PanelActivations{group.bytes + 32 * b, group.bytes + 32 * b + 16, group.block_start[b],
                                    group.scale[half_lanes * b], 0};
        });
    }
};

// Into the second cache.
[[gnu::always_inline]] inline void prefetch_later(const uint8_t * p, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 64) {
        __builtin_prefetch(p + i, 0, 2);
    }
}

// Rows from the first one on, as many as there are whole panels of; returns their number.
template <typename Panels>
int64_t rows_by_panels(const ProductShape & shape) {
    const Panels panels{};
    int64_t r = 0;
    for (; r + panel_rows <= shape.n_rows; r += panel_rows) {
        const uint8_t * row = static_cast<const uint8_t *>(shape.weights) + static_cast<size_t>(r) * shape.row_bytes;
        for (int64_t first = 0; first < shape.n_columns; first += most_panel_columns) {
            const int64_t n_left = shape.n_columns - first;
            Floats sums[most_panel_columns];
            for (Floats & sum : sums) {
                sum = no_floats();
            }
            const PanelShape here = {shape.row_bytes, shape.activations + first,
                                     n_left < most_panel_columns ? n_left : most_panel_columns, sums};
            const auto * blocks = reinterpret_cast<const typename Panels::Block *>(row);
            // Rows are fetched from one end to the other before they are needed: what reads them goes from row to row,
            // which no CPU foresees.
            const size_t panel_bytes = panel_rows * shape.row_bytes;
            if (r == 0 && first == 0) {
                prefetch_later(row, panel_bytes);
            }
            const bool is_followed = first == 0 && r + 2 * panel_rows <= shape.n_rows;
            for (int64_t i = 0; i < shape.n / Panels::n; ++i) {
                if (is_followed) {
                    constexpr size_t n_bytes = panel_rows * sizeof(*blocks);
                    prefetch_later(row + panel_bytes + static_cast<size_t>(i) * n_bytes, n_bytes);
                }
                panels.add(blocks + i, i, here);
            }
            for (int64_t c = 0; c < here.n_columns; ++c) {
                float * out = shape.out[first + c] + r;
                store(out, sums[c]);
                if constexpr (std::is_same_v<typename Panels::Block, block_mxfp4>) {
                    for (int64_t k = 0; k < panel_rows; ++k) {
                        mend(out[k], row + static_cast<size_t>(k) * shape.row_bytes, shape.n, here.activations[c]);
                    }
                }
            }
        }
    }
    return r;
}
