// Where a text is in a grammar.
#pragma once

#include "sample/gbnf.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace overspill {

// Texts of tokens, in an order in which those that begin alike are near each other.
class TokenTexts {
  public:
    void add(int32_t token, std::string_view bytes);
    void sort();
    size_t size() const { return entries_.size(); }
    int32_t token(size_t i) const { return entries_[i].token; }
    std::string_view bytes(size_t i) const {
        return std::string_view(bytes_).substr(entries_[i].begin, entries_[i].size);
    }

  private:
    struct Entry {
        uint64_t beginning;  // the first bytes, by which they are sorted
        int32_t token;
        uint32_t begin, size;  // in bytes_
    };
    std::vector<Entry> entries_;
    std::string bytes_;
};

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
    // Calls `take` for each of these that may come next. What tokens have in common at their beginning is followed
    // once.
    void find_allowed(const TokenTexts & texts, const std::function<void(int32_t)> & take,
                      const ShouldStop & should_stop);
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
    bool take_byte(const Place & from, unsigned char byte, Place & to, const ShouldStop & should_stop);
    bool take_character(const Place & from, uint32_t character, Place & to, const ShouldStop & should_stop);
    bool meets(const Place & place, uint32_t low, uint32_t high) const;
    void work(size_t n_steps, const ShouldStop & should_stop);
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
    size_t n_steps_ = 0;  // since it was asked whether to stop
    struct Step {
        Place place;  // after so many bytes
        size_t n_nodes, n_links;
    };
    std::vector<Step> path_;  // of find_allowed, kept for its memory
    size_t collect_at_;
};

}  // namespace overspill
