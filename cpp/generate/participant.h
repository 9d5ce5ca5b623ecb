// A stream as the engine sees it, which decodes its tokens beside those of others.
#pragma once

#include "base/interrupt.h"
#include "generate/sequence.h"
#include "generate/step.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace overspill {

struct Seat {
    std::shared_ptr<Context> context;
    uint32_t sequence;
};

struct Participant : std::enable_shared_from_this<Participant> {
    explicit Participant(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options);

    Sequence sequence;
    Interrupt interrupt;
    // Whether its own thread chooses its tokens: Python takes part in it, or looks at the logits.
    const bool chooses_itself;
    // Whether its tokens may be chosen before they are asked for.
    const bool may_be_ahead;

    // Guarded by the engine's mutex.
    bool is_member = false;
    bool wants = false;      // its thread waits for a step
    bool is_in_run = false;  // the batch that is computed has tokens of it
    bool has_left = false;
    std::vector<Step> steps = {};  // of which those from n_taken on were not asked for yet
    size_t n_taken = 0;
    std::exception_ptr error = {};
    std::chrono::steady_clock::time_point asked_at = {};  // for the latest step
    std::chrono::steady_clock::time_point seen_at =
        std::chrono::steady_clock::now();  // the latest time that it had one
    std::thread::id asked_by = {};
    std::condition_variable changed = {};

    // Of the thread that leads; and guarded by the mutex where it changes.
    std::optional<Seat> seat = {};
    bool has_begun = false;  // there were logits
    bool has_ended = false;
    size_t n_cached = 0;       // of the prompt
    size_t n_dropped = 0;      // since its last token
    size_t n_recorded = 0;     // tokens whose experts were recorded, if there is a recorder
    size_t to_remember = 0;    // so many tokens in
    size_t n_in_batch = 0;     // tokens of the run
    size_t last_in_batch = 0;  // where the last of them is
    double run_s = 0;          // of batches since its last step
    std::optional<Step> next = {};
    std::exception_ptr failure = {};
    std::shared_ptr<const SequenceState> saved = {};  // at its end, if it is to be kept
    uint64_t run_at = 0;                              // the number of the latest batch with tokens of it
    std::shared_ptr<std::vector<float>> row = {};     // kept for its memory
    const std::shared_ptr<std::atomic<uint64_t>> n_rows = std::make_shared<std::atomic<uint64_t>>(0);

    size_t n_unread() const { return steps.size() - n_taken; }
    Step take_step() {
        Step step = std::move(steps[n_taken++]);
        if (n_taken == steps.size()) {
            steps.clear();
            n_taken = 0;
        }
        return step;
    }
    // Tokens that are not decoded yet; it needs a seat.
    size_t n_pending() const { return sequence.tokens().size() - seat->context->decoded(seat->sequence).size(); }
};

}  // namespace overspill
