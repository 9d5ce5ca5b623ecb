// Sequences that have lost their places, kept in RAM for prompts that begin with them.
#pragma once

#include "model/sequence_state.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

namespace overspill {

// From any thread.
class PromptCache {
  public:
    using State = std::shared_ptr<const SequenceState>;
    using Count = std::function<size_t(const SequenceState & saved)>;
    // Whether a longer sequence can go back to its first n tokens.
    using GoesBack = std::function<bool(const SequenceState & saved, size_t n)>;

    explicit PromptCache(size_t most_bytes) : most_bytes_(most_bytes) {}

    bool is_on() const { return most_bytes_ > 0; }
    // Whether it has a sequence that begins with these tokens, or can go back to them; it counts as used then.
    bool has(const std::vector<int32_t> & tokens, const GoesBack & goes_back);
    // Whether there is room for so many bytes, after the sequences used least recently have gone.
    bool make_room(size_t n_bytes);
    // Keeps a sequence that there is room for, in place of those that it begins with and can go back to.
    void add(State saved, const GoesBack & goes_back);
    // The sequence with the highest count, over `least`; null without one. It counts as used.
    State best(const Count & count, size_t least);
    void remove(const State & saved);
    void clear();
    size_t n_bytes() const;

  private:
    void erase(std::list<State>::iterator at);

    const size_t most_bytes_;
    mutable std::mutex mutex_;
    std::list<State> states_;  // the one used least recently first
    size_t n_bytes_ = 0;
};

}  // namespace overspill
