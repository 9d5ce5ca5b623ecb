// Products of rows of quantized weights, as a GGUF file has them, with vectors of activations.
//
// Activations are quantized as llama.cpp does for the type, and put in order once for all products with that type: so
// the products of whole numbers are llama.cpp's, and only the sums of single precision are in another order.
#pragma once

#include <ggml.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace overspill {

// Activations in order start at such an address.
constexpr size_t activation_alignment = 64;

struct ProductShape {
    const void * weights;  // the first row
    size_t row_bytes;      // from a row to the next
    int64_t n_rows;
    int64_t n;                         // weights in a row
    const void * const * activations;  // of each column, in order
    float * const * out;               // of each column, the first row's
    int64_t n_columns;
    size_t prefetch_bytes;  // weights are looked for in memory so far ahead of where they are used
};

// What suits this CPU.
size_t prefetch_bytes();

// For one type of weights, by one instruction set.
struct Products {
    ggml_type weights;
    ggml_type activations;  // what llama.cpp quantizes them to
    // A row of weights is a multiple of so many.
    int64_t block;
    // With more columns llama.cpp's products are faster.
    int64_t most_columns;
    // Bytes of n activations in order; a multiple of the alignment.
    size_t (*ordered_bytes)(int64_t n);
    // Puts n activations of the type `activations` in order.
    void (*order)(const void * quantized, int64_t n, void * ordered);
    // Writes the products of all rows with all columns.
    void (*multiply)(const ProductShape & shape);
};

// What a feed-forward makes of a gate x and of y, what it is multiplied with.
enum class Activation {
    silu,          // x / (1 + e^-x) * y
    gelu,          // x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) * y, as llama.cpp's table of halves has it
    relu,          // max(x, 0) * y
    relu_squared,  // max(x, 0)^2 * y
    oai,           // x / (1 + e^(-alpha x)) * (y + 1), with x at most the limit and y within it
    clamped_silu,  // silu, with x at most the limit and y within it
};

struct ActivationRow {
    Activation activation;
    float alpha, limit;
    const float * x;
    const float * y;  // null: 1
    int64_t n;
    float * out;  // apart from x and y
};

struct ProductSet {
    const char * name;  // of the instruction set
    const Products * products;
    size_t n_products;
    void (*activate)(const ActivationRow & row);

    // Null if there is none for the type.
    const Products * find(ggml_type weights) const;
};

// The best that this CPU has, or the one that the environment variable OVERSPILL_KERNELS names; null if it is
// "llama.cpp", if this CPU or this build has none, or on ARM64 if none is named. Throws std::invalid_argument for other
// names.
const ProductSet * product_set();
// That for "auto", null for "llama.cpp", or the set of this name. Throws std::invalid_argument for other names.
const ProductSet * product_set(const std::string & kernels);

// All that this CPU can run, the fastest last.
std::vector<const ProductSet *> available_product_sets();

}  // namespace overspill
