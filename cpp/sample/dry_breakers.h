// Where DRY sees no repetition.
#pragma once

#include <llama.h>

#include <cstdint>
#include <string>
#include <vector>

namespace overspill {

// The token sequences that DRY takes for breakers: every way in which a token can end, or begin, with
// one of these texts, followed by the tokens of the rest of it. Takes long for large vocabularies.
// Throws std::invalid_argument for an empty text.
std::vector<std::vector<int32_t>> dry_breakers(const llama_vocab & vocab, const std::vector<std::string> & texts);

}  // namespace overspill
