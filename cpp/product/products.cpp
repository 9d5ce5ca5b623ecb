#include "product/products.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef OVERSPILL_X86_KERNELS
#include <cpuid.h>
#endif
#ifdef OVERSPILL_ARM_KERNELS
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace overspill {

#ifdef OVERSPILL_X86_KERNELS
namespace product_avx2 {
extern const ProductSet set;
}
namespace product_avxvnni {
extern const ProductSet set;
}
namespace product_avx512 {
extern const ProductSet set;
}
namespace product_avx512vbmi {
extern const ProductSet set;
}

namespace {

bool is_zen_3_or_4() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool is_amd = __get_cpuid(0, &a, &b, &c, &d) != 0 && b == signature_AMD_ebx;
    return is_amd && __get_cpuid(1, &a, &b, &c, &d) != 0 && (a >> 8 & 0xF) + (a >> 20 & 0xFF) == 0x19;
}

}  // namespace
#endif
#ifdef OVERSPILL_ARM_KERNELS
namespace product_neon {
extern const ProductSet set;
}

namespace {

bool has_dot_products() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    int value = 0;
    size_t n_bytes = sizeof(value);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &n_bytes, nullptr, 0) == 0 && value != 0;
#else
    return false;
#endif
}

}  // namespace
#endif

const Products * ProductSet::find(ggml_type weights) const {
    for (size_t i = 0; i < n_products; ++i) {
        if (products[i].weights == weights) {
            return &products[i];
        }
    }
    return nullptr;
}

size_t prefetch_bytes() {
    // Measured: on Zen 5, 0.91 of plain reads in place of 0.77. On Zen 4 nothing is gained where pages are large, and
    // up to a sixth is lost where they have 4 KB.
    constexpr size_t usual = 8192;
#ifdef OVERSPILL_X86_KERNELS
    static const size_t bytes = is_zen_3_or_4() ? 0 : usual;
    return bytes;
#else
    return usual;
#endif
}

std::vector<const ProductSet *> available_product_sets() {
    std::vector<const ProductSet *> available;
#ifdef OVERSPILL_X86_KERNELS
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) {
        available.push_back(&product_avx2::set);
    }
    if (avx2 && __builtin_cpu_supports("avxvnni")) {
        available.push_back(&product_avxvnni::set);
    }
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        available.push_back(&product_avx512::set);
        if (__builtin_cpu_supports("avx512vbmi")) {
            available.push_back(&product_avx512vbmi::set);
        }
    }
#endif
#ifdef OVERSPILL_ARM_KERNELS
    if (has_dot_products()) {
        available.push_back(&product_neon::set);
    }
#endif
    return available;
}

namespace {

// `names`: those that are allowed beside the sets', for the message.
const ProductSet * set_named(const std::string & name, const std::string & argument, std::string names) {
    if (name == "llama.cpp") {
        return nullptr;
    }
    for (const ProductSet * one : available_product_sets()) {
        if (name == one->name) {
            return one;
        }
        names += std::string(", ") + one->name;
    }
    throw std::invalid_argument(argument + " must be one of " + names + " on this machine, not " + name);
}

}  // namespace

const ProductSet * product_set() {
    const char * variable = std::getenv("OVERSPILL_KERNELS");
    if (variable != nullptr && *variable != '\0') {
        return set_named(variable, "OVERSPILL_KERNELS", "llama.cpp");
    }
#ifdef OVERSPILL_ARM_KERNELS
    return nullptr;  // they have never been timed against llama.cpp's
#else
    const std::vector<const ProductSet *> available = available_product_sets();
    return available.empty() ? nullptr : available.back();
#endif
}

const ProductSet * product_set(const std::string & kernels) {
    return kernels == "auto" ? product_set() : set_named(kernels, "kernels", "auto, llama.cpp");
}

}  // namespace overspill
