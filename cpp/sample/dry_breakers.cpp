#include "sample/dry_breakers.h"

#include "model/vocabulary.h"

#include <algorithm>
#include <stdexcept>

namespace overspill {

std::vector<std::vector<int32_t>> dry_breakers(const llama_vocab & vocab, const std::vector<std::string> & texts) {
    constexpr size_t longest_text = 40;      // bytes, and
    constexpr size_t longest_sequence = 21;  // tokens, as in llama.cpp
    if (std::any_of(texts.begin(), texts.end(), [](const std::string & text) { return text.empty(); })) {
        throw std::invalid_argument("dry_sequence_breakers must not contain an empty string");
    }
    std::vector<std::vector<int32_t>> breakers;
    for (int32_t token = 0; token < llama_vocab_n_tokens(&vocab); ++token) {
        const std::string word = detokenize(vocab, {token}, /*skip_special =*/false);
        for (const std::string & whole : texts) {
            const std::string text = whole.substr(0, longest_text);
            if (word.find(text) != std::string::npos) {
                breakers.push_back({token});
                continue;
            }
            // The token may end with the beginning of the text.
            for (size_t at = word.find(text[0]); at != std::string::npos; at = word.find(text[0], at + 1)) {
                const size_t n = word.size() - at;
                if (n < text.size() && word.compare(at, n, text, 0, n) == 0) {
                    std::vector<int32_t> sequence = tokenize(vocab, text.substr(n), false, false);
                    sequence.insert(sequence.begin(), token);
                    sequence.resize(std::min(sequence.size(), longest_sequence));
                    breakers.push_back(std::move(sequence));
                }
            }
        }
    }
    std::sort(breakers.begin(), breakers.end());
    breakers.erase(std::unique(breakers.begin(), breakers.end()), breakers.end());
    return breakers;
}

}  // namespace overspill
