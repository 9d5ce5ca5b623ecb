// Included by force before llama-vocab.cpp of llama.cpp, which has the tokenizers.
//
// They look up tokens for each step of their work, and assert something each time: there we ask whether to go on. And
// they reserve room for exactly the next character that no token has, which moves all tokens each time, so that a text
// of such characters takes the square of its length; without, room grows by itself.
#pragma once

#include "pretokenizing.h"
// What llama-vocab.cpp includes comes first: it stays as it is.
#include "llama-vocab.h"

#include "ggml.h"
#include "gguf.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "unicode.h"

#include <algorithm>
#include <cassert>
#include <cctype>
#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <forward_list>
#include <limits>
#include <map>
#include <queue>
#include <set>
#include <unordered_map>

#undef GGML_ASSERT
#define GGML_ASSERT(x) (overspill_tokenizing_step(), (x) ? (void)0 : GGML_ABORT("GGML_ASSERT(%s) failed", #x))
#define reserve(n) size()
