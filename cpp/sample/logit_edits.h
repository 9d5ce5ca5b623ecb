// Logit bias, penalties and DRY: they touch few tokens, whose new logits stand beside the row.
#pragma once

#include "sample/sampling_options.h"

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace overspill {

struct EditedLogit {
    int32_t id;
    float logit;
};

class LogitEdits {
  public:
    // Of options that were checked; logit_bias sorted by token.
    explicit LogitEdits(const SamplingOptions & options);

    // `token`, at least 0, is part of the text now.
    void accept(int32_t token);
    void forget();
    // As much of the text as penalties and DRY look at.
    std::vector<int32_t> history() const;

    // The tokens whose logits are not what stands in the row, in the order of ids; valid until the next call.
    // Throws std::invalid_argument for a bias of a token that the row does not have.
    const std::vector<EditedLogit> & of(const float * logits, size_t n);

  private:
    void note_breaker();
    void note_repetitions();

    SamplingOptions options_;
    bool penalties_;
    bool dry_;
    std::vector<int32_t> history_;
    std::vector<int32_t> counts_;   // per token, within the last repeat_last_n
    std::vector<int32_t> touched_;  // tokens whose count is not 0, in any order
    std::vector<uint32_t> touched_at_;

    // DRY's breakers from their last token to their first, sorted; those of one token; and of those that the history
    // has, the one that begins last, and is the longest of these.
    std::vector<std::vector<int32_t>> reversed_breakers_;
    std::vector<int32_t> breaking_tokens_;
    size_t breaker_begin_ = 0;
    size_t breaker_length_ = 0;  // 0: there is none

    // Kept for their memory.
    std::vector<EditedLogit> edits_;
    std::vector<std::pair<int32_t, int32_t>> repetitions_;  // token and how long a repetition it would continue
    std::vector<int32_t> suffix_lengths_;
};

}  // namespace overspill
