#include "sample/top_p.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

namespace overspill {

namespace {

// Lists and weighs the k most likely tokens and some more.
Glance glance(Candidates & c, size_t k) {
    constexpr size_t n_per_block = 1;
    Glance seen{};
    seen.low = std::max(c.row.at_least(std::min(k, c.row.maxima().size() / 2)), c.cut.logit);
    c.list_from(seen.low);
    seen.mass = c.weigh(c.row.largest(), 1.0F);
    c.floats.resize(n_per_block * c.row.maxima().size());
    for (size_t block = 0; block < c.row.maxima().size(); ++block) {
        for (size_t i = 0; i < n_per_block; ++i) {
            const size_t at = block * block_size + (block * n_per_block) % block_size + i;
            const float logit = at < c.row.size() ? c.row[at] : -infinity;
            c.floats[n_per_block * block + i] = logit < seen.low && logit >= c.cut.logit ? logit : -infinity;
        }
    }
    c.row.exps(c.floats.data(), c.floats.size(), c.row.largest(), 1.0F, c.floats.data());
    seen.stands_for = static_cast<double>(block_size / n_per_block);
    seen.rest = total_of(c.floats) * seen.stands_for;
    return seen;
}

// Finds the cut between two logits that a sample says it is between, with an error of so many
// standard deviations. The list holds the most likely tokens, weighed, which are not left to chance.
bool cut_top_p_by_sample(Candidates & c, float top_p, double n_deviations) {
    constexpr size_t n_per_block = 16;
    constexpr size_t n_buckets = 1024;  // of a histogram of the logits
    constexpr float bucket_width = 1.0F / 32;
    constexpr double n_stands_for = static_cast<double>(block_size) / n_per_block;
    const auto p = static_cast<double>(top_p);

    const float heavy = std::max(c.row.at_least(std::min<size_t>(256, c.row.maxima().size())), c.cut.logit);
    c.list_between(heavy, infinity);
    const double heavy_mass = c.weigh(c.row.largest(), 1.0F);
    std::array<uint32_t, n_buckets> histogram{};
    for (size_t block = 0; block < c.row.maxima().size(); ++block) {
        const size_t begin = block * block_size + (block * n_per_block) % block_size;
        for (size_t i = begin; i < std::min(begin + n_per_block, c.row.size()); ++i) {
            const float logit = c.row[i];
            if (logit < heavy && logit >= c.cut.logit) {
                const float bucket = (c.row.largest() - logit) * (1.0F / bucket_width);
                ++histogram[bucket < n_buckets - 1 ? static_cast<size_t>(bucket) : n_buckets - 1];
            }
        }
    }
    const double ratio = std::exp(-static_cast<double>(bucket_width));
    const double first_weight = n_stands_for * std::sqrt(ratio);
    double total = heavy_mass;
    double tail_variance = 0;
    double weight = first_weight;
    for (const uint32_t count : histogram) {
        total += count * weight;
        tail_variance += count * weight * weight;
        weight *= ratio;
    }

    // Where the mass is reached, as far as the sample can tell.
    double head = heavy_mass;
    double head_variance = 0;
    float high = 0;
    float low = 0;
    weight = first_weight;
    for (size_t bucket = 0; bucket < n_buckets; ++bucket) {
        const double variance = (1 - p) * (1 - p) * head_variance + p * p * std::max(tail_variance, 0.0);
        const double error = n_deviations * std::sqrt(variance);
        if (head <= p * total - error) {
            high = static_cast<float>(bucket) * bucket_width;
        }
        const double mass = histogram[bucket] * weight;
        head += mass;
        head_variance += mass * weight;
        tail_variance -= mass * weight;
        low = static_cast<float>(bucket + 1) * bucket_width;
        if (head >= p * total + error) {
            break;
        }
        weight *= ratio;
    }

    const float above = high > 0 ? std::min(c.row.largest() - high, heavy) : infinity;
    const float below = std::max(c.row.largest() - low, c.cut.logit);
    c.row.add_up_split(c.cut.logit, above);
    const double mass = p * (c.row.total() + c.row.edited_mass(c.cut.logit));
    const double mass_above = c.row.total_of_parts() + c.row.edited_mass(above);
    if (mass_above >= mass) {
        return false;
    }
    c.list_between(below, above);
    if (c.list.empty() || mass_above + c.weigh(c.row.largest(), 1.0F) < mass) {
        return false;
    }
    c.keep_most_likely(mass - mass_above);
    const Candidate & last = *std::max_element(c.list.begin(), c.list.end(), before);
    c.cut = {last.logit, last.id};
    c.n_nominal = 0;
    return true;
}

bool cut_top_p_of_row(Candidates & c, float top_p) {
    constexpr size_t n_least = 4096;  // under this, listing everything is as fast
    if (c.row.size() < n_least) {
        return false;
    }
    Glance seen{};
    return cut_top_p_of_most_likely(c, top_p, seen) || cut_top_p_by_sample(c, top_p, 3) ||
           cut_top_p_by_sample(c, top_p, 12);
}

}  // namespace

bool cut_top_p_of_most_likely(Candidates & c, float top_p, Glance & seen) {
    const auto p = static_cast<double>(top_p);
    std::optional<double> total;
    for (const size_t k : {size_t{128}, size_t{384}}) {
        seen = glance(c, k);
        const double about = total ? *total : seen.mass + seen.rest;
        if (seen.mass < 0.5 * p * about) {
            return false;
        }
        if (seen.mass < p * about) {
            continue;
        }
        if (!total) {
            c.row.add_up(c.cut.logit);
            total = c.row.total() + c.row.edited_mass(c.cut.logit);
        }
        if (seen.mass >= p * *total) {
            c.keep_most_likely(p * *total);
            c.is_listed = true;
            c.n_nominal = c.list.size();
            return true;
        }
    }
    return false;
}

void cut_top_p(Candidates & c, float top_p) {
    if (!c.is_listed && cut_top_p_of_row(c, top_p)) {
        return;
    }
    c.list_kept();
    const double total = c.weigh(c.listed_largest(), 1.0F);
    c.keep_most_likely(static_cast<double>(top_p) * total);
    c.n_nominal = c.list.size();
}

}  // namespace overspill
