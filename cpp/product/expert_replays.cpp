#include "product/expert_replays.h"

#include "base/check_range.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace overspill {

namespace {

void check(const ExpertRoutes & routes) {
    check_range<size_t>("n_experts", routes.n_experts, 1, unknown_expert);
    const size_t n = routes.n_tokens * routes.n_layers * routes.n_used;
    for (size_t i = 0; i < n; ++i) {
        const uint16_t id = routes.ids[i];
        if (id == unknown_expert) {
            continue;
        }
        if (id >= routes.n_experts) {
            throw std::invalid_argument("ids must be under n_experts, which is " + std::to_string(routes.n_experts) +
                                        ", not " + std::to_string(id));
        }
        const uint16_t * of_same_token = routes.ids + (i - i % routes.n_used);
        if (std::find(of_same_token, routes.ids + i, id) != routes.ids + i) {
            throw std::invalid_argument("ids must differ within a layer and token, but expert " + std::to_string(id) +
                                        " is there twice");
        }
    }
}

// The ids of a layer and a token that are known.
template <typename Work>
void for_known(const ExpertRoutes & routes, size_t token, size_t layer, const Work & work) {
    const uint16_t * ids = routes.of(token, layer);
    for (size_t k = 0; k < routes.n_used; ++k) {
        if (ids[k] != unknown_expert) {
            work(size_t{ids[k]});
        }
    }
}

// What all replays do: count, and let the policy change what is resident.
class Replayer {
  public:
    explicit Replayer(const ExpertRoutes & routes) : routes_(routes) {
        for (std::vector<int64_t> * counts : {&result_.n_requests, &result_.n_hits, &result_.n_insertions}) {
            counts->assign(routes.n_layers, 0);
        }
    }

    // In a cache of so many experts, of the layers from the first on. Of the misses of a layer and a token, at most so
    // many are inserted.
    void lru(size_t capacity, size_t first_layer, size_t n_layers, size_t most_insertions) {
        Recency resident(n_layers * routes_.n_experts);
        std::vector<size_t> inserted;
        for (size_t token = 0; token < routes_.n_tokens; ++token) {
            for (size_t layer = first_layer; layer < first_layer + n_layers; ++layer) {
                const size_t first = (layer - first_layer) * routes_.n_experts;
                inserted.clear();
                for_known(routes_, token, layer, [&](size_t expert) {
                    const bool hit = resident.contains(first + expert);
                    count(layer, hit);
                    if (hit) {
                        resident.use(first + expert);
                    } else if (inserted.size() < most_insertions) {
                        resident.use(first + expert);
                        inserted.push_back(first + expert);
                    }
                });
                while (resident.size() > capacity) {
                    resident.drop_oldest();
                }
                // What leaves at once need not be copied.
                result_.n_insertions[layer] +=
                    std::count_if(inserted.begin(), inserted.end(), [&](size_t one) { return resident.contains(one); });
            }
        }
    }

    void second_touch(size_t capacity, size_t layer) {
        SecondTouch resident(routes_.n_experts, capacity);
        for (size_t token = 0; token < routes_.n_tokens; ++token) {
            for_known(routes_, token, layer, [&](size_t expert) { count(layer, resident.contains(expert)); });
            const size_t n = resident.use(routes_.of(token, layer), routes_.n_used, routes_.n_used);
            result_.n_insertions[layer] += static_cast<int64_t>(n);
        }
    }

    void lfu(size_t capacity, size_t layer) {
        constexpr double decay = 0.99;
        std::vector<double> uses(routes_.n_experts, 0);
        // Of equals, the higher number leaves.
        by_value(capacity, layer, [&](size_t token) {
            for (double & one : uses) {
                one *= decay;
            }
            for_known(routes_, token, layer, [&](size_t expert) { uses[expert] += 1; });
            return [&](size_t a, size_t b) { return uses[a] != uses[b] ? uses[a] < uses[b] : a > b; };
        });
    }

    void belady(size_t capacity, size_t layer) {
        constexpr size_t never = std::numeric_limits<size_t>::max();
        std::vector<size_t> next(routes_.n_experts, never);
        std::vector<size_t> next_uses(routes_.n_tokens * routes_.n_used);  // of each use's expert
        for (size_t token = routes_.n_tokens; token-- > 0;) {
            size_t at = token * routes_.n_used;
            for_known(routes_, token, layer, [&](size_t expert) { next_uses[at++] = next[expert]; });
            for_known(routes_, token, layer, [&](size_t expert) { next[expert] = token; });
        }
        by_value(capacity, layer, [&](size_t token) {
            size_t at = token * routes_.n_used;
            for_known(routes_, token, layer, [&](size_t expert) { next[expert] = next_uses[at++]; });
            return [&](size_t a, size_t b) { return next[a] != next[b] ? next[a] > next[b] : a > b; };
        });
    }

    void fixed(size_t capacity, size_t layer) {
        const size_t half = routes_.n_tokens / 2;
        std::vector<int64_t> uses(routes_.n_experts, 0);
        for (size_t token = 0; token < half; ++token) {
            for_known(routes_, token, layer, [&](size_t expert) { ++uses[expert]; });
        }
        std::vector<size_t> experts(routes_.n_experts);
        std::iota(experts.begin(), experts.end(), size_t{0});
        std::stable_sort(experts.begin(), experts.end(), [&](size_t a, size_t b) { return uses[a] > uses[b]; });
        std::vector<char> is_resident(routes_.n_experts, 0);
        for (size_t i = 0; i < capacity; ++i) {
            is_resident[experts[i]] = 1;
        }
        for (size_t token = half; token < routes_.n_tokens; ++token) {
            for_known(routes_, token, layer, [&](size_t expert) { count(layer, is_resident[expert] != 0); });
        }
    }

    ReplayCounts take() { return std::move(result_); }

  private:
    void count(size_t layer, bool hit) {
        ++result_.n_requests[layer];
        result_.n_hits[layer] += hit ? 1 : 0;
    }

    // A cache that all misses are inserted into, and what is worth least leaves. After a token, `worth` returns whether
    // an expert is worth less than another.
    template <typename Worth>
    void by_value(size_t capacity, size_t layer, const Worth & worth) {
        std::vector<char> is_resident(routes_.n_experts, 0);
        std::vector<size_t> resident, inserted;
        for (size_t token = 0; token < routes_.n_tokens; ++token) {
            inserted.clear();
            for_known(routes_, token, layer, [&](size_t expert) {
                const bool hit = is_resident[expert] != 0;
                count(layer, hit);
                if (!hit) {
                    is_resident[expert] = 1;
                    resident.push_back(expert);
                    inserted.push_back(expert);
                }
            });
            const auto is_worth_less = worth(token);
            while (resident.size() > capacity) {
                const auto least = std::min_element(resident.begin(), resident.end(), is_worth_less);
                is_resident[*least] = 0;
                *least = resident.back();
                resident.pop_back();
            }
            result_.n_insertions[layer] += std::count_if(inserted.begin(), inserted.end(),
                                                         [&](size_t expert) { return is_resident[expert] != 0; });
        }
    }

    const ExpertRoutes & routes_;
    ReplayCounts result_;
};

}  // namespace

ReplayCounts replay(const ExpertRoutes & routes, CachePolicy policy, size_t capacity) {
    check(routes);
    check_range<size_t>("capacity", capacity, 1, routes.n_experts);
    Replayer replayer(routes);
    if (policy == CachePolicy::lru_shared) {
        replayer.lru(capacity * routes.n_layers, 0, routes.n_layers, routes.n_used);
        return replayer.take();
    }
    for (size_t layer = 0; layer < routes.n_layers; ++layer) {
        switch (policy) {
            case CachePolicy::lru: replayer.lru(capacity, layer, 1, routes.n_used); break;
            case CachePolicy::lru_one_insertion: replayer.lru(capacity, layer, 1, 1); break;
            case CachePolicy::second_touch: replayer.second_touch(capacity, layer); break;
            case CachePolicy::lfu: replayer.lfu(capacity, layer); break;
            case CachePolicy::fixed: replayer.fixed(capacity, layer); break;
            default: replayer.belady(capacity, layer); break;
        }
    }
    return replayer.take();
}

std::vector<int64_t> reuse_distances(const ExpertRoutes & routes) {
    check(routes);
    std::vector<int64_t> counts(routes.n_experts + 1, 0);
    for (size_t layer = 0; layer < routes.n_layers; ++layer) {
        Recency used(routes.n_experts);
        for (size_t token = 0; token < routes.n_tokens; ++token) {
            for_known(routes, token, layer,
                      [&](size_t expert) { ++counts[used.contains(expert) ? used.rank(expert) : routes.n_experts]; });
            for_known(routes, token, layer, [&](size_t expert) { used.use(expert); });
        }
    }
    return counts;
}

}  // namespace overspill
