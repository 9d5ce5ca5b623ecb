#include "sample/truncation.h"

#include "sample/top_p.h"

#include <algorithm>
#include <cmath>

namespace overspill {

namespace {

// Top-n-sigma (Tang et al., 2024).
void cut_top_n_sigma(Candidates & c, float n) {
    c.cut_below(c.row.largest() - static_cast<float>(static_cast<double>(n) * c.row.deviation()));
}

void cut_top_k(Candidates & c, size_t k) {
    c.list_from(std::max(c.row.at_least(k), c.cut.logit));
    if (c.list.size() > k) {
        std::nth_element(c.list.begin(), c.list.begin() + static_cast<std::ptrdiff_t>(k), c.list.end(), before);
        c.list.resize(k);
    }
    std::sort(c.list.begin(), c.list.end(), before);
    c.is_listed = true;
    c.is_sorted = true;
    c.n_nominal = k;
}

// Locally typical sampling (Meister et al., 2022): those whose surprise is closest to the expected one.
void cut_typical(Candidates & c, float p) {
    c.list_kept();
    const float largest = c.listed_largest();
    const double total = c.weigh(largest, 1.0F);
    const double expected = static_cast<double>(largest) + std::log(total) - c.entropy(largest, total);
    c.keep_nearest(static_cast<double>(p) * total,
                   [&](const Candidate & one) { return std::fabs(static_cast<double>(one.logit) - expected); });
    c.n_nominal = c.list.size();
}

// Min-p (Nguyen et al., 2024).
void cut_min_p(Candidates & c, float p) {
    const float log_p = std::log(p);
    if (c.is_listed) {
        const float least = c.listed_largest() + log_p;
        c.list.erase(
            std::remove_if(c.list.begin(), c.list.end(), [least](const Candidate & one) { return one.logit < least; }),
            c.list.end());
    } else {
        c.cut_below(c.row.largest() + log_p);
        const auto n_blocks = std::count_if(c.row.maxima().begin(), c.row.maxima().end(),
                                            [&c](float maximum) { return maximum >= c.cut.logit; });
        if (static_cast<size_t>(n_blocks) > c.row.maxima().size() / 4) {
            c.n_nominal = 0;
            return;  // too many to be worth a list
        }
        c.list_kept();
    }
    c.n_nominal = c.list.size();
}

// Exclude top choices (github.com/oobabooga/text-generation-webui, pull request 6335): of those
// that are likely enough, only the least likely stays.
void cut_xtc(Candidates & c, const SamplingOptions & o, Random & random) {
    if ((c.is_listed && c.list.size() < 2) || random.uniform() > static_cast<double>(o.xtc_probability)) {
        return;
    }
    // A cut between equal logits is known to the list only.
    const bool of_row = !c.is_listed && o.xtc_threshold > 0 && c.cut.id == any_id;
    double total = 0;
    if (of_row) {
        // Only few can be likely enough: the rest is not listed.
        c.row.add_up(c.cut.logit);
        total = c.row.total() + c.row.edited_mass(c.cut.logit);
        const double least =
            static_cast<double>(c.row.largest()) + std::log(static_cast<double>(o.xtc_threshold) * total);
        c.list_between(std::max(static_cast<float>(least - 1e-3), c.cut.logit), infinity);
        c.weigh(c.row.largest(), 1.0F);
    } else {
        c.list_kept();
        total = c.weigh(c.listed_largest(), 1.0F);
    }
    const Candidate * least_likely = nullptr;
    for (const Candidate & one : c.list) {
        if (static_cast<double>(one.weight) >= static_cast<double>(o.xtc_threshold) * total &&
            (least_likely == nullptr || before(*least_likely, one))) {
            least_likely = &one;
        }
    }
    if (least_likely == nullptr) {
        return;
    }
    const Candidate stays = *least_likely;
    if (of_row) {
        std::for_each(c.list.begin(), c.list.end(), [&](const Candidate & one) {
            if (before(one, stays)) {
                c.row.hide(one.id);
                c.n_nominal -= c.n_nominal > 0 ? 1 : 0;
            }
        });
        c.row.set_largest(stays.logit);
        return;
    }
    c.list.erase(
        std::remove_if(c.list.begin(), c.list.end(), [&](const Candidate & one) { return before(one, stays); }),
        c.list.end());
    c.n_nominal = c.list.size();
}

}  // namespace

void truncate(Candidates & c, const SamplingOptions & o, Random & random) {
    if (o.top_n_sigma > 0 && c.row.size() > 1) {
        cut_top_n_sigma(c, o.top_n_sigma);
    }
    if (o.top_k > 0 && static_cast<size_t>(o.top_k) < c.row.size()) {
        cut_top_k(c, static_cast<size_t>(o.top_k));
    }
    if (o.typical_p < 1) {
        cut_typical(c, o.typical_p);
    }
    if (o.top_p < 1) {
        cut_top_p(c, o.top_p);
    }
    if (o.min_p > 0) {
        cut_min_p(c, o.min_p);
    }
    if (o.xtc_probability > 0 && o.xtc_threshold <= 0.5F) {
        cut_xtc(c, o, random);
    }
}

}  // namespace overspill
