// Included by force before llama.cpp's common library, whose Jinja has no bounds: a template that counts to a billion,
// or a macro that calls itself, would take all memory or end the process. All values are made by mk_val in
// jinja/value.h, so it asks us first. cpp/text/chat_template.cpp has the answer.
#pragma once

#ifdef __cplusplus

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iomanip>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

// Throws std::runtime_error if a template may not make a value that holds `n_bytes` more.
void overspill_check_jinja_value(std::size_t n_bytes);

namespace std {

template <typename T>
auto overspill_n_bytes(const T & text, int) -> decltype(text.parts.size() + text.length()) {
    return text.parts.size() * sizeof(text.parts[0]) + text.length();
}
template <typename T>
auto overspill_n_bytes(const T & values, long) -> decltype(values.size() * sizeof(*values.begin())) {
    return values.size() * sizeof(*values.begin());
}
template <typename T>
size_t overspill_n_bytes(const T &, ...) {
    return 0;
}

template <typename T, typename... Args>
shared_ptr<T> overspill_make_shared(Args &&... args) {
    overspill_check_jinja_value((size_t(0) + ... + overspill_n_bytes(args, 0)));
    return make_shared<T>(forward<Args>(args)...);
}

}  // namespace std

#define make_shared overspill_make_shared
#include "jinja/value.h"
#undef make_shared

#endif
