// Activations of feed-forwards. Compiled once per instruction set, like the products, with the compiler's own vectors.
#include "product/products.h"

#include <cstring>

namespace overspill::OVERSPILL_PRODUCTS {

namespace {

// e^x = 2^n e^r with |r| <= ln(2) / 2, where the series up to the seventh power has an error below 1e-8.
inline float exp_of(float x) {
    constexpr float to_whole = 12582912.0F;  // 1.5 * 2^23: what is added to it becomes whole
    constexpr float least = -86.0F, most = 88.0F;
    const float below = x > most ? most : x;
    const float within = below < least ? least : below;
    const float shifted = __builtin_fmaf(within, 1.44269504F, to_whole);
    const float n = shifted - to_whole;
    const float r = __builtin_fmaf(n, 2.12194440e-4F, __builtin_fmaf(n, -0.693359375F, within));
    float series = 1.0F / 5040;
    series = __builtin_fmaf(series, r, 1.0F / 720);
    series = __builtin_fmaf(series, r, 1.0F / 120);
    series = __builtin_fmaf(series, r, 1.0F / 24);
    series = __builtin_fmaf(series, r, 1.0F / 6);
    series = __builtin_fmaf(series, r, 0.5F);
    series = __builtin_fmaf(series, r, 1.0F);
    series = __builtin_fmaf(series, r, 1.0F);
    uint32_t exponent, bits;
    std::memcpy(&exponent, &shifted, sizeof(exponent));
    std::memcpy(&bits, &series, sizeof(bits));
    bits += exponent << 23;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return x > most ? __builtin_inff() : result;
}

inline float silu(float x) {
    return x / (1.0F + exp_of(-x));
}

// As half precision has it: eleven bits, and none below 2^-24.
inline float as_half(float x) {
    const float high = x * 8193.0F;
    const float rounded = high - (high - x);
    const float small = (x + 0.75F) - 0.75F;
    return __builtin_fabsf(x) < 6.103515625e-5F ? small : rounded;
}

inline float gelu(float x) {
    const float half = as_half(x);
    const float twice = 2 * 0.797884561F * half * (1.0F + 0.044715F * half * half);
    const float in_table = as_half(half / (1.0F + exp_of(-twice)));
    const float below = x >= 10.0F ? x : in_table;
    return x <= -10.0F ? 0.0F : below;
}

inline float relu(float x) {
    return x > 0.0F ? x : 0.0F;
}

inline float at_most(float x, float limit) {
    return limit < x ? limit : x;
}
inline float limited(float x, float limit) {
    return x < -limit ? -limit : at_most(x, limit);
}

template <typename Function>
void for_all(const ActivationRow & row, const Function & function) {
    const float * __restrict x = row.x;
    const float * __restrict y = row.y;
    float * __restrict out = row.out;
    if (y == nullptr) {
        for (int64_t i = 0; i < row.n; ++i) {
            out[i] = function(x[i], 1.0F);
        }
    } else {
        for (int64_t i = 0; i < row.n; ++i) {
            out[i] = function(x[i], y[i]);
        }
    }
}

}  // namespace

void activate(const ActivationRow & row);
void activate(const ActivationRow & row) {
    const float alpha = row.alpha, limit = row.limit;
    switch (row.activation) {
        case Activation::silu: return for_all(row, [](float x, float y) { return silu(x) * y; });
        case Activation::gelu: return for_all(row, [](float x, float y) { return gelu(x) * y; });
        case Activation::relu: return for_all(row, [](float x, float y) { return relu(x) * y; });
        case Activation::relu_squared: return for_all(row, [](float x, float y) { return relu(x) * relu(x) * y; });
        case Activation::oai:
            return for_all(row, [=](float x, float y) {
                const float gate = at_most(x, limit);
                return gate / (1.0F + exp_of(-alpha * gate)) * (limited(y, limit) + 1.0F);
            });
        case Activation::clamped_silu:
            return for_all(row, [=](float x, float y) { return silu(at_most(x, limit)) * limited(y, limit); });
    }
}

}  // namespace overspill::OVERSPILL_PRODUCTS
