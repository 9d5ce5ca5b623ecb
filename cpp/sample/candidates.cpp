#include "sample/candidates.h"

#include <cmath>
#include <iterator>

namespace overspill {

void Candidates::keep_all() {
    cut = {lowest, any_id};
    is_listed = false;
    is_sorted = false;
    n_nominal = row.size();
}

void Candidates::list_between(float low, float high) {
    row.list(low, high, list);
    is_sorted = false;
}

void Candidates::list_from(float low) {
    list_between(low, infinity);
    if (list.empty()) {
        row_has_changed();
    }
}

void Candidates::list_edited() {
    list.clear();
    std::copy_if(row.edits().begin(), row.edits().end(), std::back_inserter(list),
                 [this](const Candidate & one) { return one.logit >= cut.logit; });
}

void Candidates::list_kept() {
    if (is_listed) {
        return;
    }
    list_between(cut.logit, infinity);
    list.erase(
        std::remove_if(list.begin(), list.end(), [this](const Candidate & one) { return !keeps(one.logit, one.id); }),
        list.end());
    is_listed = true;
    if (list.empty()) {
        row_has_changed();
    }
}

float Candidates::listed_largest() const {
    const auto less = [](const Candidate & a, const Candidate & b) { return a.logit < b.logit; };
    return is_sorted ? list.front().logit : std::max_element(list.begin(), list.end(), less)->logit;
}

double Candidates::weigh(float largest, float scale) {
    floats.resize(list.size());
    std::transform(list.begin(), list.end(), floats.begin(), [](const Candidate & one) { return one.logit; });
    row.exps(floats.data(), floats.size(), largest, scale, floats.data());
    double total = 0;
    for (size_t i = 0; i < list.size(); ++i) {
        list[i].weight = floats[i];
        total += static_cast<double>(floats[i]);
    }
    return total;
}

double Candidates::entropy(float largest, double total) const {
    double sum = 0;
    for (const Candidate & one : list) {
        sum += one.weight > 0 ? static_cast<double>(one.weight) * static_cast<double>(one.logit - largest) : 0.0;
    }
    return std::log(total) - sum / total;
}

void Candidates::keep_most_likely(double mass) {
    const double just_under = std::nextafter(mass, -1.0);
    if (!is_sorted && list.size() <= 96) {
        std::sort(list.begin(), list.end(), before);
        is_sorted = true;
    }
    if (!is_sorted) {
        keep_nearest(just_under,
                     [this](const Candidate & one) { return static_cast<double>(row.largest() - one.logit); });
        return;
    }
    double sum = 0;
    auto end = list.begin();
    while (end != list.end() && sum <= just_under) {
        sum += static_cast<double>(end->weight);
        ++end;
    }
    list.erase(std::max(end, list.begin() + 1), list.end());
}

}  // namespace overspill
