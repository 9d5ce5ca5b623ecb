// What a cache of experts would have answered, had it been there when tokens were decoded.
//
// The experts that a layer uses for a token are asked for at once: those that are resident then are hits. Misses are
// inserted after that, in the order in which they were asked for, and then as many experts leave as are too many.
#pragma once

#include "product/expert_residency.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace overspill {

// Which experts were used: (n_tokens, n_layers, n_used) numbers under n_experts, or unknown_expert.
struct ExpertRoutes {
    const uint16_t * ids;
    size_t n_tokens, n_layers, n_used, n_experts;

    const uint16_t * of(size_t token, size_t layer) const { return ids + (token * n_layers + layer) * n_used; }
};

enum class CachePolicy {
    lru,                // the least recently used leaves
    lru_one_insertion,  // the same, of a layer's misses of a token only the first is inserted
    lru_shared,         // the same in one cache for all layers, as large as theirs together
    second_touch,       // as SecondTouch has it, which a model's own cache uses
    lfu,                // the least frequently used leaves; a use counts for 0.99 as much with each token
    fixed,              // the most frequent of the first half of the tokens; replayed is the second half
    belady,             // the one whose next use is farthest away leaves: no policy can have more hits
};

// By layer.
struct ReplayCounts {
    std::vector<int64_t> n_requests, n_hits, n_insertions;
};

// With `capacity` experts of each layer resident, from an empty cache. Throws std::invalid_argument if the capacity is
// not 1 to n_experts, or for a number of an expert that there is not.
ReplayCounts replay(const ExpertRoutes & routes, CachePolicy policy, size_t capacity);

// How many requests had so many other experts of the layer used since their expert's last use, as of the beginning of
// their token: LRU with capacity c hits those with less than c. n_experts counts, and one more of the requests that had
// no use before. Throws as replay() does.
std::vector<int64_t> reuse_distances(const ExpertRoutes & routes);

}  // namespace overspill
