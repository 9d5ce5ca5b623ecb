// What the instruction sets here have in common where a number of a half or a quarter is spread over all of its lanes.

using Table = Bytes;
using Words = Bytes;
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
constexpr auto load_start = load_ints;
constexpr auto no_quarters = no_floats;
constexpr auto load_quarters = load_floats;
constexpr auto load_halves = load_floats;
constexpr auto scale_of = float_of;
constexpr auto dot_halves = dot_signed;
using HalfScales = Scales;
using QuarterScales = Scales;
template <size_t k>
constexpr auto scaled_dot_part = scaled_dot;
