// What the instruction sets here have in common where a number of a half or a quarter is spread over all of its lanes.

using Table = Bytes;
using Quarters = Floats;  // one number for each quarter
using Halves = Floats;    // one number for each half
using HalfInts = Ints;    // sums for each half
using WholeInts = Ints;   // sums for all
constexpr size_t quarter_lanes = 4;
constexpr size_t half_lanes = 8;

// What a table gets added to have no number below zero, as the byte instructions take weights.
constexpr int table_offset(int least) {
    return -least;
}
template <int offset>
Ints load_start(const int32_t * start) {
    if constexpr (offset == 0) {
        return no_ints();
    } else {
        return load_ints(start);
    }
}
using Minima = __m128;  // of four blocks
constexpr auto load_quarters = load_floats;
inline Minima load_sums(const float * p) {
    return _mm_load_ps(p);
}
constexpr auto load_halves = load_floats;
constexpr auto scale_of = float_of;
constexpr auto dot_halves = dot_signed;
using HalfScales = Scales;
using QuarterScales = Scales;
template <size_t k>
constexpr auto scaled_dot_part = scaled_dot;
