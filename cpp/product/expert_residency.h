// Which experts of a layer are resident in a cache, and what a token's use of them changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace overspill {

// In place of an expert where it is not known which one was used.
constexpr uint16_t unknown_expert = 0xFFFF;

// Numbers in the order of their last use, in a ring with one more than there are.
class Recency {
  public:
    explicit Recency(size_t n);

    size_t size() const { return size_; }
    bool contains(size_t i) const { return is_in_[i] != 0; }
    void use(size_t i);
    // As if it had been used before all others; it must not be in.
    void add_oldest(size_t i);
    // From the oldest on.
    std::vector<size_t> in_order() const;
    void drop_oldest() { take_out(before_[end_]); }
    // How many were used after it.
    size_t rank(size_t i) const;

  private:
    void put_in(size_t i, size_t after);
    void take_out(size_t i);

    const size_t end_;
    std::vector<size_t> before_, after_;
    std::vector<char> is_in_;
    size_t size_ = 0;
};

// The least recently used expert leaves. A miss is inserted if there is room, or if one of the two tokens before used
// the expert as well.
class SecondTouch {
  public:
    SecondTouch(size_t n_experts, size_t capacity);

    bool contains(size_t expert) const { return resident_.contains(expert); }
    // A token has used these experts, all at once; unknown ones are passed over. Of the misses, at most so many are
    // inserted. Returns how many of those are resident after it.
    size_t use(const uint16_t * experts, size_t n, size_t most_insertions);
    // One that no token has asked for, if there is room and it is not resident; it is the first to leave. Returns
    // whether it was inserted.
    bool prepare(size_t expert);
    // From the one that leaves next on.
    std::vector<size_t> in_order() const { return resident_.in_order(); }

  private:
    static constexpr size_t window = 2;

    const size_t capacity_;
    Recency resident_;
    std::vector<uint64_t> last_use_;  // of each expert, by the number of the token, from 1 on
    uint64_t n_tokens_ = 0;
    std::vector<size_t> inserted_;  // kept for its memory
};

}  // namespace overspill
