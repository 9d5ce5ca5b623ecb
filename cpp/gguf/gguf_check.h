// Whether llama.cpp can load a file, where it would end the process or explain badly.
#pragma once

#include "gguf/gguf_header.h"

namespace overspill {

// Looks at hyperparameters that cannot be, weights of types that have no product, tokens that are there twice, parts of
// a split model, and a vocabulary without weights where those are wanted. Throws ModelLoadError with the name of the
// file and what is wrong with it, or std::invalid_argument if it is what the caller put into the header.
void check_loadable(const GgufHeader & header, bool vocab_only);

// Looks at hyperparameters only: for plans, which need no more. Throws ModelLoadError, too.
void check_figures(const GgufHeader & header);

}  // namespace overspill
