#include "sample/grammar_matcher.h"

#include "base/error.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace overspill {

namespace {

using Kind = GrammarRules::Kind;

constexpr uint32_t none = std::numeric_limits<uint32_t>::max();
constexpr uint32_t whole_text = 0;  // the node in which the root rule is
constexpr size_t most_readings = 1'000'000;
constexpr size_t most_links = 8'000'000;
constexpr size_t fewest_to_collect = 4096;

// What the first byte of a character says: how many follow, and the range of characters that it may begin.
struct Lead {
    uint32_t n_more, low, high;
};

Lead lead_of(unsigned char byte) {
    if (byte < 0x80) {
        return {0, byte, byte};
    }
    if (byte >= 0xC2 && byte <= 0xDF) {
        const uint32_t low = (byte & 0x1FU) << 6U;
        return {1, low, low + 0x3F};
    }
    if (byte >= 0xE0 && byte <= 0xEF) {
        const uint32_t low = (byte & 0x0FU) << 12U;
        // No overlong forms and no surrogates.
        return {2, byte == 0xE0 ? 0x800 : low, byte == 0xED ? 0xD7FF : low + 0xFFF};
    }
    if (byte >= 0xF0 && byte <= 0xF4) {
        const uint32_t low = (byte & 0x07U) << 18U;
        return {3, byte == 0xF0 ? 0x10000 : low, byte == 0xF4 ? 0x10FFFF : low + 0x3FFFF};
    }
    return {none, 0, 0};
}

// A character whose bytes have come in part, as in a place of the grammar. Returns false for a byte that no character
// has there.
bool add_byte(unsigned char byte, uint32_t & n_missing, uint32_t & low, uint32_t & high) {
    if (n_missing == 0) {
        const Lead lead = lead_of(byte);
        n_missing = lead.n_more;
        low = lead.low;
        high = lead.high;
        return lead.n_more != none;
    }
    --n_missing;
    // Those of the range whose bits at this place are these.
    const uint32_t shift = 6 * n_missing;
    const uint32_t mask = ~((uint32_t{1} << (shift + 6)) - 1);
    const uint32_t first = (high & mask) | ((byte & 0x3FU) << shift);
    low = std::max(low, first);
    high = std::min(high, first + (uint32_t{1} << shift) - 1);
    return (byte & 0xC0U) == 0x80U && low <= high;
}

}  // namespace

void TokenTexts::add(int32_t token, std::string_view bytes) {
    uint64_t beginning = 0;
    for (size_t i = 0; i < sizeof(beginning); ++i) {
        beginning = beginning << 8U | (i < bytes.size() ? static_cast<unsigned char>(bytes[i]) : 0U);
    }
    entries_.push_back({beginning, token, static_cast<uint32_t>(bytes_.size()), static_cast<uint32_t>(bytes.size())});
    bytes_ += bytes;
}

void TokenTexts::sort() {
    std::sort(entries_.begin(), entries_.end(),
              [](const Entry & a, const Entry & b) { return a.beginning < b.beginning; });
}

GrammarMatcher::GrammarMatcher(GrammarRules rules)
    : rules_(std::move(rules)), seen_(256), collect_at_(fewest_to_collect) {
    nodes_.push_back({none, none, false});
    begin_round();
    const auto & root = rules_.rules[rules_.root];
    for (uint32_t i = root.begin; i < root.end; ++i) {
        enter(rules_.starts[i], whole_text);
    }
    close(now_, {});
}

bool GrammarMatcher::allows(int32_t token, std::string_view bytes, const ShouldStop & should_stop) {
    const size_t n_nodes = nodes_.size();
    const size_t n_links = links_.size();
    const bool allowed = follow(token, bytes, should_stop);
    // Older nodes do not change.
    nodes_.resize(n_nodes);
    links_.resize(n_links);
    return allowed;
}

bool GrammarMatcher::accept(int32_t token, std::string_view bytes, const ShouldStop & should_stop) {
    if (!follow(token, bytes, should_stop)) {
        return false;
    }
    std::swap(now_, next_);
    if (nodes_.size() + links_.size() > collect_at_) {
        collect();
    }
    return true;
}

// Leaves the place after the token in `next_`.
bool GrammarMatcher::follow(int32_t token, std::string_view bytes, const ShouldStop & should_stop) {
    begin_round();
    if (now_.n_missing == 0) {
        for (const Thread & thread : now_.threads) {
            const auto & step = rules_.steps[thread.step];
            const bool is_it = step.value == static_cast<uint32_t>(token);
            if ((step.kind == Kind::token && is_it) || (step.kind == Kind::other_token && !is_it)) {
                enter(thread.step + 1, thread.node);
            }
        }
    }
    close(after_token_, should_stop);
    const bool as_token = after_token_.may_end || !after_token_.threads.empty();
    const bool as_text = !bytes.empty() && follow_bytes(bytes, should_stop);
    if (as_token && as_text && next_.n_missing == 0) {
        next_.threads.insert(next_.threads.end(), after_token_.threads.begin(), after_token_.threads.end());
        next_.may_end = next_.may_end || after_token_.may_end;
    } else if (as_token) {
        std::swap(next_, after_token_);
    }
    return as_token || as_text;
}

bool GrammarMatcher::follow_bytes(std::string_view bytes, const ShouldStop & should_stop) {
    const Place * place = &now_;
    uint32_t n_missing = now_.n_missing;
    uint32_t low = now_.low;
    uint32_t high = now_.high;
    for (const char c : bytes) {
        if (!add_byte(static_cast<unsigned char>(c), n_missing, low, high)) {
            return false;
        }
        if (n_missing == 0) {
            if (!take_character(*place, low, spare_, should_stop)) {
                return false;
            }
            std::swap(next_, spare_);
            place = &next_;
        }
    }
    if (n_missing != 0 && !meets(*place, low, high)) {
        return false;
    }
    if (place == &now_) {
        next_.threads.assign(now_.threads.begin(), now_.threads.end());
        next_.may_end = now_.may_end;
    }
    next_.n_missing = n_missing;
    next_.low = low;
    next_.high = high;
    return true;
}

void GrammarMatcher::find_allowed(const TokenTexts & texts, const std::function<void(int32_t)> & take,
                                  const ShouldStop & should_stop) {
    const bool names_tokens =
        now_.n_missing == 0 && std::any_of(now_.threads.begin(), now_.threads.end(), [&](const Thread & thread) {
            return rules_.steps[thread.step].kind != Kind::characters;
        });
    if (names_tokens) {
        for (size_t i = 0; i < texts.size(); ++i) {
            if (allows(texts.token(i), texts.bytes(i), should_stop)) {
                take(texts.token(i));
            }
        }
        return;
    }
    const auto remember = [this](size_t depth) {
        path_[depth].n_nodes = nodes_.size();
        path_[depth].n_links = links_.size();
    };
    const auto go_back = [this](size_t depth) {
        nodes_.resize(path_[depth].n_nodes);
        links_.resize(path_[depth].n_links);
    };
    path_.resize(std::max<size_t>(path_.size(), 1));
    path_[0].place = now_;
    remember(0);
    std::string_view followed;  // the first `depth` bytes may come, and not the one after them, if there is one
    size_t depth = 0;
    for (size_t i = 0; i < texts.size(); ++i) {
        const std::string_view bytes = texts.bytes(i);
        work(1, should_stop);
        const size_t n_same = static_cast<size_t>(
            std::mismatch(bytes.begin(), bytes.end(), followed.begin(), followed.end()).first - bytes.begin());
        if (bytes.empty() || n_same > depth) {
            continue;
        }
        followed = bytes;
        depth = n_same;
        go_back(depth);
        if (path_.size() <= bytes.size()) {
            path_.resize(bytes.size() + 1);
        }
        while (depth < bytes.size() && take_byte(path_[depth].place, static_cast<unsigned char>(bytes[depth]),
                                                 path_[depth + 1].place, should_stop)) {
            remember(++depth);
        }
        if (depth == bytes.size()) {
            take(texts.token(i));
        }
    }
    go_back(0);
}

bool GrammarMatcher::take_byte(const Place & from, unsigned char byte, Place & to, const ShouldStop & should_stop) {
    uint32_t n_missing = from.n_missing;
    uint32_t low = from.low;
    uint32_t high = from.high;
    if (!add_byte(byte, n_missing, low, high)) {
        return false;
    }
    if (n_missing == 0) {
        return take_character(from, low, to, should_stop);
    }
    to.threads.assign(from.threads.begin(), from.threads.end());
    to.may_end = from.may_end;
    to.n_missing = n_missing;
    to.low = low;
    to.high = high;
    return meets(from, low, high);
}

bool GrammarMatcher::meets(const Place & place, uint32_t low, uint32_t high) const {
    return std::any_of(place.threads.begin(), place.threads.end(), [&](const Thread & thread) {
        const auto & step = rules_.steps[thread.step];
        return step.kind == Kind::characters && rules_.sets[step.value].meets(low, high);
    });
}

bool GrammarMatcher::take_character(const Place & from, uint32_t character, Place & to,
                                    const ShouldStop & should_stop) {
    work(from.threads.size(), should_stop);
    begin_round();
    for (const Thread & thread : from.threads) {
        const auto & step = rules_.steps[thread.step];
        if (step.kind == Kind::characters && rules_.sets[step.value].has(character)) {
            enter(thread.step + 1, thread.node);
        }
    }
    close(to, should_stop);
    return to.may_end || !to.threads.empty();
}

// Asks now and then whether to stop.
void GrammarMatcher::work(size_t n_steps, const ShouldStop & should_stop) {
    constexpr size_t steps_per_question = 1U << 14U;
    n_steps_ += n_steps;
    if (n_steps_ >= steps_per_question) {
        n_steps_ = 0;
        if (should_stop && should_stop()) {
            throw CancelledError("the grammar was left while a token was chosen");
        }
    }
}

void GrammarMatcher::begin_round() {
    if (++round_ == 0) {
        std::fill(seen_.begin(), seen_.end(), Slot{});
        round_ = 1;
    }
    n_seen_ = 0;
    todo_.clear();
}

GrammarMatcher::Slot & GrammarMatcher::slot_of(uint64_t key, bool & is_new) {
    const auto find = [this](uint64_t wanted) -> Slot & {
        const size_t mask = seen_.size() - 1;
        size_t at = static_cast<size_t>((wanted * 0x9E3779B97F4A7C15U) >> 32U) & mask;
        while (seen_[at].round == round_ && seen_[at].key != wanted) {
            at = (at + 1) & mask;
        }
        return seen_[at];
    };
    if (2 * (n_seen_ + 1) > seen_.size()) {
        std::vector<Slot> old(2 * seen_.size());
        std::swap(old, seen_);
        for (const Slot & slot : old) {
            if (slot.round == round_) {
                find(slot.key) = slot;
            }
        }
    }
    Slot & slot = find(key);
    is_new = slot.round != round_;
    if (is_new) {
        slot = {key, round_, 0};
        ++n_seen_;
    }
    return slot;
}

void GrammarMatcher::enter(uint32_t step, uint32_t node) {
    bool is_new = false;
    slot_of(uint64_t{step} << 32U | node, is_new);
    if (is_new) {
        todo_.push_back({step, node});
    }
}

// Enters a rule. A call at the end of its own rule needs no node: what comes after it comes after its caller.
void GrammarMatcher::call(uint32_t step, uint32_t node) {
    const uint32_t next_step = step + 1;
    uint32_t target = node;
    if (rules_.steps[next_step].kind != Kind::end) {
        bool is_new = false;
        Slot & slot = slot_of(uint64_t{next_step} << 32U | none, is_new);
        if (is_new) {
            slot.value = static_cast<uint32_t>(nodes_.size());
            nodes_.push_back({next_step, none, false});
        }
        target = slot.value;
        links_.push_back({node, nodes_[target].first_link});
        nodes_[target].first_link = static_cast<uint32_t>(links_.size() - 1);
        if (nodes_[target].has_ended) {
            enter(next_step, node);
        }
    }
    const auto & rule = rules_.rules[rules_.steps[step].value];
    for (uint32_t i = rule.begin; i < rule.end; ++i) {
        enter(rules_.starts[i], target);
    }
}

// Goes on with what was entered until each reading waits for a character or a token.
void GrammarMatcher::close(Place & place, const ShouldStop & should_stop) {
    place.threads.clear();
    place.may_end = false;
    place.n_missing = 0;
    while (!todo_.empty()) {
        const auto [step, node] = todo_.back();
        todo_.pop_back();
        work(1, should_stop);
        if (n_seen_ > most_readings || links_.size() > most_links) {
            throw Error("the grammar is too ambiguous: it has more than " + std::to_string(most_readings) +
                        " readings of the reply so far");
        }
        switch (rules_.steps[step].kind) {
            case Kind::rule: call(step, node); break;
            case Kind::end:
                if (node == whole_text) {
                    place.may_end = true;
                    break;
                }
                nodes_[node].has_ended = true;
                for (uint32_t link = nodes_[node].first_link; link != none; link = links_[link].next) {
                    enter(nodes_[node].next_step, links_[link].node);
                }
                break;
            default: place.threads.push_back({step, node}); break;
        }
    }
}

// Forgets nodes that no reading leads to any more.
void GrammarMatcher::collect() {
    std::vector<uint32_t> moved(nodes_.size(), none);
    std::vector<uint32_t> order = {whole_text};
    moved[whole_text] = whole_text;
    const auto keep = [&](uint32_t node) {
        if (moved[node] == none) {
            moved[node] = static_cast<uint32_t>(order.size());
            order.push_back(node);
        }
        return moved[node];
    };
    for (Thread & thread : now_.threads) {
        thread.node = keep(thread.node);
    }
    std::vector<Node> nodes;
    std::vector<Link> links;
    for (size_t i = 0; i < order.size(); ++i) {
        Node node = nodes_[order[i]];
        uint32_t first = none;
        for (uint32_t link = node.first_link; link != none; link = links_[link].next) {
            links.push_back({keep(links_[link].node), first});
            first = static_cast<uint32_t>(links.size() - 1);
        }
        node.first_link = first;
        nodes.push_back(node);
    }
    nodes_ = std::move(nodes);
    links_ = std::move(links);
    collect_at_ = std::max(fewest_to_collect, 2 * (nodes_.size() + links_.size()));
}

}  // namespace overspill
