// Where a text is in a grammar.
#pragma once

#include "sample/gbnf.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

namespace overspill {

// Follows all readings of a text at once. What is to come after a rule's end is a node that all callers of the rule at
// one place of the text share (a graph-structured stack), so that the work for a character grows with the grammar and
// the length of the text, and never with the number of readings.
class GrammarMatcher {
  public:
    // Asked now and then during long work; true ends it by a CancelledError.
    using ShouldStop = std::function<bool()>;

    explicit GrammarMatcher(GrammarRules rules);

    // Whether the text may end here.
    bool may_end() const { return now_.may_end && now_.n_missing == 0; }
    // Whether a token with these bytes may come next. Throws Error where the grammar is too ambiguous.
    bool allows(int32_t token, std::string_view bytes, const ShouldStop & should_stop = {});
    // The token has come. Returns false, and stays where it was, if it may not.
    bool accept(int32_t token, std::string_view bytes, const ShouldStop & should_stop = {});

  private:
    // A reading that waits for what its step says, within a node.
    struct Thread {
        uint32_t step;
        uint32_t node;
    };
    struct Node {
        uint32_t next_step;   // after the rule
        uint32_t first_link;  // to the nodes in which that step is
        bool has_ended;       // the rule's end was reached where the node was made: later links are followed at once
    };
    struct Link {
        uint32_t node;
        uint32_t next;
    };
    struct Place {
        std::vector<Thread> threads = {};
        bool may_end = false;
        // Of a character whose bytes have come in part: how many are missing, and which ones it may become.
        uint32_t n_missing = 0;
        uint32_t low = 0;
        uint32_t high = 0;
    };
    struct Slot {
        uint64_t key = 0;
        uint32_t round = 0;
        uint32_t value = 0;
    };

    bool follow(int32_t token, std::string_view bytes, const ShouldStop & should_stop);
    bool follow_bytes(std::string_view bytes, const ShouldStop & should_stop);
    bool take_character(const Place & from, uint32_t character, const ShouldStop & should_stop);
    void begin_round();
    void enter(uint32_t step, uint32_t node);
    void close(Place & place, const ShouldStop & should_stop);
    void call(uint32_t step, uint32_t node);
    Slot & slot_of(uint64_t key, bool & is_new);
    void collect();

    GrammarRules rules_;
    Place now_;
    Place next_;
    Place after_token_;
    Place spare_;
    std::vector<Node> nodes_;
    std::vector<Link> links_;
    std::vector<Thread> todo_;
    std::vector<Slot> seen_;  // in this round: readings, and nodes by their step
    uint32_t round_ = 0;
    size_t n_seen_ = 0;
    size_t n_asked_ = 0;
    size_t collect_at_;
};

}  // namespace overspill
