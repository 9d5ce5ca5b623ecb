// What a reply is to be like, and how it is come by.
#pragma once

#include "model/sequence_state.h"
#include "product/expert_recorder.h"
#include "sample/constraint.h"
#include "sample/sampler.h"
#include "text/reply_form.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace overspill {

// What a chooser is shown: the logits of the step, which it may write to, and all tokens so far.
// Both stay where they are as long as their owner is held.
struct ChooserView {
    float * logits;
    size_t n_logits;
    const std::shared_ptr<void> & owner;
    const std::shared_ptr<std::vector<int32_t>> & tokens;
};
// Returns the token to take, or none to leave it to the sampler.
using Chooser = std::function<std::optional<int32_t>(const ChooserView & view)>;

struct GenerationOptions {
    std::shared_ptr<Sampler> sampler = {};  // whoever else holds it sees its state move; none: the default options
    int64_t max_tokens = -1;                // -1: until the model or the context ends
    std::vector<std::string> stop = {};     // not empty strings
    int32_t n_logprobs = -1;  // -1: none; 0: fill in Token::logprob; n: and the n most likely, at most 1000
    std::optional<std::string> grammar = {};      // GBNF that the reply follows from its beginning
    std::shared_ptr<Constraint> constraint = {};  // what else says which tokens may come, in place of a grammar
    Chooser choose = {};
    bool keep_logits = false;  // fill in Token::logits
    bool look_ahead = true;    // work on the next token while the caller is busy with this one
    bool reuse = false;        // do not decode again what an earlier stream has in common with the prompt
    std::shared_ptr<const SequenceState> saved = {};  // with `reuse`: a sequence that the prompt may begin with
    bool keeps_state = false;                         // Generation::take_state() has the sequence once it has ended
    bool eager = false;  // its prompt is read while others are decoded, before it is asked for a token
    std::shared_ptr<ExpertRecorder> recorder = {};  // for the experts of prompt and reply
    ReplyForm form = {};                            // what a chat template wants of the reply
};

}  // namespace overspill
