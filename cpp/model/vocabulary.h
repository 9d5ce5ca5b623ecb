// A model's vocabulary: text to tokens and back.
#pragma once

#include "base/interrupt.h"

#include <llama.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace overspill {

// Throws std::invalid_argument for texts of a GiB and more, CancelledError when `poll`, asked every 50 ms, is true, and
// Error for a byte that the vocabulary cannot write.
std::vector<int32_t> tokenize(const llama_vocab & vocab, std::string_view text, bool add_special, bool parse_special,
                              const Interrupt::Poll & poll = {});

// Throws std::invalid_argument for a token that is not in the vocabulary.
std::string detokenize(const llama_vocab & vocab, const std::vector<int32_t> & tokens, bool skip_special);

// Appends a token's bytes, which need not be whole characters. Special tokens have none unless
// `special` is set, which gives their name. `token` must be in the vocabulary.
void append_token_bytes(const llama_vocab & vocab, int32_t token, bool special, std::string & bytes);

// Those that the vocabulary has, by llama.cpp's names: bos, eos, eot, sep, nl, pad, mask.
std::map<std::string, int32_t> special_tokens(const llama_vocab & vocab);

// A token that a text has only where special tokens are recognised in it.
struct ControlToken {
    std::string text;
    bool strips_left = false;   // white space before it is dropped
    bool strips_right = false;  // the same behind it
};

std::vector<ControlToken> control_tokens(const llama_vocab & vocab);

// Throws std::invalid_argument, naming `argument`, for a token that a vocabulary of this size does not have.
void check_token(const std::string & argument, int32_t token, int32_t n_vocab);

}  // namespace overspill
