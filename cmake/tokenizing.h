// Included by force before llama-vocab.cpp of llama.cpp, which has the tokenizers.
//
// They look up tokens for each step of their work, and assert something each time: there we ask whether to go on. And
// they reserve room for exactly the next character that no token has, which moves all tokens each time, so that a text
// of such characters takes the square of its length; without, room grows by itself.
//
// A text is split at special tokens in a list of fragments, and the list is gone through from its beginning for each
// split, which takes the square of their number. Ours remembers where the last split was.
#pragma once

#include "pretokenizing.h"
// What llama-vocab.cpp includes comes first: it stays as it is.
#include "llama-vocab.h"

#include "ggml.h"
#include "gguf.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "unicode.h"

#include <algorithm>
#include <cassert>
#include <cctype>
#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <forward_list>
#include <iterator>
#include <limits>
#include <list>
#include <map>
#include <queue>
#include <set>
#include <unordered_map>

// A list that counts to an element from the last one that was counted to. It has what upstream asks of
// std::forward_list.
template <typename Fragment>
class OverspillFragments {
    using Place = typename std::list<Fragment>::iterator;

  public:
    class iterator {
      public:
        using iterator_category = std::random_access_iterator_tag;  // so that std::distance and std::next ask us
        using value_type = Fragment;
        using difference_type = std::ptrdiff_t;
        using pointer = Fragment *;
        using reference = Fragment &;

        iterator(OverspillFragments & all, Place place, bool is_before = false)
            : all_(&all), place_(place), is_before_(is_before) {}
        reference operator*() const { return *place_; }
        pointer operator->() const { return &*place_; }
        iterator & operator++() {
            overspill_tokenizing_step(1 + place_->length / 64);  // for the search through this fragment
            ++place_;
            return *this;
        }
        iterator operator++(int) {
            iterator before = *this;
            ++*this;
            return before;
        }
        iterator & operator--() { return *this += -1; }
        iterator & operator+=(difference_type n) {
            place_ = all_->at(all_->index_of(place_) + n);
            return *this;
        }
        difference_type operator-(const iterator & other) const {
            return all_->index_of(place_) - all_->index_of(other.place_);
        }
        bool operator==(const iterator & other) const { return place_ == other.place_; }
        bool operator!=(const iterator & other) const { return place_ != other.place_; }

      private:
        friend OverspillFragments;
        OverspillFragments * all_;
        Place place_;
        bool is_before_;
    };

    iterator before_begin() { return {*this, all_.begin(), true}; }
    iterator begin() { return {*this, all_.begin()}; }
    iterator end() { return {*this, all_.end()}; }

    template <typename... Arguments>
    void emplace_front(Arguments &&... arguments) {
        all_.emplace_front(std::forward<Arguments>(arguments)...);
        remember(all_.begin(), 0);
    }
    template <typename... Arguments>
    void emplace_after(const iterator & before, Arguments &&... arguments) {
        const bool is_behind = before.place_ == known_ || before.place_ == added_;
        const Place added = all_.emplace(std::next(before.place_), std::forward<Arguments>(arguments)...);
        if (!is_behind) {
            remember(all_.begin(), 0);
        }
        added_ = added;
    }
    void erase_after(const iterator & before) {
        const Place erased = before.is_before_ ? before.place_ : std::next(before.place_);
        const bool was_known = erased == known_;
        const Place next = all_.erase(erased);
        // What follows has its number.
        if (was_known && next != all_.end()) {
            remember(next, known_index_);
        } else {
            remember(all_.begin(), 0);
        }
    }

  private:
    void remember(Place place, std::ptrdiff_t index) {
        known_ = added_ = place;
        known_index_ = index;
    }

    std::ptrdiff_t index_of(Place place) {
        if (place == all_.begin()) {
            return 0;
        }
        Place later = known_;
        Place earlier = known_;
        std::ptrdiff_t n = 0;
        for (; later != place && earlier != place; ++n) {
            overspill_tokenizing_step();
            later = later == all_.end() ? later : std::next(later);
            earlier = earlier == all_.begin() ? earlier : std::prev(earlier);
        }
        remember(place, later == place ? known_index_ + n : known_index_ - n);
        return known_index_;
    }

    Place at(std::ptrdiff_t index) {
        if (std::abs(index - known_index_) > index) {
            return std::next(all_.begin(), index);
        }
        return std::next(known_, index - known_index_);
    }

    std::list<Fragment> all_;
    Place known_;
    std::ptrdiff_t known_index_ = 0;
    Place added_;  // the last one of those put behind the known one
};

struct fragment_buffer_variant;
template <>
class std::forward_list<fragment_buffer_variant, std::allocator<fragment_buffer_variant>>
    : public OverspillFragments<fragment_buffer_variant> {};

#undef GGML_ASSERT
#define GGML_ASSERT(x) (overspill_tokenizing_step(), (x) ? (void)0 : GGML_ABORT("GGML_ASSERT(%s) failed", #x))
#define reserve(n) size()
