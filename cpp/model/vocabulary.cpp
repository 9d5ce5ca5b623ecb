#include "model/vocabulary.h"

#include "base/activity.h"
#include "base/error.h"

#include <pretokenizing.h>  // in cmake/

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace overspill {

namespace {

// While it exists, this thread's work on a text ends with a CancelledError when `poll` says so.
class TokenizingPoll {
  public:
    explicit TokenizingPoll(const Interrupt::Poll & poll) : poll_(poll) {
        if (poll_) {
            overspill_poll_while_tokenizing(
                [](void * data) {
                    auto & self = *static_cast<TokenizingPoll *>(data);
                    if (self.interrupt_.should_stop_piece(self.poll_)) {
                        throw CancelledError("tokenizing was cancelled");
                    }
                },
                this);
        }
    }
    TokenizingPoll(const TokenizingPoll &) = delete;
    TokenizingPoll & operator=(const TokenizingPoll &) = delete;
    ~TokenizingPoll() {
        if (poll_) {
            overspill_poll_while_tokenizing(nullptr, nullptr);
        }
    }

  private:
    const Interrupt::Poll & poll_;
    Interrupt interrupt_;
};

bool is_token(const llama_vocab & vocab, int32_t token) {
    return 0 <= token && token < llama_vocab_n_tokens(&vocab);
}

[[noreturn]] void refuse_incomplete() {
    throw Error("the text cannot be tokenized: the model's vocabulary is incomplete and has no tokens for some bytes");
}

bool is_control(const llama_vocab & vocab, int32_t token) {
    const llama_token_attr attributes = llama_vocab_get_attr(&vocab, token);
    // As in llama_vocab::impl::tokenizer_st_partition.
    if ((attributes & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN)) != 0) {
        return true;
    }
    if ((attributes & LLAMA_TOKEN_ATTR_USER_DEFINED) == 0) {
        return false;
    }
    // llama.cpp gives some of gpt-oss another type, so that they are shown.
    const std::string_view name = llama_vocab_get_text(&vocab, token);
    return name.size() > 4 && name.substr(0, 2) == "<|" && name.substr(name.size() - 2) == "|>";
}

// Whether a tokenizer has a token for what it has no other for.
bool has_unknown(const llama_vocab & vocab) {
    switch (llama_vocab_type(&vocab)) {
        case LLAMA_VOCAB_TYPE_WPM:
        case LLAMA_VOCAB_TYPE_UGM:
        case LLAMA_VOCAB_TYPE_RWKV: return true;
        default: return false;
    }
}

// Puts tokens of parts of their names in the place of control tokens. Most tokenizers look up a word, or what they have
// merged, among all tokens.
void spell_out_control_tokens(const llama_vocab & vocab, bool add_special, std::vector<int32_t> & tokens) {
    // Those that a vocabulary adds to every text stay.
    size_t n_before = 0;
    size_t n_behind = 0;
    if (add_special) {
        std::array<int32_t, 8> added;
        const int32_t n = llama_tokenize(&vocab, "", 0, added.data(), static_cast<int32_t>(added.size()), true, false);
        n_before = n > 0 && (llama_vocab_get_add_bos(&vocab) || llama_vocab_type(&vocab) == LLAMA_VOCAB_TYPE_WPM);
        n_behind = static_cast<size_t>(std::max(n, 0)) - n_before;
    }
    const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(n_before);
    const auto end = tokens.end() - static_cast<std::ptrdiff_t>(n_behind);
    const bool keeps_unknown = has_unknown(vocab);
    const auto is_spelled = [&](int32_t token) {
        if (!is_control(vocab, token)) {
            return false;
        }
        const std::string_view name = llama_vocab_get_text(&vocab, token);
        const bool is_unknown =
            (llama_vocab_get_attr(&vocab, token) & LLAMA_TOKEN_ATTR_UNKNOWN) != 0 || name == "[UNK]" || name == "<unk>";
        return !(keeps_unknown && is_unknown);
    };
    if (std::none_of(begin, end, is_spelled)) {
        return;
    }
    // What the names can be made of: their parts, of which a token may be one.
    constexpr size_t longest = 32;
    std::unordered_map<std::string_view, int32_t> parts;
    std::unordered_set<int32_t> seen;
    for (auto at = begin; at != end; ++at) {
        const std::string_view name = llama_vocab_get_text(&vocab, *at);
        if (is_spelled(*at) && seen.insert(*at).second) {
            for (size_t i = 0; i < name.size(); ++i) {
                for (size_t n = 1; n <= std::min(longest, name.size() - i); ++n) {
                    parts.emplace(name.substr(i, n), LLAMA_TOKEN_NULL);
                }
            }
        }
    }
    std::unordered_map<std::string_view, int32_t> bytes;  // by names such as <0x0A>
    for (int32_t token = 0; token < llama_vocab_n_tokens(&vocab); ++token) {
        const std::string_view text = llama_vocab_get_text(&vocab, token);
        const llama_token_attr attributes = llama_vocab_get_attr(&vocab, token);
        if ((attributes & LLAMA_TOKEN_ATTR_BYTE) != 0) {
            bytes.emplace(text, token);
        } else if (const auto part = parts.find(text); part != parts.end()) {
            if ((attributes & LLAMA_TOKEN_ATTR_UNUSED) == 0 && !is_control(vocab, token)) {
                part->second = token;
            }
        }
    }
    std::vector<int32_t> spelled(tokens.begin(), begin);
    for (auto at = begin; at != end; ++at) {
        if (!is_spelled(*at)) {
            spelled.push_back(*at);
            continue;
        }
        std::string_view rest = llama_vocab_get_text(&vocab, *at);
        while (!rest.empty()) {
            size_t n = std::min(longest, rest.size());
            while (n > 1 && parts.at(rest.substr(0, n)) == LLAMA_TOKEN_NULL) {
                --n;
            }
            int32_t part = parts.at(rest.substr(0, n));
            if (part == LLAMA_TOKEN_NULL) {
                std::array<char, 8> name;
                std::snprintf(name.data(), name.size(), "<0x%02X>", static_cast<unsigned char>(rest[0]));
                part = bytes.at(name.data());  // which throws what the caller knows
            }
            spelled.push_back(part);
            rest.remove_prefix(n);
        }
    }
    spelled.insert(spelled.end(), end, tokens.end());
    tokens = std::move(spelled);
}

}  // namespace

std::vector<int32_t> tokenize(const llama_vocab & vocab, std::string_view text, bool add_special, bool parse_special,
                              const Interrupt::Poll & poll) {
    if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max() / 2)) {
        throw std::invalid_argument("text must be shorter than 1 GiB, not " + std::to_string(text.size()) + " bytes");
    }
    const Activity activity("tokenizing a text");
    const TokenizingPoll polling(poll);
    const auto length = static_cast<int32_t>(text.size());
    std::vector<int32_t> tokens(text.size() / 2 + 16);
    const auto fill = [&] {
        return llama_tokenize(&vocab, text.data(), length, tokens.data(), static_cast<int32_t>(tokens.size()),
                              add_special, parse_special);
    };
    try {
        int32_t n = fill();
        if (n < 0) {
            tokens.resize(static_cast<size_t>(-static_cast<int64_t>(n)));
            n = fill();
        }
        tokens.resize(static_cast<size_t>(std::max(n, 0)));
        // What has no token is the one for unknown text, and that may be missing as well.
        if (std::any_of(tokens.begin(), tokens.end(), [&](int32_t token) { return !is_token(vocab, token); })) {
            refuse_incomplete();
        }
        if (!parse_special) {
            spell_out_control_tokens(vocab, add_special, tokens);
        }
    } catch (const std::out_of_range &) {
        refuse_incomplete();
    }
    return tokens;
}

std::string detokenize(const llama_vocab & vocab, const std::vector<int32_t> & tokens, bool skip_special) {
    for (const int32_t token : tokens) {
        check_token("tokens", token, llama_vocab_n_tokens(&vocab));
    }
    if (llama_vocab_type(&vocab) == LLAMA_VOCAB_TYPE_BPE) {
        // llama.cpp's own function takes spaces away, as of " ." and " 's", for some vocabularies.
        std::string pieces;
        for (const int32_t token : tokens) {
            append_token_bytes(vocab, token, !skip_special, pieces);
        }
        return pieces;
    }
    std::string text(tokens.size() * 8 + 16, '\0');
    const auto fill = [&] {
        return llama_detokenize(&vocab, tokens.data(), static_cast<int32_t>(tokens.size()), text.data(),
                                static_cast<int32_t>(text.size()), /*remove_special =*/skip_special,
                                /*unparse_special =*/!skip_special);
    };
    int32_t n = fill();
    if (n < 0) {
        text.resize(static_cast<size_t>(-static_cast<int64_t>(n)));
        n = fill();
    }
    text.resize(static_cast<size_t>(std::max(n, 0)));
    return text;
}

void append_token_bytes(const llama_vocab & vocab, int32_t token, bool special, std::string & bytes) {
    if (llama_vocab_type(&vocab) == LLAMA_VOCAB_TYPE_NONE) {
        return;
    }
    std::array<char, 256> piece;
    const int32_t length = llama_token_to_piece(&vocab, token, piece.data(), piece.size(), 0, special);
    if (length >= 0) {
        bytes.append(piece.data(), static_cast<size_t>(length));
        return;
    }
    const size_t start = bytes.size();
    bytes.resize(start + static_cast<size_t>(-length));
    llama_token_to_piece(&vocab, token, bytes.data() + start, -length, 0, special);
}

std::map<std::string, int32_t> special_tokens(const llama_vocab & vocab) {
    std::map<std::string, int32_t> tokens = {
        {"bos", llama_vocab_bos(&vocab)},   {"eos", llama_vocab_eos(&vocab)}, {"eot", llama_vocab_eot(&vocab)},
        {"sep", llama_vocab_sep(&vocab)},   {"nl", llama_vocab_nl(&vocab)},   {"pad", llama_vocab_pad(&vocab)},
        {"mask", llama_vocab_mask(&vocab)},
    };
    for (auto token = tokens.begin(); token != tokens.end();) {
        token = token->second == LLAMA_TOKEN_NULL ? tokens.erase(token) : std::next(token);
    }
    return tokens;
}

std::vector<ControlToken> control_tokens(const llama_vocab & vocab) {
    std::vector<ControlToken> tokens;
    for (int32_t token = 0; token < llama_vocab_n_tokens(&vocab); ++token) {
        const std::string text = llama_vocab_get_text(&vocab, token);
        if (!text.empty() && is_control(vocab, token)) {
            const llama_token_attr attributes = llama_vocab_get_attr(&vocab, token);
            tokens.push_back(
                {text, (attributes & LLAMA_TOKEN_ATTR_LSTRIP) != 0, (attributes & LLAMA_TOKEN_ATTR_RSTRIP) != 0});
        }
    }
    return tokens;
}

void check_token(const std::string & argument, int32_t token, int32_t n_vocab) {
    if (token < 0 || token >= n_vocab) {
        throw std::invalid_argument(argument + ": " + std::to_string(token) + " is not in the vocabulary (0 to " +
                                    std::to_string(n_vocab - 1) + ")");
    }
}

}  // namespace overspill
