#include "generate/prompt_cache.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace overspill {

namespace {

bool begins_with(const std::vector<int32_t> & tokens, const std::vector<int32_t> & others) {
    return others.size() <= tokens.size() && std::equal(others.begin(), others.end(), tokens.begin());
}

}  // namespace

bool PromptCache::has(const std::vector<int32_t> & tokens, const GoesBack & goes_back) {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(states_.begin(), states_.end(), [&](const State & one) {
        return begins_with(one->tokens, tokens) && goes_back(*one, tokens.size());
    });
    if (found == states_.end()) {
        return false;
    }
    states_.splice(states_.end(), states_, found);
    return true;
}

bool PromptCache::make_room(size_t n_bytes) {
    const std::lock_guard lock(mutex_);
    if (n_bytes > most_bytes_) {
        return false;
    }
    while (n_bytes_ + n_bytes > most_bytes_) {
        erase(states_.begin());
    }
    return true;
}

void PromptCache::add(State saved, const GoesBack & goes_back) {
    const std::lock_guard lock(mutex_);
    for (auto one = states_.begin(); one != states_.end();) {
        const auto next = std::next(one);
        const std::vector<int32_t> & shorter = (*one)->tokens;
        if (begins_with(saved->tokens, shorter) && goes_back(*saved, shorter.size())) {
            erase(one);
        }
        one = next;
    }
    while (!states_.empty() && n_bytes_ + saved->n_bytes() > most_bytes_) {
        erase(states_.begin());
    }
    if (n_bytes_ + saved->n_bytes() <= most_bytes_) {
        n_bytes_ += saved->n_bytes();
        states_.push_back(std::move(saved));
    }
}

PromptCache::State PromptCache::best(const Count & count, size_t least) {
    const std::lock_guard lock(mutex_);
    auto best = states_.end();
    for (auto one = states_.begin(); one != states_.end(); ++one) {
        if (const size_t n = count(**one); n > least) {
            least = n;
            best = one;
        }
    }
    if (best == states_.end()) {
        return nullptr;
    }
    states_.splice(states_.end(), states_, best);
    return states_.back();
}

void PromptCache::remove(const State & saved) {
    const std::lock_guard lock(mutex_);
    const auto one = std::find(states_.begin(), states_.end(), saved);
    if (one != states_.end()) {
        erase(one);
    }
}

void PromptCache::clear() {
    const std::lock_guard lock(mutex_);
    states_.clear();
    n_bytes_ = 0;
}

size_t PromptCache::n_bytes() const {
    const std::lock_guard lock(mutex_);
    return n_bytes_;
}

void PromptCache::erase(std::list<State>::iterator at) {
    n_bytes_ -= (*at)->n_bytes();
    states_.erase(at);
}

}  // namespace overspill
