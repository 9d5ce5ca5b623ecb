#include "sample/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace overspill {

namespace scalar {
extern const Kernels table;
}
#ifdef OVERSPILL_X86_KERNELS
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif
#ifdef OVERSPILL_ARM_KERNELS
namespace neon {
extern const Kernels table;
}
#endif

std::vector<const Kernels *> available_kernels() {
    std::vector<const Kernels *> available = {&scalar::table};
#ifdef OVERSPILL_X86_KERNELS
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        available.push_back(&avx2::table);
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        available.push_back(&avx512::table);
    }
#endif
#ifdef OVERSPILL_ARM_KERNELS
    available.push_back(&neon::table);
#endif
    return available;
}

const Kernels & kernels() {
    const std::vector<const Kernels *> available = available_kernels();
    const char * wanted = std::getenv("OVERSPILL_SIMD");
    if (wanted == nullptr || *wanted == '\0') {
        return *available.back();
    }
    std::string names;
    for (const Kernels * one : available) {
        if (std::string(one->name) == wanted) {
            return *one;
        }
        names += (names.empty() ? "" : ", ") + std::string(one->name);
    }
    throw std::invalid_argument("OVERSPILL_SIMD must be one of " + names + " on this machine, not " + wanted);
}

}  // namespace overspill
