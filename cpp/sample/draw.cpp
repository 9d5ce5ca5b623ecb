#include "sample/draw.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

namespace overspill {

namespace {

Chosen draw_from_list(Candidates & c, Random & random, float scale) {
    const double total = c.weigh(c.listed_largest(), scale);
    const double target = random.uniform() * total;
    double sum = 0;
    const Candidate * chosen = nullptr;
    for (const Candidate & one : c.list) {
        if (one.weight > 0) {
            chosen = &one;
        }
        sum += static_cast<double>(one.weight);
        if (sum > target) {
            break;
        }
    }
    if (chosen == nullptr) {
        row_has_changed();
    }
    return {chosen->id, chosen->logit, static_cast<double>(chosen->weight) / total};
}

// From the row whose blocks' sums of exp((logit - largest) * scale) were added up.
Chosen draw_from_sums(Candidates & c, Random & random, float scale) {
    // Edited tokens come last, as one more block.
    c.list_edited();
    const std::vector<float> & sums = c.row.sums();
    const double total = c.row.total() + c.weigh(c.row.largest(), scale);
    constexpr int most_tries = 10'000;  // more than a row takes that does not change
    for (int tries = 0; tries < most_tries; ++tries) {
        const double target = random.uniform() * total;
        double sum = 0;
        size_t block = 0;
        for (; block + 1 < sums.size() && sum + static_cast<double>(sums[block]) <= target; ++block) {
            sum += static_cast<double>(sums[block]);
        }
        const bool in_row = sum + static_cast<double>(sums[block]) > target || c.list.empty();
        Candidate chosen{0, -1, 0};
        const auto take = [&](const Candidate & one) {
            chosen = one.weight > 0 ? one : chosen;
            sum += static_cast<double>(one.weight);
            return sum > target;
        };
        if (in_row) {
            const size_t begin = block * block_size;
            const size_t size = std::min(block_size, c.row.size() - begin);
            c.floats.resize(block_size);
            c.row.exps(c.row.block(block), size, c.row.largest(), scale, c.floats.data());
            for (size_t i = 0; i < size; ++i) {
                const float logit = c.row[begin + i];
                const auto id = static_cast<int32_t>(begin + i);
                if (logit >= c.cut.logit && c.row.allows(id) && take({logit, id, c.floats[i]})) {
                    break;
                }
            }
        } else {
            sum += static_cast<double>(sums[block]);
            std::any_of(c.list.begin(), c.list.end(), take);
        }
        // Of tokens as likely as the last that is kept, some may not be kept. Rounding may leave
        // nothing at the very end of a block.
        if (chosen.id >= 0 && c.keeps(chosen.logit, chosen.id)) {
            return {chosen.id, chosen.logit, static_cast<double>(chosen.weight) / total};
        }
    }
    row_has_changed();
}

Chosen draw_from_row(Candidates & c, Random & random, float scale) {
    c.row.add_up(c.cut.logit, scale);
    return draw_from_sums(c, random, scale);
}

}  // namespace

float final_temperature(Candidates & c, const SamplingOptions & o) {
    if (o.dynamic_temperature_range == 0.0F) {
        return o.temperature;
    }
    const bool of_list = c.is_listed || c.n_nominal == 0;
    if (of_list) {
        c.list_kept();
        c.n_nominal = std::max(c.n_nominal, c.list.size());
    }
    if (c.n_nominal < 2) {
        return 1.0F;
    }
    double entropy = 0;
    if (of_list) {
        const float largest = c.listed_largest();
        entropy = c.entropy(largest, c.weigh(largest, 1.0F));
    } else {
        c.row.add_up_weighted(c.cut.logit);
        c.list_edited();
        double total = c.row.total() + c.weigh(c.row.largest(), 1.0F);
        double weighted = c.row.total_of_parts();
        for (const Candidate & one : c.list) {
            weighted += static_cast<double>(one.weight) * static_cast<double>(one.logit - c.row.largest());
        }
        entropy = std::log(total) - weighted / total;
    }
    const double uncertainty = std::max(entropy, 0.0) / std::log(static_cast<double>(c.n_nominal));
    const float low = std::max(0.0F, o.temperature - o.dynamic_temperature_range);
    const float high = o.temperature + o.dynamic_temperature_range;
    return low + (high - low) * std::pow(static_cast<float>(uncertainty), o.dynamic_temperature_exponent);
}

float scale_of(float temperature) {
    return std::min(1.0F / temperature, 1e30F);
}

Chosen draw(Candidates & c, Random & random, float temperature) {
    if (temperature <= 0.0F) {
        c.list_kept();
        const Candidate & best = *std::min_element(c.list.begin(), c.list.end(), before);
        return {best.id, best.logit, 1.0};
    }
    return c.is_listed ? draw_from_list(c, random, scale_of(temperature))
                       : draw_from_row(c, random, scale_of(temperature));
}

Chosen draw_from_nucleus(Candidates & c, Random & random, float top_p, const Glance & seen, float temperature) {
    constexpr double margin = 0.01;  // of the mass, for the sample's error
    const auto p = static_cast<double>(top_p);
    // A histogram of the sample over the weights' exponents and three bits of their fractions.
    constexpr size_t n_buckets = 128 * 8;
    constexpr unsigned fraction_bits = 20;
    std::array<float, n_buckets + 1> masses{};
    for (const float weight : c.floats) {
        uint32_t bits = 0;
        std::memcpy(&bits, &weight, sizeof bits);
        masses[std::min<size_t>(bits >> fraction_bits, n_buckets)] += weight;
    }
    double head = seen.mass;
    size_t bucket = n_buckets;
    while (bucket > 0 &&
           head + static_cast<double>(masses[bucket]) * seen.stands_for < (p - margin) * (seen.mass + seen.rest)) {
        head += static_cast<double>(masses[bucket]) * seen.stands_for;
        --bucket;
    }
    const auto edge = static_cast<uint32_t>(bucket + 1) << fraction_bits;
    float weight_kept_from = 0;
    std::memcpy(&weight_kept_from, &edge, sizeof edge);
    float kept_from = std::min(c.row.largest() + std::log(weight_kept_from), seen.low);

    const auto mass_from = [&](float low) {
        c.row.add_up_split(c.cut.logit, low);
        return c.row.total_of_parts() + c.row.edited_mass(low);
    };
    const double mass_kept_from = mass_from(kept_from);
    const double mass = p * (c.row.total() + c.row.edited_mass(c.cut.logit));
    if (mass_kept_from >= mass) {
        // The sample was misleading: what is below is dropped, and of what is above little is known.
        c.cut_below(kept_from);
        kept_from = seen.mass < mass ? seen.low : infinity;
    }
    const float scale = scale_of(temperature);
    bool sums_are_of_draw = scale == 1.0F && mass_kept_from < mass;
    while (true) {
        if (!sums_are_of_draw) {
            c.row.add_up(c.cut.logit, scale);
            sums_are_of_draw = true;
        }
        const Chosen chosen = draw_from_sums(c, random, scale);
        if (chosen.logit >= kept_from) {
            return chosen;
        }
        double before_it = mass_from(std::nextafter(chosen.logit, infinity));
        sums_are_of_draw = false;  // the cut is about to drop some of what they add up
        c.list_between(chosen.logit, std::nextafter(chosen.logit, infinity));
        c.weigh(c.row.largest(), 1.0F);
        for (const Candidate & one : c.list) {
            before_it += one.id < chosen.id ? static_cast<double>(one.weight) : 0.0;
        }
        if (before_it < mass) {
            return chosen;
        }
        c.cut = {chosen.logit, chosen.id - 1};
    }
}

Chosen draw_mirostat(Candidates & c, Random & random, const SamplingOptions & o, float & mu) {
    if (o.temperature == 0.0F) {
        return {c.row.best(), c.row.largest(), 1.0};
    }
    const float scale = scale_of(o.temperature);
    c.row.add_up(lowest, scale);
    c.list.assign(c.row.edits().begin(), c.row.edits().end());
    const double total = c.row.total() + c.weigh(c.row.largest(), scale);
    constexpr double ln_2 = 0.69314718055994531;
    const double least = (std::log(total) - static_cast<double>(mu) * ln_2) / static_cast<double>(scale);
    if (least > 0) {
        c.list.assign(1, {c.row.largest(), c.row.best(), 0.0F});
        c.is_listed = true;
        c.is_sorted = true;
    } else {
        c.cut_below(c.row.largest() + static_cast<float>(least));
    }
    const Chosen chosen = draw(c, random, o.temperature);
    const double surprise = -std::log2(chosen.probability);
    mu -= o.mirostat_eta * static_cast<float>(surprise - static_cast<double>(o.mirostat_tau));
    return chosen;
}

}  // namespace overspill
