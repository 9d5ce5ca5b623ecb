// What is left of a row: all that comes before a cut, or a list where that is little.
#pragma once

#include "sample/candidate.h"
#include "sample/row.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace overspill {

// A place in the order of likelihood: by logit, and by id among equals.
struct Place {
    float logit;
    int32_t id;
};

// Each stage of the sampler lowers the cut, or shortens the list. Keeps its memory.
struct Candidates {
    Row row;
    Place cut{};             // what is kept: this and what comes before it
    bool is_listed = false;  // whether the list holds what is kept
    bool is_sorted = false;  // whether it does so in order
    size_t n_nominal = 0;    // as llama.cpp counts candidates, with those of -inf; 0: not known
    std::vector<Candidate> list;
    std::vector<float> floats;  // of the stage at work

    // All of the row that was taken.
    void keep_all();
    bool keeps(float logit, int32_t id) const { return logit > cut.logit || (logit == cut.logit && id <= cut.id); }
    void cut_below(float logit) {
        if (logit > cut.logit) {
            cut = {logit, any_id};
        }
    }

    // Lists those from `low` to below `high`, as an aside.
    void list_between(float low, float high);
    // Lists those from `low` on, of which there are some.
    void list_from(float low);
    // Lists the edited tokens that are kept, as an aside.
    void list_edited();
    // Lists what is kept, unless that is done.
    void list_kept();

    float listed_largest() const;
    // Gives every listed one its weight, exp((logit - largest) * scale), and returns their sum.
    double weigh(float largest, float scale);
    // In nats, of the probabilities weight / total, where weight is exp(logit - largest).
    double entropy(float largest, double total) const;

    // Keeps the nearest of the weighed list, as few as have more than this mass together, and one at least. Of
    // equally near ones the more likely comes first.
    template <typename Distance>
    void keep_nearest(double mass, const Distance & distance);
    // The same by likelihood, and at least this mass.
    void keep_most_likely(double mass);
};

template <typename Distance>
void Candidates::keep_nearest(double mass, const Distance & distance) {
    // Only the bucket in which the mass is reached has to be sorted.
    constexpr size_t n_buckets = 256;
    std::array<double, n_buckets> masses{};
    double farthest = 0;
    double nearest = static_cast<double>(infinity);
    for (const Candidate & one : list) {
        nearest = std::min(nearest, distance(one));
        farthest = std::max(farthest, distance(one));
    }
    const double scale = farthest > nearest ? n_buckets / (farthest - nearest) : 0.0;
    const auto bucket_of = [&](const Candidate & one) {
        return std::min(static_cast<size_t>((distance(one) - nearest) * scale), n_buckets - 1);
    };
    for (const Candidate & one : list) {
        masses[bucket_of(one)] += static_cast<double>(one.weight);
    }
    double sum = 0;
    size_t last = 0;
    for (; last + 1 < n_buckets && sum + masses[last] <= mass; ++last) {
        sum += masses[last];
    }
    const auto from =
        std::partition(list.begin(), list.end(), [&](const Candidate & one) { return bucket_of(one) < last; });
    const auto to = std::partition(from, list.end(), [&](const Candidate & one) { return bucket_of(one) == last; });
    std::sort(from, to, [&](const Candidate & a, const Candidate & b) {
        return distance(a) < distance(b) || (distance(a) == distance(b) && before(a, b));
    });
    auto end = from;
    while (end != to && sum <= mass) {
        sum += static_cast<double>(end->weight);
        ++end;
    }
    list.erase(std::max(end, list.begin() + 1), list.end());
    is_sorted = false;
}

}  // namespace overspill
