#include "product/expert_residency.h"

#include <algorithm>

namespace overspill {

Recency::Recency(size_t n) : end_(n), before_(n + 1), after_(n + 1), is_in_(n, 0) {
    before_[end_] = after_[end_] = end_;
}

void Recency::use(size_t i) {
    if (contains(i)) {
        take_out(i);
    }
    put_in(i, end_);
}

void Recency::add_oldest(size_t i) {
    put_in(i, before_[end_]);
}

std::vector<size_t> Recency::in_order() const {
    std::vector<size_t> found;
    for (size_t i = before_[end_]; i != end_; i = before_[i]) {
        found.push_back(i);
    }
    return found;
}

void Recency::put_in(size_t i, size_t after) {
    is_in_[i] = 1;
    ++size_;
    after_[i] = after_[after];
    before_[i] = after;
    before_[after_[i]] = i;
    after_[after] = i;
}

size_t Recency::rank(size_t i) const {
    size_t n = 0;
    for (size_t j = before_[i]; j != end_; j = before_[j]) {
        ++n;
    }
    return n;
}

void Recency::take_out(size_t i) {
    after_[before_[i]] = after_[i];
    before_[after_[i]] = before_[i];
    is_in_[i] = 0;
    --size_;
}

SecondTouch::SecondTouch(size_t n_experts, size_t capacity)
    : capacity_(std::min(capacity, n_experts)), resident_(n_experts), last_use_(n_experts, 0) {}

size_t SecondTouch::use(const uint16_t * experts, size_t n, size_t most_insertions) {
    ++n_tokens_;
    inserted_.clear();
    for (size_t k = 0; k < n; ++k) {
        const size_t expert = experts[k];
        if (expert == unknown_expert) {
            continue;
        }
        const bool has_room = resident_.size() < capacity_;
        const bool was_used = last_use_[expert] > 0 && n_tokens_ - last_use_[expert] <= window;
        last_use_[expert] = n_tokens_;
        if (contains(expert)) {
            resident_.use(expert);
        } else if (inserted_.size() < most_insertions && (has_room || was_used)) {
            resident_.use(expert);
            inserted_.push_back(expert);
        }
    }
    while (resident_.size() > capacity_) {
        resident_.drop_oldest();
    }
    // What leaves at once need not be copied.
    return static_cast<size_t>(
        std::count_if(inserted_.begin(), inserted_.end(), [this](size_t one) { return contains(one); }));
}

bool SecondTouch::prepare(size_t expert) {
    if (resident_.size() == capacity_ || contains(expert)) {
        return false;
    }
    resident_.add_oldest(expert);
    return true;
}

}  // namespace overspill
